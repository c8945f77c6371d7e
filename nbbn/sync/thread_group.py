"""A group of threads of one process: for tests and notebooks."""

import itertools
import threading
from collections.abc import Iterator
from typing import Any, Self

import numpy as np

from nbbn.sync.group import OneProcess, SyncError, check_timeout


class _Meeting:
    """Where the threads of a group leave what they bring. There are two places for each, used in turn: whoever comes
    for the next call cannot disturb one who still reads the last."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.places: tuple[list[Any], list[Any]] = ([None] * size, [None] * size)


class ThreadGroup(OneProcess):
    """One thread's view of the group; see threads()."""

    def __init__(
        self,
        rank: int,
        size: int,
        timeout: float,
        meetings: dict[tuple[int, ...], _Meeting],
        key: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.rank, self.size, self._timeout, self._key = rank, size, timeout, key
        self._meeting = meetings.setdefault(key, _Meeting(size))
        self._meetings, self._turns = meetings, itertools.cycle((0, 1))
        self._duplicates: Iterator[int] = itertools.count()

    def duplicate(self) -> Self:
        """The group once more, with messages of its own: the n-th duplicates of all threads belong together."""
        key = (*self._key, next(self._duplicates))
        return type(self)(self.rank, self.size, self._timeout, self._meetings, key)

    def all_gather(self, values: np.ndarray) -> np.ndarray:
        """Raises: SyncError if the others do not come in time, or bring arrays of other lengths."""
        self.check_process()
        places = self._meeting.places[next(self._turns)]
        places[self.rank] = np.array(values, np.float64)
        try:
            self._meeting.barrier.wait(self._timeout)
        except threading.BrokenBarrierError:
            raise SyncError(f"not all {self.size} threads of the group came within {self._timeout} s") from None
        lengths = [place.size for place in places]
        if len(set(lengths)) > 1:
            raise SyncError(f"the threads of the group brought arrays of the lengths {lengths}")
        return np.array(places)


def threads(n: int, timeout: float = 600.0) -> list[ThreadGroup]:
    """A group for each of `n` threads of this process, in the order of their ranks.

    Args:
        n: how many. timeout: seconds that a thread waits for the others.
    Raises: TypeError, ValueError unless n is a positive integer, and the timeout a number of seconds.
    """
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise TypeError(f"n must be a positive integer; received {n!r}")
    if n < 1:
        raise ValueError(f"n must be a positive integer; received {n}")
    timeout, meetings = check_timeout(timeout), dict[tuple[int, ...], _Meeting]()
    return [ThreadGroup(rank, int(n), timeout, meetings) for rank in range(n)]
