"""When a kernel may use Numba's thread pool.

Numba's pools abort or hang when two threads enter them at once (workqueue) or when a forked child uses its parent's
(omp). So no kernel needs one, and one lock decides: whoever gets it without waiting has the pool's threads, everybody
else goes on alone, with the same bits.
"""

import _thread
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from time import perf_counter

import numba
from numba.core.compiler_lock import global_compiler_lock
from numba.np.ufunc import parallel as numba_pool

from nbbn.runtime.machine import cpu_quota
from nbbn.runtime.plain import PLAIN
from nbbn.runtime.threadpool import leave_pool, openmp_threads, start_pool

_pool = threading.RLock()
_is_in_region = _pool._is_owned  # type: ignore[attr-defined]  # what threading.Condition uses, too
_inherited_pool = False
_lost = 0.0  # seconds that parallel runs took too long
_serial_until = 0.0  # of perf_counter()
_SHORTEST, _LONGEST = 0.05, 2.0  # seconds that it is serial for
_serial_for = _SHORTEST


@lru_cache(maxsize=1)
def thread_limit() -> int:
    """The most threads a kernel may use: the least of thread_limits(), as it is at the first call."""
    return min(thread_limits().values())


def thread_limits() -> dict[str, int]:
    """All that limits the threads of every kernel, by its name.

    Raises: ValueError if NBBN_NUM_THREADS is not a positive integer.
    """
    if PLAIN:
        return {"NUMBA_DISABLE_JIT": 1}
    limits: dict[str, int] = {"numba.config.NUMBA_NUM_THREADS": numba.config.NUMBA_NUM_THREADS}
    quota, file = cpu_quota()
    if file is not None:
        limits[f"the CPU quota in {file}"] = quota
    asked = os.environ.get("NBBN_NUM_THREADS", "")
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise ValueError(f"NBBN_NUM_THREADS must be a positive integer; received {asked!r}")
        limits["NBBN_NUM_THREADS"] = int(asked)
    outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list has a number per nesting level
    if outermost.isdecimal() and int(outermost) > 0:  # OpenMP passes over what it does not understand, too
        limits["OMP_NUM_THREADS"] = int(outermost)
    return limits


@contextmanager
def parallel_region(elements: int | None = None) -> Iterator[bool]:
    """Yields whether the kernel may run in parallel now; if so, the pool is this caller's until the block ends.

    Args:
        elements: how many the block goes over, compiling nothing. It then takes part in what _note_run() decides.
    """
    busy = elements is not None and perf_counter() < _serial_until
    if busy or thread_limit() == 1 or _inherited_pool or _is_in_region():
        yield False
        return
    # A KeyboardInterrupt can follow any call, also that of acquire(): so it stands inside, and release() comes first.
    try:
        if _pool.acquire(blocking=False) and _pool_is_safe():
            before, start = _limit_thread_count(), perf_counter()
            try:
                yield True
                if elements is not None:
                    _note_run(perf_counter() - start, elements)
            finally:
                if before is not None:
                    numba.set_num_threads(before)
                leave_pool()
        else:
            yield False
    finally:
        try:  # noqa: SIM105  # suppress() would be a call before the release
            _pool.release()
        except RuntimeError:  # it was another thread's
            pass


def _note_run(seconds: float, elements: int) -> None:
    """Run serially for a while after a parallel run that other processes have held up.

    A thread that finds no free core lets all others wait, libgomp's 4 to 40 ms, for a share that takes 0.05 ms; on
    virtual machines also after every pause. Once may be chance, so this begins when a tenth of a second has been lost.
    Each parallel run that is late once more makes the time twice as long.
    """
    global _lost, _serial_until, _serial_for
    late = seconds - (1e-3 + 4e-9 * elements)  # a slow core needs less than 2 ns for an element
    if late <= 0:
        _serial_for = _SHORTEST
        return
    _lost += late
    if _lost > 0.1:
        _serial_until = perf_counter() + _serial_for
        _serial_for = min(2 * _serial_for, _LONGEST)


def _limit_thread_count() -> int | None:
    """Keep this thread's kernels to the limits. Returns the number of threads to restore, None if it is the same."""
    limit = min(thread_limit(), openmp_threads())
    if limit >= numba.config.NUMBA_NUM_THREADS:
        return None  # without asking Numba, which takes 0.7 us
    before: int = numba.get_num_threads()
    if before <= limit:
        return None
    numba.set_num_threads(limit)
    return before


def _pool_is_safe() -> bool:
    layer = start_pool()
    # A foreign kernel in another thread would make workqueue abort the process.
    return layer is not None and (layer != "workqueue" or threading.active_count() == 1)


class StateLock(_thread.RLock):  # type: ignore[misc]  # typeshed calls it final; CPython does not
    """A lock that a forked child finds open.

    For data that is replaced whole by one assignment: what the child inherits is consistent, and the thread that held
    the lock does not exist there. `with` takes and releases it in C, where no KeyboardInterrupt can come between.
    Pickles and copies as a new lock.
    """

    def __init__(self) -> None:
        _state_locks.add(self)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return StateLock, ()


_state_locks: weakref.WeakSet[StateLock] = weakref.WeakSet()


# A kernel in another thread, or the compiler, would leave a child with a pool or a lock that nobody ever releases.
# Both locks are reentrant: a signal handler that forks may have interrupted this very thread inside a region.


def _before_fork() -> None:
    _pool.acquire()
    global_compiler_lock.acquire()


def _after_fork_in_parent() -> None:
    global_compiler_lock.release()
    _pool.release()


def _after_fork_in_child() -> None:
    global _inherited_pool
    _inherited_pool = _inherited_pool or numba_pool._is_initialized
    for lock in _state_locks:
        lock._at_fork_reinit()  # type: ignore[attr-defined]  # what the standard library does, too
    _after_fork_in_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
