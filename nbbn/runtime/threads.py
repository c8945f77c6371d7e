"""When a kernel may use Numba's thread pool.

Numba's pools abort or hang when two threads enter them at once (workqueue) or when a forked child uses its parent's
(omp).
So every kernel has a serial twin that gives the same bits, and one lock decides: whoever gets it without waiting runs
in parallel, everybody else runs the twin at once.
"""

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numba
from numba.core.compiler_lock import global_compiler_lock
from numba.np.ufunc import parallel as numba_pool

_pool = threading.Lock()
_owner: int | None = None
_inherited_pool = False
_generation = 0  # how many forks lie between this process and the first
_renewal = threading.Lock()


@lru_cache(maxsize=1)
def thread_limit() -> int:
    """The most threads a kernel may use: Numba's number, NBBN_NUM_THREADS and the cgroup's CPU quota, whichever is
    least.

    Raises: ValueError if NBBN_NUM_THREADS is not a positive integer.
    """
    limits: list[int] = [numba.config.NUMBA_NUM_THREADS, _cgroup_cpus()]
    asked = os.environ.get("NBBN_NUM_THREADS", "")
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise ValueError(f"NBBN_NUM_THREADS must be a positive integer; received {asked!r}")
        limits.append(int(asked))
    return min(limits)


def _cgroup_cpus(root: Path = Path("/sys/fs/cgroup")) -> int:
    """The CPU quota of this process's control group, rounded up; a huge number where there is none."""
    unlimited = 1 << 20
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return unlimited
    if not quota.isdecimal() or not period.isdecimal():  # "max", or -1 in version 1
        return unlimited
    return max(1, math.ceil(int(quota) / int(period)))


@contextmanager
def parallel_region() -> Iterator[bool]:
    """Yields whether the kernel may run in parallel now; the pool is this caller's until the block ends."""
    global _owner
    if thread_limit() == 1 or _inherited_pool or not _pool.acquire(blocking=False):
        yield False
        return
    _owner = threading.get_ident()
    try:
        if not _pool_is_safe():
            yield False
            return
        with _thread_count(thread_limit()):
            yield True
    finally:
        _owner = None
        _pool.release()


def _pool_is_safe() -> bool:
    try:
        numba.get_num_threads()  # starts the pool, whose kind is not known before
    except ValueError:  # no threading layer can be loaded
        return False
    # A foreign kernel in another thread would make workqueue abort the process.
    return numba.threading_layer() != "workqueue" or threading.active_count() == 1


@contextmanager
def _thread_count(limit: int) -> Iterator[None]:
    previous = numba.get_num_threads()
    if previous <= limit:
        yield
        return
    numba.set_num_threads(limit)
    try:
        yield
    finally:
        numba.set_num_threads(previous)


class StateLock:
    """A lock that a forked child finds open.

    For data that is replaced whole by one assignment: what the child inherits is consistent, and the thread that held
    the lock does not exist there. Pickles and copies as a new lock.
    """

    def __init__(self) -> None:
        self._lock, self._generation = threading.Lock(), _generation

    def __enter__(self) -> None:
        if self._generation != _generation:
            with _renewal:  # the child's threads must agree on one new lock
                if self._generation != _generation:
                    self._lock, self._generation = threading.Lock(), _generation
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return StateLock, ()


def _before_fork() -> None:
    # A signal handler that forks may interrupt this very thread inside a region: it must not wait for itself.
    if _owner != threading.get_ident():
        _pool.acquire()
    global_compiler_lock.acquire()


def _after_fork_in_parent() -> None:
    global_compiler_lock.release()
    if _owner != threading.get_ident():
        _pool.release()


def _after_fork_in_child() -> None:
    global _inherited_pool, _generation, _renewal
    _inherited_pool = _inherited_pool or numba_pool._is_initialized
    _generation += 1
    _renewal = threading.Lock()
    _after_fork_in_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
