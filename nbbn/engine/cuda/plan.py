"""How one step runs on arrays of a GPU of one shape, dtype and memory layout: which launches, and what they share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from nbbn.core.layout import Sizes
from nbbn.engine.base import Canonical, Copied, Step
from nbbn.engine.cuda.launching import Launch
from nbbn.engine.cuda.schedule import Schedule
from nbbn.kernels.cuda.blocks import Variant
from nbbn.kernels.cuda.memory import VECTOR_BYTES
from nbbn.kernels.cuda.steps import COUNTERS
from nbbn.kernels.cuda.tasks import grid_of
from nbbn.streams.driver import primary_context
from nbbn.streams.launching import clear

ALIGNMENT = VECTOR_BYTES  # of the parts of a call's scratch memory, which a library's arrays have at least
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
_SPREADING = ("train", "backward", "frozen_backward", "apply_gradient")  # steps that make coefficients for themselves
_COUNTING = ("reduce", "train_reduce", "sum_gradient", "backward_reduce")  # whose blocks ask which one is the last


class Scratch(NamedTuple):
    """Memory for what the launches of a step, and the blocks of one, tell each other: its size, and where its parts
    begin, by their names in steps.MEMORY.

    The counters are those of the call. A stream's handle says too little: one stands for the default streams of all
    threads, and what a graph has captured is replayed in any stream.
    """

    size: int
    parts: dict[str, int]

    @classmethod
    def of(cls, **sizes: int) -> Self:
        first, parts = 0, {}
        for name, size in sizes.items():
            parts[name] = first
            first += -(-size // ALIGNMENT) * ALIGNMENT
        return cls(first, parts)


@dataclass(frozen=True)
class Plan:
    """cleared: bytes of the counters, which the first launch needs zero; 0 where there are none. scratch: None where
    the launches need none."""

    device: int
    shape: Sizes
    copied: Copied | None
    schedule: Schedule
    variant: Variant
    launches: tuple[Launch, ...]
    cleared: int
    scratch: Scratch | None

    def queue(self, stream: int, views: Mapping[str, int], memory: Sequence[int]) -> None:
        """Put the launches into a stream. views, memory: as for a Launch."""
        with primary_context(self.device):
            if self.cleared:
                clear(memory[COUNTERS], self.cleared, stream)
            for launch in self.launches:
                launch.run(stream, views, memory)

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


def plan_of(
    step: Step, view: Sizes, canonical: Canonical, schedule: Schedule, variant: Variant, epsilon: float
) -> Plan:
    """view: the canonical one, with the slices of R0 in K0."""
    lay, device = step.lay, step.x.device
    names, shape = _LAUNCHES[step.name][not schedule.one_launch], schedule.place(view)
    placed = {name: schedule.place(s) for name, s in canonical.strides.items()}
    counting = any(name in _COUNTING for name in names)
    counters = 4 * schedule.counters if counting else 0

    def launch(name: str) -> Launch:
        if name == "spread_gradient":
            return over_channels(name, variant, device, lay.channels, lay.statistics, epsilon)
        grid = schedule.apply if name in _APPLYING else schedule.reduce
        blocks = schedule.reduce.families if name in _WHOLE else grid.chunks * grid.tiles
        return Launch(name, variant, device, blocks, schedule.block, placed, shape, grid, lay.channels, epsilon)

    sizes: dict[str, int] = {}
    if counting or schedule.one_launch:
        sizes["partial"] = 4 * schedule.reduce.chunks * lay.statistics * 8
    if counters:
        sizes["counters"] = counters
    if step.name in _SPREADING:
        sizes["coefficients"] = 5 * lay.statistics * 8
    return Plan(
        device=device,
        shape=shape,
        copied=canonical.copied,
        schedule=schedule,
        variant=variant,
        launches=tuple(map(launch, names)),
        cleared=counters,
        scratch=Scratch.of(**sizes) if sizes else None,
    )


def over_channels(
    name: str, variant: Variant, device: int, channels: int, statistics: int, epsilon: float, parts: int = 1
) -> Launch:
    """A launch with one thread per channel. parts: inputs whose statistics are merged."""
    threads = variant.threads
    blocks = -(-channels // threads)
    shape, grid = (1, 1, parts, statistics), grid_of((1, 1, threads), blocks, k1_pieces=blocks)
    return Launch(name, variant, device, blocks, (threads, 1), {}, shape, grid, channels, epsilon)
