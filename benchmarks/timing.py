"""Interleaved timing: every contender has its turn in every round, so that what disturbs one disturbs all."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

Call = Callable[[], Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds until both `rounds` and `seconds` are reached.

    lead_in: seconds of untimed calls before each timed one. Thread pools (libgomp's, ONNX Runtime's) spin for some
    milliseconds after their last work and take a core from whoever is next; these calls outwait that, warm up the
    contender's own pool, and leave in the caches what a program that repeats the call would find there.
    sample: seconds that one timed sample should take at least; small calls are repeated within it.
    """

    rounds: int = 9
    seconds: float = 2.0
    lead_in: float = 0.01
    sample: float = 0.002


QUICK = Effort(rounds=3, seconds=0.0, lead_in=0.002, sample=0.0005)


class Sample(NamedTuple):
    """Seconds per call: median and quartiles over `rounds` samples of `calls` calls each."""

    median: float
    lower: float
    upper: float
    rounds: int
    calls: int


def measure(contenders: Mapping[str, Call], effort: Effort) -> dict[str, Sample]:
    """Time each contender."""
    batches = {name: _batch(call, effort) for name, call in contenders.items()}

    def one_round(names: Iterable[str]) -> dict[str, float]:
        return {name: _turn(contenders[name], batches[name], effort.lead_in) for name in names}

    times = interleave(contenders, effort, one_round)
    return {name: summary(times[name], batches[name]) for name in contenders}


def interleave(
    contenders: Iterable[str], effort: Effort, one_round: Callable[[list[str]], Mapping[str, T]]
) -> dict[str, list[T]]:
    """The seconds of each contender in every round. The order rotates, so that nobody always follows the same one.

    one_round: gives everybody a turn, in this order. Returns the seconds, or what else is measured.
    """
    names = list(contenders)
    times: dict[str, list[T]] = {name: [] for name in names}
    start = time.perf_counter()
    with _no_collection():
        while len(times[names[-1]]) < effort.rounds or time.perf_counter() - start < effort.seconds:
            for name, seconds in one_round(names).items():
                times[name].append(seconds)
            names.append(names.pop(0))
    return times


def _batch(call: Call, effort: Effort) -> int:
    """How many calls make a sample, after the first ones, in which libraries compile and allocate."""
    call()
    call()
    return max(1, math.ceil(effort.sample / max(_turn(call, 1, 0.0), 1e-9)))


def _turn(call: Call, calls: int, lead_in: float) -> float:
    """Seconds per call, after a lead-in."""
    clock = time.perf_counter_ns
    _lead_in(call, lead_in)
    repeat = range(calls)
    start = clock()
    for _ in repeat:
        call()
    return (clock() - start) * 1e-9 / calls


def burst(call: Call, effort: Effort) -> float:
    """The median seconds of single calls during one sample, of three at least, after a lead-in.

    The clock costs each of them some 50 ns; what interrupts one costs nothing.
    """
    clock = time.perf_counter_ns

    def timed() -> int:
        start = clock()
        call()
        return clock() - start

    return statistics.median(repeated(timed, effort)) * 1e-9


def repeated(call: Callable[[], T], effort: Effort) -> list[T]:
    """What the calls during one sample return, three at least, after a lead-in."""
    clock = time.perf_counter_ns
    _lead_in(call, effort.lead_in)
    found: list[T] = []
    until = clock() + effort.sample * 1e9
    while len(found) < 3 or clock() < until:
        found.append(call())
    return found


def _lead_in(call: Call, seconds: float) -> None:
    clock = time.perf_counter_ns
    until = clock() + seconds * 1e9
    call()
    while clock() < until:
        call()


def summary(times: list[float], calls: int) -> Sample:
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Sample(median, lower, upper, len(times), calls)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
