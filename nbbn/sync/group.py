"""Who shares the statistics: a group of ranks, which only has to gather small arrays."""

import math
import os
from typing import Any, Protocol

import numpy as np

from nbbn.core.options import check_number


class SyncError(RuntimeError):
    """A training call, or a pullback, that the ranks of a group could not make together. It is raised on all of them,
    and says what each rank sent. Every layer is as it was before the call."""


class Group(Protocol):
    """What a group needs. rank: 0 to size - 1. Any object with these three will do.

    One that also has `duplicate()`, which returns a group of the same ranks whose messages meet no others, is asked for
    one by each layer when that is made. Layers of a group without it take turns. Where several groups send by one
    transport, each names it: its attribute `transport` is the same object in all, whose layers take turns together.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_gather(self, values: np.ndarray) -> np.ndarray:
        """The arrays (n,) float64 of all ranks, in their order: (size, n). All ranks bring the same n."""


def check_group(group: Any) -> None:
    """Raises: TypeError for what is no group."""
    missing = [name for name in ("rank", "size", "all_gather") if not hasattr(group, name)]
    if missing:
        raise TypeError(f"group must have rank, size and all_gather(); received {group!r} without {missing}")


def check_timeout(timeout: Any) -> float:
    """Raises: TypeError, ValueError for what is no number of seconds."""
    check_number("timeout", timeout, math.inf, "a finite number of seconds, at least 0")
    return float(timeout)


class OneProcess:
    """What belongs to the process that made it."""

    def __init__(self) -> None:
        self._process = os.getpid()

    def check_process(self) -> None:
        """Raises: SyncError in a forked child: its messages would be taken for its parent's."""
        if os.getpid() != self._process:
            raise SyncError(
                f"this group belongs to process {self._process}, and this is its forked child {os.getpid()}, which "
                "needs a group of its own"
            )
