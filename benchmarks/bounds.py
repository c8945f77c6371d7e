"""The bounds that nbbn sets itself, as ratios within one run, and whether a report meets them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from benchmarks.cases import CASES, Case
from benchmarks.peers import OWN, PEERS

Result = dict[str, Any]
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Measured:
    """One case in one mode, with what the bounds ask of it."""

    result: Result
    cache: int
    cases: ClassVar[Mapping[str, Case]] = CASES

    @property
    def case(self) -> Case:
        return self.cases[self.result["case"]]

    @property
    def mode(self) -> str:
        return str(self.result["mode"])

    @property
    def large(self) -> bool:
        """One array fills the last-level cache."""
        return self.case.bytes >= self.cache

    def time(self, name: str, kind: str = "contenders") -> float | None:
        """The median of one contender, None if it did not take part. kind: which of the result's tables of times."""
        found = self.result[kind].get(name)
        return None if found is None else float(found["median"])

    def own(self) -> float | None:
        """nbbn with its results given, or where it cannot take them, without."""
        return self.time(f"{OWN}/preallocated") or self.time(f"{OWN}/ordinary")

    def fastest(self, *libraries: str) -> float | None:
        contenders = self.result["contenders"].items()
        times = [float(s["median"]) for n, s in contenders if n.partition("/")[0] in libraries and "plain" not in n]
        return min(times, default=None)


@dataclass(frozen=True)
class Bound:
    """ratio: of one case and mode; None where the bound does not speak of it. at_least: the bound is a lower one."""

    text: str
    limit: float
    ratio: Callable[[Any], float | None]
    at_least: bool = False

    def met(self, ratio: float) -> bool:
        return ratio >= self.limit if self.at_least else ratio <= self.limit


def quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _copyto(mode: str, channels_last: bool | None = None) -> Callable[[Measured], float | None]:
    """nbbn over numpy.copyto on large inputs. Options have bounds of their own, a residual moves more bytes."""

    def ratio(m: Measured) -> float | None:
        case = m.case
        applies = m.large and m.mode == mode and case.plain_batch_norm and not case.fused
        if not applies or channels_last not in (None, case.channels_last):
            return None
        return quotient(m.own(), m.time("yardstick/copyto"))

    return ratio


def _peers(m: Measured) -> float | None:
    return quotient(m.fastest(OWN), m.fastest(*PEERS))


def _pytorch(mode: str) -> Callable[[Measured], float | None]:
    def ratio(m: Measured) -> float | None:
        if m.mode != mode or m.case.bytes < 64 * MEGABYTE:
            return None
        return quotient(m.time("torch/ordinary"), m.time(f"{OWN}/ordinary"))

    return ratio


def _module(mode: str) -> Callable[[Measured], float | None]:
    def ratio(m: Measured) -> float | None:
        if m.mode != mode or m.case.name != "dense-32x64":
            return None
        return quotient(m.time(f"{OWN}/ordinary"), m.time("torch/ordinary, module"))

    return ratio


def _half(m: Measured) -> float | None:
    applies = m.mode == "inference" and m.case.dtype in ("float16", "bfloat16")
    return quotient(m.own(), m.time(f"{OWN}/plain")) if applies else None


def _options(m: Measured) -> float | None:
    return None if m.case.plain_batch_norm else quotient(m.own(), m.time(f"{OWN}/plain"))


def _threads(m: Measured) -> float | None:
    return quotient(m.time(f"{OWN}/preallocated, one thread"), m.own())


def _allocating(m: Measured) -> float | None:
    return quotient(m.time(f"{OWN}/ordinary"), m.time(f"{OWN}/preallocated")) if m.large else None


BOUNDS = (
    Bound("larger than the last-level cache, inference / copyto", 0.75, _copyto("inference")),
    Bound("… training, channels first / copyto", 0.90, _copyto("training", channels_last=False)),
    Bound("… training, channels last / copyto", 1.15, _copyto("training", channels_last=True)),
    Bound("… backward / copyto", 1.50, _copyto("backward")),
    Bound("every case / the fastest peer in its best form", 1.0, _peers),
    Bound("inputs of 64 MB and more, training: PyTorch's ordinary call / nbbn's", 5.0, _pytorch("training"), True),
    Bound("… inference", 4.0, _pytorch("inference"), True),
    Bound("(32, 64), inference / torch.nn.BatchNorm1d", 0.6, _module("inference")),
    Bound("… training", 0.5, _module("training")),
    Bound("16-bit inference / float32", 0.65, _half),
    Bound("ghost batches, renorm, axis=[1, 3] / plain", 1.25, _options),
    Bound("in the cache, 1 MB and more: one thread / all", 1.6, _threads, True),
    Bound("larger than the last-level cache, without out= / with", 1.1, _allocating),
)
# Seconds, the only bounds that are no ratios.
STARTUP = {"cold": 3.0, "warm": 0.8}


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bound for every case that it speaks of: bound, case, mode, ratio, limit, at_least, met."""
    cache = report["machine"]["last_level_cache"]
    found = evaluate(BOUNDS, [Measured(r, cache) for r in report["results"]])
    for shape, states in report["startup"].items():
        for state, seconds in states.items():
            b = Bound(f"first training call of a process, {state} cache, in s", STARTUP[state], lambda m: None)
            found.append(_as_dict(b, shape, "training", seconds))
    return found


def evaluate(bounds: Iterable[Bound], results: Iterable[Any]) -> list[dict[str, Any]]:
    """The rows of the results, each a Measured of this module or another's, that the bounds speak of."""
    results = list(results)
    pairs = ((b, m, b.ratio(m)) for b in bounds for m in results)
    return [_as_dict(b, m.case.name, m.mode, ratio) for b, m, ratio in pairs if ratio is not None]


def _as_dict(bound: Bound, case: str, mode: str, ratio: float) -> dict[str, Any]:
    return {
        "bound": bound.text,
        "case": case,
        "mode": mode,
        "ratio": ratio,
        "limit": bound.limit,
        "at_least": bound.at_least,
        "met": bound.met(ratio),
    }
