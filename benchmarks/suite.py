"""A run: every selected case in every mode by every contender that can, checked before it is timed.

The first half is what every run has, here and in benchmarks.cuda.suite; the second half is the run on the CPU.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import bounds, machine, startup, yardsticks
from benchmarks.cases import CASES, Case
from benchmarks.peers import OWN, CannotDo, Contender, Peer, load
from benchmarks.problem import Given, Problem, WrongResult, check
from benchmarks.timing import Effort, Sample, measure
from nbbn.runtime import last_level_cache

Report = dict[str, Any]
Progress = Callable[[str, int], None]
Rows = Callable[[Report], list[dict[str, Any]]]
Verify = Callable[[Mapping[str, Any]], float]

ONE_THREAD = f"{OWN}/preallocated, one thread"
PLAIN = f"{OWN}/plain"
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What to run. `peers` by name, nbbn not among them.

    The rest is for the CPU. startups: repetitions of the first call, 0 for none. patience: seconds that each case and
    mode may wait for other processes to leave the CPU alone. memory: where freed memory goes.
    """

    cases: list[Case]
    modes: tuple[str, ...]
    peers: Mapping[str, Any]
    effort: Effort
    startups: int = 0
    patience: float = 0.0
    memory: str = "the allocator's default"

    def modes_of(self, case: Case) -> list[str]:
        return [mode for mode in self.modes if mode in case.modes]

    @property
    def steps(self) -> int:
        """How many pairs of case and mode there are."""
        return sum(len(self.modes_of(case)) for case in self.cases)


def run_cases(
    plan: Plan,
    report: Report,
    prepare: Callable[[Case], Callable[[str], dict[str, Any]]],
    rows: Rows,
    output: Path,
    progress: Progress,
) -> Report:
    """Add the results of every case in every mode to the report.

    Args:
        prepare: makes the arrays of a case. Returns what times one mode with them, and returns its result.
        rows, output: see save. It is called after every case, so that what was measured is kept if the run is ended.
        progress: is called before each case and mode with its name and the number of those that are done.
    """
    results = report["results"]
    for case in plan.cases:
        time_mode = prepare(case)
        for mode in plan.modes_of(case):
            progress(f"{case.name} {mode}", len(results))
            results.append(time_mode(mode))
        del time_mode  # and with it the arrays, before those of the next case are made
        save(report, rows, output)
    return report


def save(report: Report, rows: Rows, output: Path) -> None:
    """Write the report with its bounds, which `rows` finds, as JSON."""
    report["bounds"] = rows(report)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


class Entrant(NamedTuple):
    """A contender whose result is right, within `error` (see problem.check)."""

    contender: Contender
    error: float


def admit(
    libraries: Mapping[str, Callable[[Any, str], Mapping[str, Contender]]],
    problem: Given,
    mode: str,
    verify: Verify,
    excused: tuple[type[Exception], ...] = (CannotDo, WrongResult),
) -> tuple[dict[str, Entrant], dict[str, str]]:
    """What to time by "library/form", and by the same names or that of a library, why the rest is not timed.

    Args:
        libraries: the functions `prepare` (see benchmarks.peers) by name.
        verify: the error of a contender's results. It raises WrongResult.
        excused: what a library may raise. It is left out then; anything else ends the run.

    Raises: WrongResult if nbbn is among them and would be left out with anything.
    """
    entrants, left_out = {}, {}
    for name, prepare in libraries.items():
        try:
            forms = prepare(problem, mode)
        except excused as error:
            forms, left_out[name] = {}, _reason(error)
        for form, contender in forms.items():
            try:
                entrants[f"{name}/{form}"] = Entrant(contender, verify(contender.read(contender.call())))
            except excused as error:
                left_out[f"{name}/{form}"] = _reason(error)
    if OWN in libraries and left_out:
        raise WrongResult(f"{problem.case.name} {mode}: {left_out}")
    return entrants, left_out


def _reason(error: Exception) -> str:
    """What stands in the report's table."""
    kind = {WrongResult: "wrong result: ", CannotDo: ""}.get(type(error), f"{type(error).__name__}: ")
    lines = str(error).strip().splitlines()
    return kind + (lines[0][:200].replace("|", "/") if lines else "")


def describe(
    case: Case,
    mode: str,
    least_bytes: int,
    limit: float,
    samples: Mapping[str, Sample],
    entrants: Mapping[str, Entrant],
) -> dict[str, Any]:
    """What every result has. limit: the seconds that moving `least_bytes` takes at the speed of a copy."""
    return {
        "case": case.name,
        "mode": mode,
        "shape": case.shape,
        "axis": case.kept,
        "dtype": case.dtype,
        "bytes": case.bytes,
        "least_bytes": least_bytes,
        "limit": limit,
        "contenders": {
            name: sample._asdict() | ({"error": entrants[name].error} if name in entrants else {})
            for name, sample in samples.items()
        },
    }


# -- on the CPU --------------------------------------------------------------------------------------------------------


def run(plan: Plan, output: Path, progress: Progress = lambda name, done: None) -> Report:
    """Measure, and write the report as JSON after every case. progress: see run_cases."""
    report: Report = {
        "machine": machine.describe({name: peer.version() for name, peer in plan.peers.items()}),
        "effort": vars(plan.effort),
        "memory": plan.memory,
        "results": [],
        "startup": {},
    }
    if plan.startups:
        progress("first calls", 0)
        report["startup"] = startup.medians(startup.measure(plan.startups, plan.patience))

    def prepare(case: Case) -> Callable[[str], dict[str, Any]]:
        problem, plain = Problem(case), None if case.plain is None else Problem(CASES[case.plain])
        return lambda mode: _time_mode(problem, plain, mode, plan)

    return run_cases(plan, report, prepare, bounds.rows, output, progress)


def _time_mode(problem: Problem, plain: Problem | None, mode: str, plan: Plan) -> dict[str, Any]:
    case, cache = problem.case, last_level_cache()
    entrants, left_out = _enter(problem, plain, mode, plan.peers, cache)
    calls = {name: e.contender.call for name, e in entrants.items()} | yardsticks.prepare(problem)
    samples, others = machine.in_quiet(partial(measure, calls, plan.effort), plan.patience)
    copies = {name: s.median for name, s in samples.items() if name in yardsticks.NAMES}
    least = case.least_bytes(mode, cache)
    limit, copy = yardsticks.limit(copies, least, case.bytes)
    result = describe(case, mode, least, limit, samples, entrants)
    return result | {"limit_from": copy, "others": others, "left_out": left_out}


def _enter(
    problem: Problem, plain: Problem | None, mode: str, peers: Mapping[str, Peer], cache: int
) -> tuple[dict[str, Entrant], dict[str, str]]:
    """What to time, and why the rest is not: see admit."""
    verify, own = _verify(problem, mode), {OWN: load(OWN).prepare}
    entrants, _ = admit(own, problem, mode, verify)
    if not MEGABYTE <= problem.case.bytes <= cache // 2:
        entrants.pop(ONE_THREAD, None)
    if plain is not None:
        entrants[PLAIN] = admit(own, plain, mode, _verify(plain, mode))[0][f"{OWN}/preallocated"]
    others, left_out = admit({name: peer.prepare for name, peer in peers.items()}, problem, mode, verify)
    return entrants | others, left_out


def _verify(problem: Problem, mode: str) -> Verify:
    return partial(check, expected=problem.expected(mode), case=problem.case)
