"""The stages on arrays of a GPU, one or two launches each, without waiting for any."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from nbbn.arrays import availability
from nbbn.arrays.device import DeviceArray, wrap
from nbbn.arrays.gpu import device_place
from nbbn.core.layout import Layout, Sizes
from nbbn.core.options import Options
from nbbn.engine.base import Copied, Engine, Force, Step, canonical_view
from nbbn.engine.cuda.launching import clear, launch, primary_context
from nbbn.engine.cuda.schedule import Schedule, Thresholds, choose
from nbbn.kernels.cuda import steps
from nbbn.kernels.cuda.blocks import Grid, Variant
from nbbn.kernels.cuda.memory import VECTOR_BYTES

_NOTHING = (0,) * 5  # the view of an array that is not there
_ALIGNMENT = VECTOR_BYTES  # of the parts of a call's scratch memory
# The launches of a step: the one that does everything, where a block has its channels for itself, and those that take
# turns elsewhere.
_LAUNCHES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "reduce": ((), ("reduce",)),
    "apply": ((), ("normalize",)),
    "reduce_gradient": ((), ("sum_gradient",)),
    "apply_gradient": ((), ("spread_gradient", "input_gradient")),
    "train": (("train",), ("train_reduce", "normalize")),
    "infer": ((), ("infer",)),
    "backward": (("backward",), ("backward_reduce", "input_gradient")),
    "frozen_backward": (("backward",), ("backward_reduce", "input_gradient")),
}
_WHOLE = ("train", "backward")  # launches in which a block has its channels for itself
_APPLYING = ("infer", "normalize", "input_gradient")
_COUNTING = ("reduce", "train_reduce", "sum_gradient", "backward_reduce")  # whose blocks ask which one is the last
Array = DeviceArray


@dataclass(frozen=True)
class Plan:
    """How one step runs on arrays of one shape, dtype and memory layout."""

    shape: Sizes
    strides: dict[str, Sizes]
    copied: Copied | None
    schedule: Schedule
    variant: Variant

    def __str__(self) -> str:
        s, v, (r0, k0, r1, k1) = self.schedule, self.variant, self.schedule.place(self.shape)
        loops = "statistics side by side" if s.rows else "values side by side"
        reduction = "by the block that applies" if s.one_launch else f"{s.reduce.chunks} chunks of each statistic"
        copied = "" if self.copied is None else f" (copied in the order of dimensions {self.copied.order})"
        sums = "float64" if v.sums == np.float64 else "float32, then float64"
        return "\n".join(
            (
                f"dtype         {v.dtype.name}; statistics {v.statistic.name}, sums in {sums}",
                f"view          R0={r0} K0={k0} R1={r1} K1={k1}{copied}",
                f"schedule      {loops}; {v.width} elements in one access; blocks of {s.block[0]}x{s.block[1]} threads",
                f"reduction     {reduction}",
            )
        )


class CudaEngine(Engine):
    """Raises: RuntimeError where there is no GPU; ValueError for a forced choice that a GPU does not have."""

    def __init__(self, options: Options, force: Force) -> None:
        availability.require("an array on a GPU")
        for choice in ("parallel", "schedule"):
            if getattr(force, choice) is not None:
                raise ValueError(f"{choice} cannot be forced on a GPU; received {getattr(force, choice)!r}")
        super().__init__(options, force)
        thresholds = dict(force.thresholds)
        self._sums = thresholds.pop("sums", None)  # the dtype of the sums of a few elements
        self._thresholds = Thresholds(**thresholds)
        self._hyper: dict[Any, Array] = {}

    def _key(self, step: Step) -> tuple[Any, ...]:
        x, there = step.x, [(name, a) for name, a in step.views.items() if a is not None]
        elements = VECTOR_BYTES // x.itemsize  # of one access, at most; of float32 beside float16 they are 32 bytes
        places = [(n, a.strides, a.address % (elements * a.itemsize)) for n, a in there]
        return x.dtype, step.state_dtype, x.device, *places

    def _new_plan(self, step: Step, in_place: bool) -> Plan:
        there: dict[str, Array] = {name: a for name, a in step.views.items() if a is not None}
        x, ((r0, k0, r1, k1), slices, strides, copied) = step.x, canonical_view(step.lay, there)
        view = (r0 // slices, slices * k0, r1, k1)
        places = [(a.address, strides[name], a.itemsize) for name, a in there.items()]
        one = self.force.one_pass if step.name in ("train", "backward", "frozen_backward") else False
        schedule = choose(view, slices, step.lay.groups, x.itemsize, places, self._thresholds, one)
        sums: Any = np.float64 if x.itemsize == 8 else np.float32
        variant = Variant(
            dtype=x.dtype,
            rows=schedule.rows,
            short=schedule.swapped and not schedule.rows,
            width=schedule.width,
            sums=np.dtype(sums if self._sums is None else self._sums),
            threads=self._thresholds.threads,
            state=step.state_dtype,
            weights="weights" in there,
            adjustment="a" in there,
            residual="residual" in there,
            relu=self.relu is not None,
            renorm=self.options.renorm,
            debias=self.debias is not None,
            skip=self.options.skip_nonfinite,
            dz="dz" in there,
            frozen=step.name == "frozen_backward",
        )
        placed = {name: schedule.place(s) for name, s in strides.items()}
        return Plan(schedule.place(view), placed, copied, schedule, variant)

    def _launch(self, plan: Plan, step: Step) -> None:
        x, lay, schedule = step.x, step.lay, plan.schedule
        views = {n: _NOTHING if a is None else (a.address, *plan.strides[n]) for n, a in step.views.items()}
        addresses, stream = self._addresses(x, step.numbers), x.library.stream(x.device)
        launches = _LAUNCHES[step.name][not schedule.one_launch]
        counting, scratch = any(name in _COUNTING for name in launches), None
        if step.name != "infer":
            scratch = _scratch(x, plan, lay, addresses, counting)
        memory = tuple(addresses.values())
        with primary_context(x.device):
            if counting:
                clear(addresses["counters"], 4 * schedule.reduce.families, stream)
            for name in launches:
                if name == "spread_gradient":
                    self._launch_over_channels(name, plan.variant, x, memory, lay.channels, lay.statistics, stream)
                    continue
                grid = schedule.apply if name in _APPLYING else schedule.reduce
                blocks = schedule.reduce.families if name in _WHOLE else grid.chunks * grid.tiles
                arguments: list[Any] = [views.get(v, _NOTHING) for v in steps.VIEWS[name]]
                arguments += [plan.shape, grid, memory, lay.channels, self.options.epsilon]
                launch(name, plan.variant, x.device, stream, blocks, schedule.block, arguments)
        x.library.finish(x.device)
        del scratch  # not before the launches are queued

    def _run_middle(self, name: str, numbers: dict[str, Any], adjusted: bool) -> None:
        like, statistics = numbers["params"], numbers["saved"].shape[1]
        variant = Variant(
            dtype=like.dtype,
            rows=True,
            width=1,
            sums=like.dtype,
            threads=self._thresholds.threads,
            state=numbers["state"].dtype,
            adjustment=adjusted,
            renorm=self.options.renorm,
            debias=self.debias is not None,
            skip=self.options.skip_nonfinite,
        )
        memory, stream = tuple(self._addresses(like, numbers).values()), like.library.stream(like.device)
        with primary_context(like.device):
            self._launch_over_channels(name, variant, like, memory, like.shape[1], statistics, stream)
        like.library.finish(like.device)

    def merge_moments(self, parts: Array) -> Array:
        """The moments (4, S) of several inputs together: (P, 4, S), merged in their order."""
        return self._merged("merge_moments", parts, "moments")

    def add_sums(self, parts: Array) -> Array:
        """The sums (R, S) of the gradient, likewise."""
        return self._merged("add_sums", parts, "sums")

    def _merged(self, name: str, parts: Array, result: str) -> Array:
        count, rows, statistics = parts.shape
        found: Array = device_place(parts.library, parts.device).empty((rows, statistics), parts.dtype)
        dtype, threads, adjusted = parts.dtype, self._thresholds.threads, rows > 2  # as sums have them then
        variant = Variant(dtype, rows=True, width=1, sums=dtype, threads=threads, adjustment=adjusted)
        memory = tuple(self._addresses(parts, {"partial": parts, result: found}).values())
        with primary_context(parts.device):
            self._launch_over_channels(
                name, variant, parts, memory, statistics, count * statistics, parts.library.stream(parts.device)
            )
        parts.library.finish(parts.device)
        return found

    def _launch_over_channels(
        self, name: str, variant: Variant, like: Array, memory: Sizes, channels: int, statistics: int, stream: int
    ) -> None:
        """A launch with one thread per channel; none without any channel, as a grid has a block at least."""
        if channels == 0:
            return
        threads = self._thresholds.threads
        blocks = -(-channels // threads)
        shape, grid = (1, 1, 1, statistics), Grid(1, 1, threads, 1, 1, blocks, 1, blocks, 1)
        arguments = [shape, grid, memory, channels, self.options.epsilon]
        launch(name, variant, like.device, stream, blocks, (threads, 1), arguments)

    def _addresses(self, like: Array, numbers: dict[str, Any]) -> dict[str, int]:
        """Of the small arrays, by their names in steps.MEMORY; 0 for what is not there."""
        addresses = dict.fromkeys(steps.MEMORY, 0)
        for name, array in numbers.items():
            addresses[name] = (self._hyper_on(like, array) if name == "hyper" else array).address
        if addresses["coefficients"] % _ALIGNMENT:
            raise ValueError(
                f"coefficients must lie at a multiple of {_ALIGNMENT} bytes, as an array does that a library has made; "
                f"received the address {addresses['coefficients']}"
            )
        if not addresses["moments"]:
            addresses["moments"] = addresses["saved"]  # which begins with them
        return addresses

    def _hyper_on(self, like: Array, hyper: np.ndarray) -> Array:
        """The numbers that the middle stage reads, copied to the device when they are new."""
        key = like.library, like.device, hyper.tobytes()
        found = self._hyper.get(key)
        if found is None:
            if len(self._hyper) >= self.force.max_plans:
                self._hyper.clear()
            found = self._hyper[key] = wrap(like.library.from_host(hyper, like.device), like.library)
        return found


def _scratch(x: Array, plan: Plan, lay: Layout, addresses: dict[str, int], counting: bool) -> Any:
    """Memory for what the launches of a step, and the blocks of one, tell each other; its places are written to
    `addresses`.

    The counters are those of the call. A stream's handle says too little: one stands for the default streams of all
    threads, and what a graph has captured is replayed in any stream.
    """
    sizes = {"partial": 4 * plan.schedule.reduce.chunks * lay.statistics * 8}
    if counting:
        sizes["counters"] = 4 * plan.schedule.reduce.families
    if not addresses["coefficients"]:
        sizes["coefficients"] = 5 * lay.statistics * 8
    total = sum(-(-n // _ALIGNMENT) * _ALIGNMENT for n in sizes.values())
    memory = device_place(x.library, x.device).empty((total,), np.dtype(np.uint8))
    address = memory.address
    for name, size in sizes.items():
        addresses[name] = address
        address += -(-size // _ALIGNMENT) * _ALIGNMENT
    return memory
