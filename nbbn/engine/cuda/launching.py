"""What is put into a GPU's streams, with as little of Python before the driver as can be."""

import ctypes
import struct
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from nbbn.core.layout import Sizes
from nbbn.engine.cuda.compiling import function
from nbbn.engine.cuda.driver import checked, driver
from nbbn.kernels.cuda.blocks import VIEW_SIZE, Variant
from nbbn.kernels.cuda.steps import MEMORY, VIEWS, steps
from nbbn.kernels.cuda.target import SIMULATED
from nbbn.kernels.cuda.tasks import Grid

_SIZE = 8  # bytes of an argument's place; of one of 32 bits the driver reads the first half, which is the lower one
_EPSILON = {4: "=f4x", 8: "=d"}  # by the size of a statistic
_MEMORY = struct.Struct(f"={len(MEMORY)}q")


def clear(address: int, size: int, stream: int) -> None:
    """Fill memory with zeros, in the order of a stream, inside primary_context(). A captured graph does so, too."""
    if SIMULATED:
        ctypes.memset(address, 0, size)
    else:
        checked(driver().cuMemsetD8Async(address, 0, size, stream))


class Launch:
    """A kernel and its arguments, of which only addresses differ from one launch to the next.

    strides: of the views that are there, by name. shape, grid, channels, epsilon: as in kernels/cuda/steps.py.

    The driver reads arguments from memory, by a list of their places, before a launch returns. Both are kept, and
    belong to one thread from the beginning of a launch to its end.
    """

    __slots__ = ("_arguments", "_block", "_function", "_idle", "_kernel", "_memory", "_views", "blocks")

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
        self._kernel = step, variant, device
        self.blocks, self._block = blocks, block
        self._views = [(name, VIEW_SIZE * i) for i, name in enumerate(views) if name in strides]
        own = [n for name in views for n in (0, *strides.get(name, nothing))]
        self._arguments = array("q", [*own, *shape, *grid, *(0 for _ in MEMORY), channels])
        self._memory = _SIZE * (len(self._arguments) - 1 - len(MEMORY))
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
            own = self._new_arguments()
        arguments, _, places = own
        for name, place in self._views:
            arguments[place] = views[name]
        _MEMORY.pack_into(arguments, self._memory, *memory)
        if SIMULATED:
            _simulate(self._kernel, self.blocks, self._block, arguments)
        else:
            if self._function is None:
                self._function = function(*self._kernel)
            x, y = self._block
            checked(driver().cuLaunchKernel(self._function, self.blocks, 1, 1, x, y, 1, 0, stream, places, 0))
        self._idle.append(own)

    def _new_arguments(self) -> tuple[Any, Any, int]:
        arguments = array("q", self._arguments)
        first, _ = arguments.buffer_info()
        places = array("Q", range(first, first + _SIZE * len(arguments), _SIZE))
        return arguments, places, places.buffer_info()[0]


def _simulate(kernel: tuple[str, Variant, int], blocks: int, block: tuple[int, int], arguments: Sequence[int]) -> None:
    """Run a kernel in Numba's simulator on the arguments that the driver would get."""
    step, variant, _ = kernel
    left = iter(arguments)

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(left) for _ in range(count))

    views = [take(VIEW_SIZE) for _ in VIEWS[step]]
    shape, grid, memory, (channels, last) = take(4), Grid(*take(len(Grid._fields))), take(len(MEMORY)), take(2)
    (epsilon,) = struct.unpack(_EPSILON[variant.statistic.itemsize], struct.pack("=q", last))
    _simulated(step, variant)[(blocks,), block](*views, shape, grid, memory, channels, epsilon)


@lru_cache(maxsize=256)
def _simulated(step: str, variant: Variant) -> Any:
    from numba import cuda

    return cuda.jit(steps(variant)[step])
