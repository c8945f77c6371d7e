"""What a calibration has found, and what it would change."""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.calibrate.points import CROSSING
from benchmarks.machine import is_disturbed
from benchmarks.report import Report, machine_lines

GAIN, LOSS = 0.97, 1.10  # of a change: the geometric mean must be below the one, and no ratio above the other

Results = Sequence[dict[str, Any]]


class Candidate(NamedTuple):
    """A value, and its time over the present one's: in how many measurements it changes the schedule, and there the
    geometric mean, the best and the worst."""

    value: float
    measurements: int
    mean: float
    best: float
    worst: float

    @property
    def convinces(self) -> bool:
        return self.mean < GAIN and self.worst <= LOSS

    @property
    def saved(self) -> float:
        """In all measurements together, as a logarithm; a mean says nothing about in how many."""
        return -self.measurements * math.log(self.mean)


def candidates(values: Sequence[float], results: Results) -> list[Candidate]:
    """Those that change anything."""
    found = {value: [r["ratios"][value] for r in results if value in r["ratios"]] for value in sorted(values)}
    return [
        Candidate(value, len(ratios), statistics.geometric_mean(ratios), min(ratios), max(ratios))
        for value, ratios in found.items()
        if ratios
    ]


def change(found: Sequence[Candidate]) -> Candidate | None:
    """What is to take the place of the present value; None if that stays."""
    return max((c for c in found if c.convinces), key=lambda c: c.saved, default=None)


def tables(report: Report) -> str:
    """The machine, the candidates for each threshold, and what would be changed, in Markdown."""
    parts = [
        list(machine_lines(report)),
        [f"Seed {report['seed']}. Ratios: a candidate's time over the present one's."],
    ]
    for name, threshold in report["thresholds"].items():
        results = _of(name, report)
        heading = f"{_label(name, report)}, now {_number(threshold['present'])}{_disturbed(results)}:"
        parts.append([heading, "", *candidate_table(candidates(threshold["candidates"], results))])
        if name == CROSSING:
            parts.append(list(size_table(threshold["present"], results)))
    parts.append(list(decision_table(report)))
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _of(name: str, report: Report) -> Results:
    return [r for r in report["results"] if r["threshold"] == name]


def _disturbed(results: Results) -> str:
    count = sum(map(is_disturbed, results))
    return f" ({count} of {len(results)} measurements *)" if count else ""


def candidate_table(found: Sequence[Candidate]) -> Iterator[str]:
    if not found:
        yield "No candidate changes anything on this machine."
        return
    yield "| candidate | measurements | geometric mean | best | worst |"
    yield "|---|---|---|---|---|"
    for c in found:
        yield f"| {_number(c.value)} | {c.measurements} | {c.mean:.3f} | {c.best:.2f} | {c.worst:.2f} |"


def size_table(present: float, results: Results) -> Iterator[str]:
    """Serial against parallel by size, and the crossing."""
    octaves: dict[int, list[float]] = {}
    for r in sorted(results, key=_size):
        for other in list(r["ratios"].values())[:1]:  # all values on the other side of the size lead to the same call
            octaves.setdefault(1 << _size(r).bit_length() - 1, []).append(other if _size(r) >= present else 1 / other)
    if not octaves:
        return
    yield "| elements | measurements | serial / parallel |"
    yield "|---|---|---|"
    means = {size: statistics.geometric_mean(found) for size, found in octaves.items()}
    for size, mean in means.items():
        yield f"| from {_number(size)} | {len(octaves[size])} | {mean:.2f} |"
    last_slower = max((size for size, mean in means.items() if mean < 1), default=0)
    faster = [size for size in means if size > last_slower]
    yield ""
    yield f"Parallel is faster from {_number(faster[0])} elements on." if faster else "Serial is faster up to the end."


def _size(result: dict[str, Any]) -> int:
    return math.prod(result["shape"])


def decision_table(report: Report) -> Iterator[str]:
    """A change is made by hand, in the source."""
    yield "| threshold | now | would be |"
    yield "|---|---|---|"
    for name, threshold in report["thresholds"].items():
        results = _of(name, report)
        c = change(candidates(threshold["candidates"], results))
        would_be = "stays" if c is None else f"{_number(c.value)} ({c.mean:.3f}, worst {c.worst:.2f})"
        yield f"| {_label(name, report)} | {_number(threshold['present'])} | {would_be}{_disturbed(results)} |"


def _label(name: str, report: Report) -> str:
    """What it is called in schedule.py."""
    return f'PARALLEL["{report["machine"]["threading_layer"]}"]' if name == CROSSING else name


def _number(value: float) -> str:
    if math.isinf(value):
        return "never"
    return f"{int(value):,}" if value == int(value) and value >= 2 else f"{value:g}"
