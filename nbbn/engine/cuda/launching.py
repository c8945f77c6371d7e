"""Kernels compiled for a device, and what is put into its streams."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from nbbn.kernels.cuda.blocks import Variant
from nbbn.kernels.cuda.steps import signature, steps
from nbbn.kernels.cuda.target import SIMULATED

_compiling = threading.Lock()


def launch(
    step: str, variant: Variant, device: int, stream: int, blocks: int, block: tuple[int, int], arguments: Any
) -> None:
    """Run a kernel on a stream, inside primary_context(). `arguments`: tuples of integers and integers, the last one a
    float: epsilon."""
    if SIMULATED:
        _simulated(step, variant)[(blocks,), block](*arguments)
        return
    from cuda.core import launch as start

    kernel, epsilon = _kernel(step, variant, device)
    flat: list[Any] = []
    for value in arguments[:-1]:
        flat.extend(value) if isinstance(value, tuple) else flat.append(value)
    start(_stream(stream), _configuration(blocks, block), kernel, *flat, epsilon(arguments[-1]))


def clear(address: int, size: int, stream: int) -> None:
    """Fill memory with zeros, in the order of a stream, inside primary_context(). A captured graph does so, too."""
    if SIMULATED:
        ctypes.memset(address, 0, size)
    else:
        _checked(_driver().cuMemsetD8Async(address, 0, size, stream))


@contextmanager
def primary_context(device: int) -> Iterator[None]:
    """The device's primary context, which all libraries use, is current in this thread; so stream 0 is its own.

    One that was current before is so again afterwards. A thread that had none keeps this one: memory that a library
    takes from its pool makes none current.
    """
    if SIMULATED:
        yield
        return
    driver, primary = _driver(), _primary(device)
    (before,) = _checked(driver.cuCtxGetCurrent())
    if int(before) == int(primary):
        yield
        return
    _checked(driver.cuCtxSetCurrent(primary))
    try:
        yield
    finally:
        if int(before):
            _checked(driver.cuCtxSetCurrent(before))


@lru_cache(maxsize=64)
def _primary(device: int) -> Any:
    (number,) = _checked(_driver().cuDeviceGet(device))
    (context,) = _checked(_driver().cuDevicePrimaryCtxRetain(number))
    return context


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _checked(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the driver has answered. Raises: RuntimeError for an error."""
    code, *values = answer
    if int(code):
        raise RuntimeError(f"CUDA's driver reports {getattr(code, 'name', code)}")
    return tuple(values)


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
