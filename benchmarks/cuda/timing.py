"""Timing on a GPU: by its own events, with nothing of the data in its L2 cache; and many calls by the host's clock.

An event's time has no waiting for the host in it as long as the host is ahead. It is: before every timed call the GPU
is given work that takes longer than launching does, by which the L2 cache is emptied.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from benchmarks.peers import Contender
from benchmarks.timing import Call, Effort, Sample, interleave, summary

# Between two timed calls: about 0.2 ms of the fastest GPU's time, and several times the largest L2 cache.
FLUSHED_BYTES = 1 << 29
CALLS = 200  # in a row, for the time of one by the host's clock


class Device(Protocol):
    """What is needed of a GPU."""

    def flush(self) -> None:
        """Queue work that leaves nothing of anybody's data in the L2 cache, and nothing there to be written back."""

    def event(self) -> Any:
        """Something with record(), and with elapsed_time(later one) in milliseconds."""

    def synchronize(self) -> None: ...


class Gpu:
    """The current device of PyTorch."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._written, self._read = (torch.zeros(FLUSHED_BYTES // 4, device="cuda") for _ in range(2))
        self._total = torch.zeros((), device="cuda")

    def flush(self) -> None:
        self._written.zero_()
        self._torch.sum(self._read, dim=0, out=self._total)  # lines that need not be written back take their place

    def event(self) -> Any:
        return self._torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()


def measure(contenders: Mapping[str, Contender], effort: Effort, device: Device) -> dict[str, Sample]:
    """Time each contender with a cold L2 cache."""
    for contender in contenders.values():
        contender.call()
        contender.call()

    def one_round(names: Iterable[str]) -> dict[str, float]:
        turns = {name: _turn(contenders[name], device) for name in names}
        device.synchronize()
        return {name: seconds() for name, seconds in turns.items()}

    return {name: summary(times, 1) for name, times in interleave(contenders, effort, one_round).items()}


def _turn(contender: Contender, device: Device) -> Callable[[], float]:
    """Queue one timed call. Returns what tells its seconds, after the device has been synchronized."""
    device.flush()
    if contender.waits:
        device.synchronize()
        begin = time.perf_counter()
        contender.call()
        passed = time.perf_counter() - begin
        return lambda: passed
    first, last = device.event(), device.event()
    first.record()
    contender.call()
    last.record()
    return lambda: float(first.elapsed_time(last)) * 1e-3


def measure_calls(contenders: Mapping[str, Contender], effort: Effort, device: Device) -> dict[str, Sample]:
    """Seconds per call by the host's clock, of many in a row: what a program of small calls waits for."""

    def seconds(call: Call) -> float:
        call()
        device.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        device.synchronize()
        return (time.perf_counter() - begin) / CALLS

    def one_round(names: Iterable[str]) -> dict[str, float]:
        return {name: seconds(contenders[name].call) for name in names}

    times = interleave(contenders, replace(effort, seconds=0.0), one_round)
    return {name: summary(times[name], CALLS) for name in contenders}
