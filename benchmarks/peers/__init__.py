"""Who is timed: nbbn and its peers, one module each, behind one face.

A module has `version()`, and `prepare(problem, mode)` with a Contender for every form in which it can do the mode:
names that begin with "ordinary" allocate their results, as a call without further arguments does; those that begin with
"preallocated" write to memory that is given, or as near to it as the library comes.

Raises: CannotDo from `prepare`, with the reason; ImportError from `version` where the library is not installed.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, NamedTuple, Protocol, TypeVar

from benchmarks.problem import Problem

PEERS = ("torch", "jax", "onnxruntime", "tensorflow")
OWN = "nbbn"
P = TypeVar("P")


class CannotDo(Exception):
    """A library has no such operation; the message says what is missing."""


class Contender(NamedTuple):
    """call: one timed call, done when it returns; on a GPU it may only have queued its work, unless it `waits`.

    read: from what the call returned to the results by name (see Problem.expected), as arrays in the case's layout.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Mapping[str, Any]]
    waits: bool = False


class Peer(Protocol):
    def version(self) -> str: ...

    def prepare(self, problem: Problem, mode: str) -> dict[str, Contender]: ...


def load(name: str) -> Peer:
    """Raises: ImportError if the library is not installed."""
    peer: Any = importlib.import_module(f"{__name__}.{name}")
    peer.version()
    return peer  # type: ignore[no-any-return]


def find(names: Iterable[str] | None, known: Iterable[str], load: Callable[[str], P]) -> dict[str, P]:
    """The peers of these names, or of those of `known` that are installed.

    Raises: ValueError for a name that is not known; ImportError for one that was asked for and is not installed.
    """
    known = list(known)
    if names is None:
        found = {}
        for name in known:
            with suppress(ImportError):
                found[name] = load(name)
        return found
    for name in (names := list(names)):
        if name not in known:
            near = get_close_matches(name, known)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
            raise ValueError(f"no peer is called {name!r}; {hint}")
    return {name: load(name) for name in names}


def plain_only(problem: Problem, library: str) -> None:
    """Raises: CannotDo for more than one feature axis and for nbbn's options."""
    case = problem.case
    if len(case.kept) > 1:
        raise CannotDo(f"{library} normalizes over one channel axis, not {list(case.kept)}")
    if case.options:
        raise CannotDo(f"{library} has no {next(iter(case.options))}")
