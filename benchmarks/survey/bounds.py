"""How far nbbn is ahead: shares, geometric means and the worst of many ratios, and the bounds set to them."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.cases import MODES
from benchmarks.peers import OWN, PEERS
from benchmarks.survey.points import FLOAT32, HALF, OPTIONS, READ

Result = dict[str, Any]
Ratios = list[float]


def seconds(result: Result, *libraries: str) -> tuple[float, str] | None:
    """Of the fastest form of these libraries, and its name; None if none of them took part."""
    times = [(s["seconds"], name) for name, s in result["contenders"].items() if name.partition("/")[0] in libraries]
    return min(times, default=None)


def rival(result: Result) -> tuple[float, str] | None:
    """Whom nbbn is compared with: the fastest peer or, for its options, its own plain layer."""
    if result["group"] == OPTIONS:
        return result["contenders"][f"{OWN}/plain"]["seconds"], f"{OWN}/plain"
    return seconds(result, *PEERS)


def own(result: Result) -> float:
    return float(result["contenders"][f"{OWN}/preallocated"]["seconds"])


def ratio(result: Result) -> float | None:
    """The rival's time over nbbn's: above 1 nbbn is ahead."""
    return _over_own(result, rival(result))


def ratio_of(library: str, result: Result) -> float | None:
    """The same of one library's fastest form."""
    return _over_own(result, seconds(result, library))


_over_torch = partial(ratio_of, "torch")


def _over_own(result: Result, other: tuple[float, str] | None) -> float | None:
    return None if other is None else other[0] / own(result)


def share_ahead(ratios: Ratios) -> float:
    return sum(r > 1 for r in ratios) / len(ratios)


@dataclass(frozen=True)
class Bound:
    """At least `limit` is wanted of what `value` makes of the ratios of the results that it speaks of."""

    text: str
    limit: float
    value: Callable[[Ratios], float]
    speaks_of: Callable[[Result], bool]
    ratio: Callable[[Result], float | None] = ratio

    def row(self, results: Iterable[Result]) -> dict[str, Any]:
        ratios = known(map(self.ratio, filter(self.speaks_of, results)))
        value = self.value(ratios) if ratios else None
        met = None if value is None else value >= self.limit
        return {"bound": self.text, "limit": self.limit, "measurements": len(ratios), "value": value, "met": met}


def known(ratios: Iterable[float | None]) -> Ratios:
    return [r for r in ratios if r is not None]


def _float32(*modes: str) -> Callable[[Result], bool]:
    return lambda result: result["group"] == FLOAT32 and result["mode"] in modes


BOUNDS = (
    Bound("float32, three modes: share ahead of the fastest peer", 0.95, share_ahead, _float32(*MODES)),
    Bound("… worst ratio", 0.85, min, _float32(*MODES)),
    *(
        Bound(f"float32, {mode}: geometric mean of the ratios", limit, statistics.geometric_mean, _float32(mode))
        for mode, limit in (("inference", 1.45), ("training", 2.6), ("backward", 1.45))
    ),
    Bound("16-bit: share ahead of PyTorch", 0.95, share_ahead, lambda r: r["group"] == HALF, _over_torch),
    Bound(f"{READ}: share ahead of PyTorch", 0.95, share_ahead, lambda r: r["mode"] == READ, _over_torch),
)


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bound: bound, limit, measurements, value, met; the last two None where nothing was measured."""
    return [bound.row(report["results"]) for bound in BOUNDS]
