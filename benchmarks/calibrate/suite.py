"""Each threshold with every candidate in its place, against what it is now, in the same rounds."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import nbbn
from benchmarks import machine, suite
from benchmarks.calibrate.points import DTYPE, READER, SUBJECTS, Subject, draw, present
from benchmarks.cases import ITEM_SIZES
from benchmarks.peers import nbbn as own
from benchmarks.problem import Problem, check
from benchmarks.suite import Progress, Report
from benchmarks.timing import QUICK, Call, Effort, burst, interleave
from nbbn.core.layout import Sizes
from nbbn.engine.cpu.schedule import Schedule, Thresholds, choose
from nbbn.runtime import start_pool

EFFORT = Effort(rounds=7, seconds=0.0, lead_in=0.003, sample=0.003)
# Of each mode: its step, and the arrays of the input's size.
STEPS = {"inference": ("infer", 2), "training": ("train", 2), "backward": ("backward", 3)}


@dataclass(frozen=True)
class Plan:
    """patience: seconds that each measurement may wait for other processes to leave the CPU alone."""

    subjects: Mapping[str, Subject]
    seed: int
    quick: bool = False
    effort: Effort = EFFORT
    patience: float = 0.0
    memory: str = suite.Plan.memory

    def shapes(self, subject: Subject) -> int:
        return max(2, subject.shapes // 4) if self.quick else subject.shapes

    @property
    def steps(self) -> int:
        return sum(self.shapes(s) * len(s.modes) for s in self.subjects.values())


def plan(names: list[str], seed: int, quick: bool = False, patience: float = 0.0) -> Plan:
    """names: of thresholds, none for all. Raises: ValueError for one that is not measured."""
    for name in names:
        if name not in SUBJECTS:
            raise ValueError(f"no threshold is called {name!r}; there are: {', '.join(SUBJECTS)}")
    subjects = {name: s for name, s in SUBJECTS.items() if not names or name in names}
    return Plan(subjects, seed, quick, QUICK if quick else EFFORT, patience)


def run(plan: Plan, progress: Progress = lambda name, done: None) -> Report:
    """Measure. progress: is called before each measurement with its name and the number of those that are done.

    Raises: WrongResult for a candidate that changes a result.
    """
    start_pool()  # what layer there is decides what is measured
    results: list[dict[str, Any]] = []
    thresholds = {name: {"present": present(name), "candidates": s.candidates} for name, s in plan.subjects.items()}
    for name, subject in plan.subjects.items():
        for case in draw(name, subject, plan.shapes(subject), plan.seed):
            problem = Problem(case, plan.seed)
            for mode in subject.modes:
                progress(f"{name} {'x'.join(map(str, case.shape))} {mode}", len(results))
                found = measure(problem, mode, name, subject.candidates, plan)
                results.append({"threshold": name, "mode": mode, "shape": case.shape, **found})
    facts = {"machine": machine.describe({}), "seed": plan.seed, "memory": plan.memory}
    return facts | {"thresholds": thresholds, "results": results}


def measure(problem: Problem, mode: str, name: str, candidates: tuple[float, ...], plan: Plan) -> dict[str, Any]:
    """ratios: of each candidate's time to that of what the threshold is now, where it changes the schedule at all;
    others: what share of the CPU other processes had."""
    now, mode, reader = present(name), mode.removesuffix(READER), mode.endswith(READER)
    view, ways = nbbn.explain(own.layer_for(problem), problem.x).view, dict[Schedule, list[float]]()
    for value in (now, *candidates):
        ways.setdefault(schedule(view, mode, {name: value}), []).append(value)
    if len(ways) == 1:
        return {"ratios": {}, "others": None}
    calls = _calls(problem, mode, {str(values[0]): {name: values[0]} for values in ways.values()}, reader)
    times, others = machine.in_quiet(partial(_race, calls, plan.effort), plan.patience)
    (_, *changed), base = ways.values(), times[str(now)]
    return {"ratios": {v: times[str(values[0])] / base for values in changed for v in values}, "others": others}


def schedule(view: Sizes, mode: str, thresholds: Mapping[str, Any]) -> Schedule:
    """How nbbn would run the mode, with these thresholds. Candidates that lead to the same are timed once."""
    step, arrays = STEPS[mode]
    return choose(step, view, 1, 1, ITEM_SIZES[DTYPE], arrays, True, True, Thresholds(**thresholds))


def _calls(problem: Problem, mode: str, forced: Mapping[str, Mapping[str, Any]], reader: bool) -> dict[str, Call]:
    """A call for each choice of thresholds, checked against the first one's result."""
    out, expected = np.empty_like(problem.x), None
    calls: dict[str, Call] = {}
    for key, thresholds in forced.items():
        contender = own.contender(problem, own.layer_for(problem, thresholds=thresholds), mode, out)
        found = contender.read(contender.call())
        if expected is None:
            expected = {name: np.array(value, np.float64) for name, value in found.items()}
        else:
            check(found, expected, problem.case)
        calls[key] = partial(_with_read, contender.call, out) if reader else contender.call
    return calls


def _with_read(call: Call, out: np.ndarray) -> None:
    """Of NumPy's reductions the maximum is as fast as the memory."""
    call()
    np.maximum.reduce(out, axis=None)


def _race(calls: Mapping[str, Call], effort: Effort) -> dict[str, float]:
    """The seconds of one call: the median of a burst, of the best round."""
    times = interleave(calls, effort, lambda names: {name: burst(calls[name], effort) for name in names})
    return {name: min(found) for name, found in times.items()}
