"""A run: every selected case in every mode by every contender that can, checked before it is timed."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import bounds, machine, startup, yardsticks
from benchmarks.cases import CASES, Case
from benchmarks.peers import OWN, PEERS, CannotDo, Peer, load
from benchmarks.problem import Problem, WrongResult, check
from benchmarks.timing import Call, Effort, Sample, measure
from nbbn.runtime import last_level_cache

Progress = Callable[[str, int], None]

ONE_THREAD = f"{OWN}/preallocated, one thread"
PLAIN = f"{OWN}/plain"
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What to run. `peers` by name, nbbn not among them; `startups`: repetitions of the first call, 0 for none.

    patience: seconds that each case and mode may wait for other processes to leave the CPU alone.
    """

    cases: list[Case]
    modes: tuple[str, ...]
    peers: Mapping[str, Peer]
    effort: Effort
    startups: int = 0
    patience: float = 0.0
    memory: str = "the allocator's default"

    @property
    def steps(self) -> int:
        """How many pairs of case and mode there are."""
        return sum(m in c.modes for c in self.cases for m in self.modes)


def find_peers(names: Iterable[str] | None) -> dict[str, Peer]:
    """The peers of these names, or of those that are installed.

    Raises: ValueError for an unknown name; ImportError for one that was asked for and is not installed.
    """
    if names is not None:
        return {name: load(name) for name in names}
    found = {}
    for name in PEERS:
        try:
            found[name] = load(name)
        except ImportError:
            continue
    return found


def run(plan: Plan, output: Path, progress: Progress = lambda name, done: None) -> dict[str, Any]:
    """Measure, and write the report as JSON after every case, so that what was measured is kept if the run is ended.

    progress: called before each case and mode with its name and the number of those that are done.
    """
    report: dict[str, Any] = {
        "machine": machine.describe({name: peer.version() for name, peer in plan.peers.items()}),
        "effort": vars(plan.effort),
        "memory": plan.memory,
        "results": [],
        "startup": {},
    }
    if plan.startups:
        progress("first calls", 0)
        report["startup"] = startup.medians(startup.measure(plan.startups, plan.patience))
    for case in plan.cases:
        _case(case, plan, report["results"], progress)
        save(report, output)
    return report


def _case(case: Case, plan: Plan, results: list[dict[str, Any]], progress: Progress) -> None:
    """Append the results of each mode. The arrays of one case are gone before those of the next are made."""
    problem = Problem(case)
    plain = None if case.plain is None else Problem(CASES[case.plain])
    for mode in (m for m in plan.modes if m in case.modes):
        progress(f"{case.name} {mode}", len(results))
        results.append(_mode(problem, plain, mode, plan))


def save(report: dict[str, Any], output: Path) -> None:
    report["bounds"] = bounds.rows(report)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _mode(problem: Problem, plain: Problem | None, mode: str, plan: Plan) -> dict[str, Any]:
    case, cache = problem.case, last_level_cache()
    entrants, left_out = _enter(problem, plain, mode, plan.peers, cache)
    calls = {name: e.call for name, e in entrants.items()} | yardsticks.prepare(problem)
    samples, others = _measure_in_quiet(calls, plan)
    copies = {name: s.median for name, s in samples.items() if name in yardsticks.NAMES}
    least = case.least_bytes(mode, cache)
    seconds, copy = yardsticks.limit(copies, least, case.bytes)
    return {
        "case": case.name,
        "mode": mode,
        "shape": case.shape,
        "axis": case.kept,
        "dtype": case.dtype,
        "bytes": case.bytes,
        "least_bytes": least,
        "limit": seconds,
        "limit_from": copy,
        "others": others,
        "contenders": {
            name: sample._asdict() | ({"error": entrants[name].error} if name in entrants else {})
            for name, sample in samples.items()
        },
        "left_out": left_out,
    }


def _measure_in_quiet(calls: Mapping[str, Call], plan: Plan) -> tuple[dict[str, Sample], float | None]:
    """Times, and the share of the CPU that other processes used meanwhile; measured again while patience lasts."""
    patience = plan.patience
    while True:
        patience -= machine.wait_until_quiet(patience)
        others = machine.Others()
        start = time.monotonic()
        samples = measure(calls, plan.effort)
        share = others.share()
        patience -= time.monotonic() - start
        if share is None or share <= machine.QUIET or patience <= 0:
            return samples, share


class Entrant(NamedTuple):
    """A contender whose result is right, within `error` (see problem.check)."""

    call: Call
    error: float


def _enter(
    problem: Problem, plain: Problem | None, mode: str, peers: Mapping[str, Peer], cache: int
) -> tuple[dict[str, Entrant], dict[str, str]]:
    """What to time by "library/form", and by the same names or that of the library, why the rest is not.

    Raises: WrongResult if nbbn's is.
    """
    expected = problem.expected(mode)
    entrants, left_out = admit(load(OWN), OWN, problem, mode, expected)
    if left_out.keys() - {OWN}:
        raise WrongResult(f"{problem.case.name} {mode}: {left_out}")
    if not MEGABYTE <= problem.case.bytes <= cache // 2:
        entrants.pop(ONE_THREAD, None)
    if plain is not None and entrants:
        forms, _ = admit(load(OWN), OWN, plain, mode, plain.expected(mode))
        entrants[PLAIN] = forms.get(f"{OWN}/preallocated", forms[f"{OWN}/ordinary"])
    for name, peer in peers.items():
        admitted, reasons = admit(peer, name, problem, mode, expected)
        entrants |= admitted
        left_out |= reasons
    return entrants, left_out


def admit(
    peer: Peer, name: str, problem: Problem, mode: str, expected: Mapping[str, np.ndarray]
) -> tuple[dict[str, Entrant], dict[str, str]]:
    """The forms whose first result is right, and the reasons why others, or the whole peer, are left out."""
    try:
        forms = peer.prepare(problem, mode)
    except CannotDo as reason:
        return {}, {name: str(reason)}
    entrants, left_out = {}, {}
    for form, contender in forms.items():
        try:
            error = check(contender.read(contender.call()), expected, problem.case)
        except WrongResult as fault:
            left_out[f"{name}/{form}"] = f"wrong result: {fault}"
            continue
        entrants[f"{name}/{form}"] = Entrant(contender.call, error)
    return entrants, left_out
