"""What a face's module says of its measurements."""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.timing import Call


@dataclass(frozen=True)
class Case:
    """One measurement: calls that do the same work, by the name of who does it.

    reference: the name of the framework's own, which all others are compared with. bound: how long nbbn's may take at
    most, as a multiple of that; None where nothing was promised.
    """

    name: str
    contenders: Mapping[str, Call]
    reference: str
    bound: float | None = None
