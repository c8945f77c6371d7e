"""Kernels compiled for a device, and their launches."""

import ctypes
import threading
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

from nbbn.kernels.cuda.blocks import Variant
from nbbn.kernels.cuda.steps import signature, steps
from nbbn.kernels.cuda.target import SIMULATED

_compiling = threading.Lock()


def launch(
    step: str, variant: Variant, device: int, stream: int, blocks: int, block: tuple[int, int], arguments: Any
) -> None:
    """Run a kernel on a stream. `arguments`: tuples of integers and integers, the last one a float: epsilon."""
    if SIMULATED:
        _simulated(step, variant)[(blocks,), block](*arguments)
        return
    from cuda.core import launch as start
    from numba import cuda

    kernel, epsilon = _kernel(step, variant, device)
    flat: list[Any] = []
    for value in arguments[:-1]:
        flat.extend(value) if isinstance(value, tuple) else flat.append(value)
    with cuda.gpus[device] if len(cuda.gpus) > 1 else nullcontext():  # whose default stream is stream 0
        start(_stream(stream), _configuration(blocks, block), kernel, *flat, epsilon(arguments[-1]))


@lru_cache(maxsize=1024)
def _kernel(step: str, variant: Variant, device: int) -> Any:
    """The driver's kernel, and the C type of epsilon."""
    from numba import cuda

    with _compiling, cuda.gpus[device]:
        compiled = cuda.jit(signature(step, variant), fastmath=False)(steps(variant)[step])
        kernel = next(iter(compiled.overloads.values()))
        kernel.bind()
        function = kernel._codelibrary.get_cufunc().kernel
    return function, ctypes.c_double if variant.statistic.itemsize == 8 else ctypes.c_float


@lru_cache(maxsize=1024)
def _configuration(blocks: int, block: tuple[int, int]) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=(blocks, 1, 1), block=(*block, 1), shmem_size=0)


@lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)


@lru_cache(maxsize=256)
def _simulated(step: str, variant: Variant) -> Any:
    from numba import cuda

    return cuda.jit(steps(variant)[step])
