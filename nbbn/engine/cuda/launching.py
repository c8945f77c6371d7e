"""A launch that is repeated, with as little of Python before the driver as can be."""

import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from nbbn.core.layout import Sizes
from nbbn.kernels.cuda.blocks import VIEW_SIZE, Variant
from nbbn.kernels.cuda.steps import MEMORY, VIEWS, kernel
from nbbn.kernels.cuda.target import SIMULATED
from nbbn.kernels.cuda.tasks import Grid
from nbbn.streams.compiling import function
from nbbn.streams.launching import SIZE, launch, places_of, simulated

_EPSILON = {4: "=f4x", 8: "=d"}  # by the size of a statistic
_MEMORY = struct.Struct(f"={len(MEMORY)}q")


class Launch:
    """A kernel and its arguments, of which only addresses differ from one launch to the next.

    strides: of the views that are there, by name. shape, grid, channels, epsilon: as in kernels/cuda/steps.py.

    What the driver reads them from is kept, and belongs to one thread from the beginning of a launch to its end.
    """

    __slots__ = ("_arguments", "_block", "_device", "_function", "_idle", "_memory", "_step", "_views", "blocks")

    def __init__(
        self,
        step: str,
        variant: Variant,
        device: int,
        blocks: int,
        block: tuple[int, int],
        strides: Mapping[str, Sizes],
        shape: Sizes,
        grid: Grid,
        channels: int,
        epsilon: float,
    ) -> None:
        views, nothing = VIEWS[step], (0,) * (VIEW_SIZE - 1)
        self._step, self._device = (step, variant), device
        self.blocks, self._block = blocks, block
        self._views = [(name, VIEW_SIZE * i) for i, name in enumerate(views) if name in strides]
        own = [n for name in views for n in (0, *strides.get(name, nothing))]
        self._arguments = array("q", [*own, *shape, *grid, *(0 for _ in MEMORY), channels])
        self._memory = SIZE * (len(self._arguments) - 1 - len(MEMORY))
        self._arguments.frombytes(struct.pack(_EPSILON[variant.statistic.itemsize], epsilon))
        self._function: Any = None
        self._idle: list[tuple[Any, Any, int]] = []  # arguments, their places, where these are

    def run(self, stream: int, views: Mapping[str, int], memory: Sequence[int]) -> None:
        """Queue it in a stream, inside primary_context().

        views: the addresses of those that are there. memory: those of the small arrays, in the order of MEMORY.
        """
        try:
            own = self._idle.pop()
        except IndexError:
            arguments = array("q", self._arguments)
            own = arguments, *places_of(arguments)
        arguments, _, places = own
        for name, place in self._views:
            arguments[place] = views[name]
        _MEMORY.pack_into(arguments, self._memory, *memory)
        if SIMULATED:
            _simulate(*self._step, self.blocks, self._block, arguments)
        else:
            if self._function is None:
                self._function = function(kernel(*self._step), self._device)
            launch(self._function, self.blocks, self._block, stream, places)
        self._idle.append(own)


def _simulate(step: str, variant: Variant, blocks: int, block: tuple[int, int], arguments: Sequence[int]) -> None:
    """Run a kernel in Numba's simulator on the arguments that the driver would get."""
    left = iter(arguments)

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(left) for _ in range(count))

    views = [take(VIEW_SIZE) for _ in VIEWS[step]]
    shape, grid, memory, (channels, last) = take(4), Grid(*take(len(Grid._fields))), take(len(MEMORY)), take(2)
    (epsilon,) = struct.unpack(_EPSILON[variant.statistic.itemsize], struct.pack("=q", last))
    simulated(kernel(step, variant))[(blocks,), block](*views, shape, grid, memory, channels, epsilon)
