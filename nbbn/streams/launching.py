"""Launches of kernels: what is put into a GPU's streams. The caller is inside primary_context()."""

import ctypes
from array import array
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from nbbn.kernels.cuda.kernel import Kernel
from nbbn.kernels.cuda.target import SIMULATED
from nbbn.streams.compiling import function
from nbbn.streams.driver import checked, driver

SIZE = 8  # bytes of an argument's place; of one of 32 bits the driver reads the first half, which is the lower one


def clear(address: int, size: int, stream: int) -> None:
    """Fill memory with zeros, in the order of a stream. A captured graph does so, too."""
    if SIMULATED:
        ctypes.memset(address, 0, size)
    else:
        checked(driver().cuMemsetD8Async(address, 0, size, stream))


def places_of(arguments: "array[int]") -> tuple["array[int]", int]:
    """The list of where each of a launch's arguments is, by which the driver finds them before the launch returns, and
    where that is itself."""
    first, _ = arguments.buffer_info()
    places = array("Q", range(first, first + SIZE * len(arguments), SIZE))
    return places, places.buffer_info()[0]


def launch(found: Any, blocks: int, block: tuple[int, int], stream: int, places: int) -> None:
    """found: what function() gives for a kernel."""
    x, y = block
    checked(driver().cuLaunchKernel(found, blocks, 1, 1, x, y, 1, 0, stream, places, 0))


def launch_once(
    kernel: Kernel, device: int, blocks: int, threads: int, stream: int, arguments: tuple[Any, ...]
) -> None:
    """Of arguments that are used this time only, integers of 64 bits and tuples of them."""
    if SIMULATED:
        simulated(kernel)[blocks, threads](*arguments)
        return
    own = array("q", _flat(arguments))
    _kept, places = places_of(own)
    launch(function(kernel, device), blocks, (threads, 1), stream, places)


@lru_cache(maxsize=512)
def simulated(kernel: Kernel) -> Any:
    """A kernel as Numba's simulator runs it."""
    from numba import cuda

    return cuda.jit(kernel.build())


def _flat(arguments: tuple[Any, ...]) -> Iterator[int]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _flat(argument)
        else:
            yield argument
