"""A group of MPI processes, by mpi4py."""

import os
import time
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from nbbn.sync.group import OneProcess, SyncError, check_timeout

WAIT = 600.0  # seconds, where nobody says otherwise
# Two ranks that share a core and block in MPI take turns of its scheduler, 12 ms each. So a request is tested, and
# between tests the core is left to whoever waits for it; a rank that is late for longer is waited for with pauses. (A
# pause takes 60 us at least: most ranks are there sooner.)
_TESTS, _YIELDS, _SHORTEST, _LONGEST = 200, 2000, 10e-6, 1e-3
_leave_core: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))
_lost: list[Any] = []  # requests that nobody waits for any longer, and their buffers, which MPI may still write to


class MpiGroup(OneProcess):
    """The ranks of a communicator; see mpi()."""

    def __init__(self, comm: Any, timeout: float) -> None:
        super().__init__()
        self._comm, self._timeout = comm, timeout
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    def duplicate(self) -> Self:
        """The same ranks with a communicator of their own. All ranks have to ask for it."""
        self.check_process()
        comm, request = self._comm.Idup()
        self._wait(request, comm)
        return type(self)(comm, self._timeout)

    def all_gather(self, values: np.ndarray) -> np.ndarray:
        """Raises: SyncError if the others do not come in time."""
        self.check_process()
        mine = np.ascontiguousarray(values, np.float64)
        found = np.empty((self.size, mine.size))
        self._wait(self._comm.Iallgather(mine, found), (mine, found))
        return found

    def _wait(self, request: Any, buffers: Any) -> None:
        try:
            for i in range(_TESTS + _YIELDS):
                if request.Test():
                    return
                if i >= _TESTS:
                    _leave_core()
            end, pause = time.monotonic() + self._timeout, _SHORTEST
            while not request.Test():
                if time.monotonic() > end:
                    raise SyncError(f"not all {self.size} ranks of the communicator came within {self._timeout} s")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST)
        except BaseException:  # a KeyboardInterrupt among them
            _lost.append((request, buffers))
            raise


def mpi(comm: Any = None, timeout: float | None = None) -> MpiGroup:
    """The group of an MPI communicator (extra `mpi`).

    Args:
        comm: of mpi4py; None is COMM_WORLD. timeout: seconds that a rank waits for the others; None is 600.
    Raises: ImportError without mpi4py; TypeError, ValueError for what is no communicator, or no number of seconds.
    """
    from mpi4py import MPI

    if not (comm is None or isinstance(comm, MPI.Comm)):
        raise TypeError(f"comm must be a communicator of mpi4py, or None; received {comm!r}")
    return MpiGroup(MPI.COMM_WORLD if comm is None else comm, WAIT if timeout is None else check_timeout(timeout))
