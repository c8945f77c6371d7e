"""When a kernel may use Numba's thread pool.

Numba's pools abort or hang when two threads enter them at once (workqueue) or when a forked child uses its parent's
(omp). So no kernel needs one, and one lock decides: whoever gets it without waiting has the pool's threads, everybody
else goes on alone, with the same bits.
"""

import _thread
import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from time import perf_counter

import numba
from numba.core.compiler_lock import global_compiler_lock
from numba.np.ufunc import parallel as numba_pool

from nbbn.runtime.machine import cpu_quota
from nbbn.runtime.plain import PLAIN
from nbbn.runtime.threadpool import addresses, leave_pool, start_pool

_pool = threading.RLock()
_is_in_region = _pool._is_owned  # type: ignore[attr-defined]  # what threading.Condition uses, too
_inherited_pool = False
_address = 0  # of the pool's addresses(), once it is known that it is of use always
_leave: Callable[[], None] | None = None  # what a thread does that has used the pool
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
    if hasattr(os, "sched_getaffinity") and "NUMBA_NUM_THREADS" not in os.environ:  # Numba has counted at its import
        limits["the affinity mask"] = len(os.sched_getaffinity(0))
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


def limit_in_words() -> str:
    """The limit, what sets it, and all other limits, as they are now."""
    limits = thread_limits()
    least = min(limits.values())
    deciding = ", ".join(name for name, limit in limits.items() if limit == least)
    others = "".join(f"; {name}: {limit}" for name, limit in limits.items() if limit > least)
    return f"{least} (by {deciding}{others})"


def region(elements: int | None = None) -> Iterator[int]:
    """Yields once: the pool, where the kernel may have it, as the first argument of a step; else 0. It is this caller's
    until the block ends.

    The pool is left in every case, as CPython closes a generator with its last reference: `for pool in region():` costs
    1 us, parallel_region(), the same for `with`, 2. With cold caches both cost ten times as much, as every function of
    Python's does; so few are called here.

    Args:
        elements: how many the kernels in the block go over: it takes part in what _note_late_run() decides. None for a
            block that does something else.
    """
    global _serial_for
    busy = elements is not None and _serial_until > 0 and perf_counter() < _serial_until
    if busy or thread_limit() == 1 or _inherited_pool or _is_in_region():
        yield 0
        return
    # A KeyboardInterrupt can follow any call, also that of acquire(): so it stands inside, and release() comes first.
    try:
        if _pool.acquire(False) and (pool := _address or _find_pool()):
            start = perf_counter()
            try:
                yield pool
                if elements is not None:
                    late = perf_counter() - start - (1e-3 + 4e-9 * elements)  # a slow core needs 2 ns for an element
                    if late > 0:
                        _note_late_run(late)
                    else:
                        _serial_for = _SHORTEST
            finally:
                if _leave is not None:
                    _leave()
        else:
            yield 0
    finally:
        try:  # noqa: SIM105  # suppress() would be a call before the release
            _pool.release()
        except RuntimeError:  # it was another thread's
            pass


parallel_region = contextmanager(region)


def _note_late_run(late: float) -> None:
    """Run serially for a while after a parallel run that other processes have held up, by so many seconds.

    A thread that finds no free core lets all others wait, libgomp's 4 to 40 ms, for a share that takes 0.05 ms; on
    virtual machines also after every pause. Once may be chance, so this begins when a tenth of a second has been lost.
    Each parallel run that is late once more makes the time twice as long.
    """
    global _lost, _serial_until, _serial_for
    _lost += late
    if _lost > 0.1:
        _serial_until = perf_counter() + _serial_for
        _serial_for = min(2 * _serial_for, _LONGEST)


def _find_pool() -> int:
    """The pool, started if need be; 0 if there is none, or it is of no use now."""
    global _address, _leave
    layer = start_pool()
    # A foreign kernel in another thread would make workqueue abort the process.
    if layer is None or (layer == "workqueue" and threading.active_count() > 1):
        return 0
    found = ctypes.addressof(addresses(thread_limit()))
    _leave = leave_pool if layer == "tbb" else None
    if layer != "workqueue":
        _address = found
    return found


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
