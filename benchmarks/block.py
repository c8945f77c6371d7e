"""nbbn between PyTorch's convolutions: two libraries in one process, each with threads that want every core.

A block is convolution, batch norm, relu, convolution, batch norm, forward and backward. PyTorch runs all of it but the
batch norms; these are nbbn's, on the memory of the tensors, or PyTorch's own.
"""

import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

import nbbn
from benchmarks import machine
from benchmarks.problem import EPSILON, MOMENTUM, WrongResult
from benchmarks.suite import Plan as SuitePlan
from benchmarks.suite import Progress, Report
from benchmarks.timing import Effort, interleave, repeated
from nbbn.runtime import last_level_cache, start_pool

SHAPES = ((8, 64, 56, 56), (16, 128, 28, 28), (4, 256, 14, 14), (1, 64, 56, 56))
EFFORT = Effort(rounds=9, seconds=0.0, lead_in=0.02, sample=0.1)
QUICK = Effort(rounds=3, seconds=0.0, lead_in=0.01, sample=0.02)
TOLERANCE = 1e-3  # of a result, relative to its largest value: its sums are float32 in convolutions
OWN, TORCH = "nbbn", "torch"
WARM, COLD = "alone, warm", "alone, cold"


class Norm(Protocol):
    """A batch norm of tensors, in training; `backward` belongs to the last `forward`."""

    def forward(self, x: Any) -> Any: ...

    def backward(self, dy: Any) -> Any: ...


class OwnNorm:
    """nbbn's, with results given."""

    def __init__(self, torch: Any, shape: tuple[int, ...]) -> None:
        self._layer = nbbn.BatchNormalization(1, MOMENTUM, EPSILON)
        self._y, self._dx = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self._tensors = torch.from_numpy(self._y), torch.from_numpy(self._dx)

    def forward(self, x: Any) -> Any:
        _, self._pullback = self._layer.vjp(x.numpy(), training=True, out=self._y)
        return self._tensors[0]

    def backward(self, dy: Any) -> Any:
        self._pullback(dy.numpy(), out=self._dx)
        return self._tensors[1]


class TorchNorm:
    """The operators that torch.nn.functional.batch_norm and autograd end in, in their faster forms: with the output
    given, but not the gradient, which they would copy there."""

    def __init__(self, torch: Any, shape: tuple[int, ...]) -> None:
        self._forward, self._backward = torch.native_batch_norm, torch.ops.aten.native_batch_norm_backward
        channels = shape[1]
        self._numbers = [torch.ones(channels), torch.zeros(channels), torch.zeros(channels), torch.ones(channels)]
        self._results = torch.empty(shape), torch.empty(channels), torch.empty(channels)

    def forward(self, x: Any) -> Any:
        self._x = x
        self._forward(x, *self._numbers, True, 1 - MOMENTUM, EPSILON, out=self._results)
        return self._results[0]

    def backward(self, dy: Any) -> Any:
        gamma, _, mean, variance = self._numbers
        saved = (mean, variance, *self._results[1:])
        return self._backward(dy, self._x, gamma, *saved, True, EPSILON, [True] * 3)[0]


class Parts(NamedTuple):
    """Seconds of one pass, forward and backward: of all of it, of its batch norms and of its convolutions."""

    whole: float
    norms: float
    convolutions: float


class Block:
    """norm: makes the batch norms. The weights are the same in every block of a shape."""

    def __init__(self, torch: Any, shape: tuple[int, ...], norm: Callable[[Any, tuple[int, ...]], Norm]) -> None:
        rng, channels = np.random.default_rng(0), shape[1]
        self._relu, self._backward_relu = torch.relu, torch.ops.aten.threshold_backward
        self._convolution = partial(torch.conv2d, padding=1)
        self._backward_convolution = torch.ops.aten.convolution_backward
        scale = 1 / math.sqrt(9 * channels)
        self._x, self._dy, *self._weights = (
            torch.from_numpy(rng.normal(0, s, size).astype(np.float32))
            for s, size in ((1.0, shape), (1.0, shape), *((scale, (channels, channels, 3, 3)),) * 2)
        )
        self._norms = norm(torch, shape), norm(torch, shape)
        self._others = np.zeros(2 * last_level_cache() // 4, np.float32) + 1  # written: memory of its own
        self.given: list[Any] = []  # to the batch norms: two inputs, two gradients
        self.results: list[Any] = []

    def run(self) -> Parts:
        """One pass."""
        spent = {"norms": 0, "convolutions": 0}
        clock = time.perf_counter_ns

        def timed(kind: str, call: Callable[..., Any], *arguments: Any) -> Any:
            start = clock()
            found = call(*arguments)
            spent[kind] += clock() - start
            return found

        start = clock()
        (v, w), (first, second) = self._weights, self._norms
        a = timed("convolutions", self._convolution, self._x, v)
        r = self._relu(timed("norms", first.forward, a))
        b = timed("convolutions", self._convolution, r, w)
        y = timed("norms", second.forward, b)
        db = timed("norms", second.backward, self._dy)
        dr, dw = timed("convolutions", self._gradients, db, r, w)
        dz = self._backward_relu(dr, r, 0)
        da = timed("norms", first.backward, dz)
        dx, dv = timed("convolutions", self._gradients, da, self._x, v)
        whole = clock() - start
        self.given, self.results = [a, b, self._dy, dz], [y, dx, dv, dw]
        return Parts(*(1e-9 * t for t in (whole, *spent.values())))

    def _gradients(self, dy: Any, x: Any, weights: Any) -> tuple[Any, Any]:
        """Of a convolution's input and weights."""
        geometry = None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        dx, dw, _ = self._backward_convolution(dy, x, weights, *geometry, [True, True, False])
        return dx, dw

    def run_warm(self) -> Parts:
        """The batch norms of a pass, back to back, on what the last pass gave them."""
        return self._run_norms(lambda tensor: None)

    def run_cold(self) -> Parts:
        """The same, each as a convolution leaves the caches, but for its threads: others' memory has been read, and the
        tensor has just been written."""

        def leave(tensor: Any) -> None:
            array = tensor.numpy()
            kept = array.copy()
            self._others.max()
            np.copyto(array, kept)

        return self._run_norms(leave)

    def _run_norms(self, before: Callable[[Any], None]) -> Parts:
        (first, second), (a, b, dy, dz) = self._norms, self.given
        spent = 0
        for call, tensor in ((first.forward, a), (second.forward, b), (second.backward, dy), (first.backward, dz)):
            before(tensor)
            start = time.perf_counter_ns()
            call(tensor)
            spent += time.perf_counter_ns() - start
        return Parts(1e-9 * spent, 1e-9 * spent, 0.0)


@dataclass(frozen=True)
class Plan:
    """layer: Numba's, which must be there; None for any. patience: for a quiet CPU, per shape."""

    layer: str | None = None
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    effort: Effort = EFFORT
    patience: float = 0.0
    memory: str = SuitePlan.memory


def plan(layer: str | None, quick: bool, patience: float) -> Plan:
    """Raises: RuntimeError if there is no such threading layer; ImportError without PyTorch."""
    found = start_pool()
    if layer not in (None, found):
        hint = " (pip install nbbn[tbb])" if layer == "tbb" else ""
        raise RuntimeError(f"Numba cannot load the threading layer {layer!r} here{hint}")
    importlib.import_module("torch")
    return Plan(layer, effort=QUICK if quick else EFFORT, patience=patience)


def run(plan: Plan, progress: Progress = lambda name, done: None) -> Report:
    """Measure every shape. Raises: WrongResult where the blocks differ."""
    torch: Any = importlib.import_module("torch")
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for shape in plan.shapes:
            progress("x".join(map(str, shape)), len(results))
            results.append({"shape": shape, **measure(torch, shape, plan)})
    facts = machine.describe({"torch": torch.__version__})
    return {"machine": facts, "torch_threads": torch.get_num_threads(), "memory": plan.memory, "results": results}


def measure(torch: Any, shape: tuple[int, ...], plan: Plan) -> dict[str, Any]:
    own, other = Block(torch, shape, OwnNorm), Block(torch, shape, TorchNorm)
    own.run()
    other.run()
    for mine, right in zip(own.results, other.results, strict=True):
        if not (error := float((mine - right).abs().max() / right.abs().max())) <= TOLERANCE:
            raise WrongResult(f"block {shape}: a result differs from PyTorch's by {error:.2g} of its largest value")
    calls = {
        f"{name}{how}": call
        for name, of in ((OWN, own), (TORCH, other))
        for how, call in (("", of.run), (f", {WARM}", of.run_warm), (f", {COLD}", of.run_cold))
    }

    def one_round(names: list[str]) -> dict[str, Parts]:
        return {n: _medians(repeated(calls[n], plan.effort)) for n in names}

    times, others = machine.in_quiet(lambda: interleave(calls, plan.effort, one_round), plan.patience)
    return {"times": {name: _medians(found)._asdict() for name, found in times.items()}, "others": others}


def _medians(passes: list[Parts]) -> Parts:
    return Parts(*map(statistics.median, zip(*passes, strict=True)))


def tables(report: Report) -> str:
    """The machine, and the ratios of every shape, in Markdown."""
    return "\n".join((*_lines(report), "", *ratio_table(report))) + "\n"


def _lines(report: Report) -> Iterator[str]:
    m = report["machine"]
    torch = f"PyTorch {m['versions']['torch']}, {report['torch_threads']} threads"
    yield f"{m['cpu']}; threading layer {m['threading_layer']}, {m['threads']} threads; {torch}; float32."
    if any(map(machine.is_disturbed, report["results"])):
        yield f"* Other processes used more than {machine.QUIET:.0%} of the CPU."


def ratio_table(report: Report) -> Iterator[str]:
    """One row per shape. What is first in a heading is measured in a block, of nbbn where PyTorch's is not named.

    Alone and warm, calls find what they read in the caches; cold, they find there what a convolution leaves. So the
    first column is what the threads of another library cost, and the second one what the caches cost, too.
    """
    yield (
        "| shape | nbbn's calls / alone, cold | / alone, warm | PyTorch's calls / alone, cold | / alone, warm | "
        "convolutions / beside PyTorch's | block / PyTorch's | ms | PyTorch's ms |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for r in report["results"]:
        times = r["times"]
        own, other = times[OWN], times[TORCH]
        pairs = [(times[n]["norms"], times[f"{n}, {how}"]["norms"]) for n in (OWN, TORCH) for how in (COLD, WARM)]
        pairs += [(own[part], other[part]) for part in ("convolutions", "whole")]
        cells = [" x ".join(map(str, r["shape"])) + "*" * machine.is_disturbed(r)]
        cells += [f"{a / b:.2f}" for a, b in pairs] + [f"{1e3 * t['whole']:.3g}" for t in (own, other)]
        yield f"| {' | '.join(cells)} |"
