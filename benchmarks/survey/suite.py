"""A survey: nbbn with its results given against every form of every peer, at points that a seed draws."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import machine
from benchmarks.cases import MODES, Case
from benchmarks.peers import OWN, Contender, nbbn
from benchmarks.problem import Problem, check
from benchmarks.suite import PLAIN, Entrant, Plan, Progress, Report, admit, run_cases
from benchmarks.survey.bounds import rows
from benchmarks.survey.points import OPTIONS, READ, SURVEY_MODES, draw, group, layout, plain
from benchmarks.timing import Call, Effort, burst, interleave

GIVEN = f"{OWN}/preallocated"
EFFORT = Effort(rounds=7, seconds=0.0, lead_in=0.005, sample=0.003)
HOPELESS = 3.0  # a form that takes so many times as long as the fastest peer, in the first round, is not timed again


@dataclass(frozen=True)
class Survey(Plan):
    """threads: of every contender, None for what each takes by default."""

    seed: int = 0
    threads: int | None = None


def plan(points: int, seed: int, peers: Mapping[str, Any], effort: Effort = EFFORT, **more: Any) -> Survey:
    """Of so many points of this seed. more: of Survey."""
    return Survey(draw(points, seed), SURVEY_MODES, peers, effort, seed=seed, **more)


def run(plan: Survey, output: Path, progress: Progress = lambda name, done: None) -> Report:
    """Measure, and write the report as JSON after every point. progress: see run_cases.

    Raises: WrongResult for one of nbbn's.
    """
    report: Report = {
        "machine": machine.describe({name: peer.version() for name, peer in plan.peers.items()}),
        "seed": plan.seed,
        "points": len(plan.cases),
        "asked_threads": plan.threads,
        "effort": vars(plan.effort),
        "memory": plan.memory,
        "results": [],
    }
    with _imported_is_no_garbage():
        return run_cases(plan, report, partial(_prepare, plan), rows, output, progress)


@contextmanager
def _imported_is_no_garbage() -> Iterator[None]:
    """Inside, collections pass over what there is now: going through all of TensorFlow takes 0.4 s per measurement."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Field(NamedTuple):
    """Whom to time, and why the rest is not."""

    entrants: dict[str, Entrant]
    left_out: dict[str, str]


def _prepare(plan: Survey, case: Case) -> Callable[[str], dict[str, Any]]:
    problem = Problem(case, plan.seed)
    rival = Problem(plain(case), plan.seed) if group(case) == OPTIONS else None

    @lru_cache(maxsize=1)  # the read comes right after the inference that it is added to
    def enter(mode: str) -> Field:
        return _enter(problem, mode, plan.peers) if rival is None else _enter_plain(problem, rival, mode)

    def time_mode(mode: str) -> dict[str, Any]:
        entrants, left_out = enter(mode if mode in MODES else "inference")
        calls = {name: _with_read(e.contender) if mode == READ else e.contender.call for name, e in entrants.items()}
        times, others = machine.in_quiet(partial(_race, calls, plan.effort), plan.patience)
        found = {name: {"seconds": t, "error": entrants[name].error} for name, t in times.items()}
        return _describe(case, mode) | {"contenders": found, "others": others, "left_out": left_out}

    return time_mode


def _describe(case: Case, mode: str) -> dict[str, Any]:
    return {
        "case": case.name,
        "group": group(case),
        "layout": layout(case),
        "mode": mode,
        "shape": case.shape,
        "axis": case.kept,
        "dtype": case.dtype,
        "options": case.options,
        "fused": case.fused,
        "bytes": case.bytes,
    }


def _enter(problem: Problem, mode: str, peers: Mapping[str, Any]) -> Field:
    verify = partial(check, expected=problem.expected(mode), case=problem.case)
    own, _ = admit({OWN: _given}, problem, mode, verify)
    others, left_out = admit({name: peer.prepare for name, peer in peers.items()}, problem, mode, verify)
    return Field(own | others, left_out)


def _enter_plain(problem: Problem, rival: Problem, mode: str) -> Field:
    """nbbn with an option, and without."""
    own, without = (_enter(p, mode, {}).entrants[GIVEN] for p in (problem, rival))
    return Field({GIVEN: own, PLAIN: without}, {})


def _given(problem: Problem, mode: str) -> dict[str, Contender]:
    """nbbn with `out`."""
    out = np.empty_like(problem.x)
    return {"preallocated": nbbn.contender(problem, nbbn.layer_for(problem), mode, out)}


def _race(calls: Mapping[str, Call], effort: Effort) -> dict[str, float]:
    """The seconds of one call: the median of a burst, of the best round."""

    def one_round(names: Any) -> dict[str, float]:
        return {name: burst(calls[name], effort) for name in names}

    best = one_round(calls)
    limit = HOPELESS * min((t for name, t in best.items() if not _own(name)), default=0.0)
    stay = [name for name, t in best.items() if _own(name) or t <= limit]
    times = interleave(stay, replace(effort, rounds=effort.rounds - 1), one_round)
    return best | {name: min(best[name], *found) for name, found in times.items()}


def _own(name: str) -> bool:
    return name.partition("/")[0] == OWN


def _with_read(contender: Contender) -> Call:
    """The call, and a read of its whole result by NumPy, as a program does that goes on with it.

    Of NumPy's reductions the maximum is as fast as the memory. Where a form always writes to the same memory, its array
    is made once: what the program would do, too.
    """
    call, look = contender.call, contender.read
    read = np.maximum.reduce

    def array() -> np.ndarray:
        return np.asarray(look(call())["y"])

    first, second = array(), array()  # both alive: new memory has another address
    if first.ctypes.data != second.ctypes.data:
        return lambda: read(array(), axis=None)

    def call_and_read() -> Any:
        call()
        return read(first, axis=None)

    return call_and_read
