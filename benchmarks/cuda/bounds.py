"""The bounds that nbbn sets itself on a GPU, as ratios within one run. They are meant for a Hopper GPU."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from benchmarks import bounds
from benchmarks.bounds import Bound, quotient
from benchmarks.cases import Case
from benchmarks.cuda.cases import CASES
from benchmarks.peers import OWN

LARGE = 256 << 20
COPY = "yardstick/copy"


@dataclass(frozen=True)
class Measured(bounds.Measured):
    """pair: the same case's backward pass, which belongs to a training step."""

    pair: Self | None = None
    cases: ClassVar[Mapping[str, Case]] = CASES


def _of_copy(mode: str) -> Callable[[Measured], float | None]:
    """The share of the copy's bandwidth that the fewest bytes of a large case are moved with."""

    def ratio(m: Measured) -> float | None:
        return quotient(m.result["limit"], m.fastest(OWN)) if m.mode == mode and m.case.bytes >= LARGE else None

    return ratio


def _pytorch(m: Measured) -> float | None:
    return quotient(m.fastest("torch"), m.fastest(OWN))


def _both(m: Measured) -> float | None:
    """Training forward and backward together."""
    if m.mode != "training" or m.pair is None:
        return None
    times = [(step.fastest("torch"), step.fastest(OWN)) for step in (m, m.pair)]
    if any(t is None for pair in times for t in pair):
        return None
    return sum(t for t, _ in times) / sum(t for _, t in times)  # type: ignore[misc]


def _cached(m: Measured) -> float | None:
    """Over one read and one write, where all that is touched fits in L2 and is too much for the launch to decide."""
    applies = m.mode == "training" and m.case.bytes >= 1 << 20 and 2 * m.case.bytes <= m.cache
    return quotient(m.fastest(OWN), m.time(COPY)) if applies else None


def _call(m: Measured) -> float | None:
    if m.case.name != "dense-32x64" or m.mode == "backward":
        return None
    return quotient(m.time(f"{OWN}/ordinary", "calls"), m.time("torch/module", "calls"))


BOUNDS = (
    Bound("256 MiB and more: copy's time for the fewest bytes / inference", 0.9, _of_copy("inference"), True),
    Bound("… / training forward", 0.9, _of_copy("training"), True),
    Bound("… / backward", 0.9, _of_copy("backward"), True),
    Bound("the fastest of PyTorch's ways / nbbn", 1.0, _pytorch, True),
    Bound("… training forward and backward together", 1.2, _both, True),
    Bound("1 MiB and more that fit in L2: training forward / copy", 1.3, _cached),
    Bound("(32, 64), one of many calls in a row / torch.nn.BatchNorm1d", 2.0, _call),
)


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bound for every case that it speaks of: see benchmarks.bounds.rows."""
    results, cache = report["results"], report["machine"]["gpu"]["l2_cache"]
    backward = {r["case"]: Measured(r, cache) for r in results if r["mode"] == "backward"}
    return bounds.evaluate(BOUNDS, [Measured(r, cache, backward.get(r["case"])) for r in results])
