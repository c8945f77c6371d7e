"""Timing on a GPU: by its own events, with nothing of the data in its L2 cache; and many calls by the host's clock.

An event's time has no waiting for the host in it as long as the host is ahead. It is: before every timed call the GPU
is given work that takes longer than launching does, by which the L2 cache is emptied.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from benchmarks.timing import Call, Effort, Sample, no_collection, summary

# Between two timed calls: about 0.2 ms of the fastest GPU's time, and several times the largest L2 cache.
FLUSHED_BYTES = 1 << 29
CALLS = 200  # in a row, for the time of one by the host's clock


class Contender(NamedTuple):
    """call: queues its work on the current stream; it is done when it returns where `waits`.

    read: from what the call returned to the results by name (see Problem.expected), as tensors in the case's layout.
    """

    call: Call
    read: Callable[[Any], Mapping[str, Any]]
    waits: bool = False


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
    """Time each contender with a cold L2 cache. The order rotates, so that nobody always follows the same one."""
    names = list(contenders)
    for name in names:
        contenders[name].call()
        contenders[name].call()
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    with no_collection():
        while len(times[names[-1]]) < effort.rounds or time.perf_counter() - start < effort.seconds:
            turns = {name: _turn(contenders[name], device) for name in names}
            device.synchronize()
            for name, seconds in turns.items():
                times[name].append(seconds())
            names.append(names.pop(0))
    return {name: summary(times[name], 1) for name in contenders}


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
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    with no_collection():
        for _ in range(effort.rounds):
            for name in names:
                call = contenders[name].call
                call()
                device.synchronize()
                begin = time.perf_counter()
                for _ in range(CALLS):
                    call()
                device.synchronize()
                times[name].append((time.perf_counter() - begin) / CALLS)
            names.append(names.pop(0))
    return {name: summary(times[name], CALLS) for name in contenders}
