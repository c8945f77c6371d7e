"""Who is timed: nbbn and its peers, one module each, behind one face.

A module has `version()`, and `prepare(problem, mode)` with a Contender for every form in which it can do the mode:
names that begin with "ordinary" allocate their results, as a call without further arguments does; those that begin with
"preallocated" write to memory that is given, or as near to it as the library comes.

Raises: CannotDo from `prepare`, with the reason; ImportError from `version` where the library is not installed.
"""

import importlib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple, Protocol

from benchmarks.problem import Problem

PEERS = ("torch", "jax", "onnxruntime", "tensorflow")
OWN = "nbbn"


class CannotDo(Exception):
    """A library has no such operation; the message says what is missing."""


class Contender(NamedTuple):
    """call: one timed call, done when it returns.

    read: from what the call returned to the results by name (see Problem.expected), as arrays in the case's layout.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Mapping[str, Any]]


class Peer(Protocol):
    def version(self) -> str: ...

    def prepare(self, problem: Problem, mode: str) -> dict[str, Contender]: ...


def load(name: str) -> Peer:
    """Raises: ValueError for a name that is no peer's; ImportError if the library is not installed."""
    if name not in (OWN, *PEERS):
        near = get_close_matches(name, PEERS)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(PEERS)}"
        raise ValueError(f"no peer is called {name!r}; {hint}")
    peer: Any = importlib.import_module(f"{__name__}.{name}")
    peer.version()
    return peer  # type: ignore[no-any-return]


def plain_only(problem: Problem, library: str) -> None:
    """Raises: CannotDo for more than one feature axis and for nbbn's options."""
    case = problem.case
    if len(case.kept) > 1:
        raise CannotDo(f"{library} normalizes over one channel axis, not {list(case.kept)}")
    if case.options:
        raise CannotDo(f"{library} has no {next(iter(case.options))}")
