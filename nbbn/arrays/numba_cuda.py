"""Numba's device arrays. Numba allocates each one by itself, which is slow: other libraries have pools.

Kernels run on the default stream, which Numba's other streams wait for, and which waits for them.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from nbbn.arrays.device import DeviceArray, wrap
from nbbn.core.layout import Sizes
from nbbn.kernels.cuda.strided import gather, scatter
from nbbn.kernels.cuda.target import SIMULATED


def is_device_array(value: Any) -> bool:
    return bool(cuda.is_cuda_array(value)) if not SIMULATED else hasattr(value, "_ary")


def is_writable(array: Any) -> bool:
    return True


def describe(array: Any) -> tuple[int, Sizes, Sizes, np.dtype, int]:
    if SIMULATED:
        host = array._ary
        return host.__array_interface__["data"][0], host.shape, host.strides, host.dtype, 0
    address, device = array.device_ctypes_pointer.value or 0, array.gpu_data.context.device.id
    return address, array.shape, array.strides, array.dtype, device


def address(array: Any) -> int:
    return int(describe(array)[0])


def empty(shape: Sizes, dtype: np.dtype, device: int) -> Any:
    with cuda.gpus[device]:
        return cuda.device_array(shape, dtype)


def empty_like(array: Any) -> Any:
    with cuda.gpus[describe(array)[4]]:
        return cuda.device_array_like(array)


def from_host(array: np.ndarray, device: int) -> Any:
    with cuda.gpus[device]:
        return cuda.to_device(array)


def to_host(array: Any) -> np.ndarray:
    found: np.ndarray = array.copy_to_host()
    return found


def stream(device: int) -> int:
    return 0


def finish(device: int) -> None:
    """Nothing: the default stream is Numba's own."""


def astype(array: Any, dtype: np.dtype) -> Any:
    return from_host(to_host(array).astype(dtype), describe(array)[4])


def copy(array: DeviceArray, sizes: Sizes, order: Sizes) -> Any:
    found = empty(tuple(sizes[i] for i in order), array.dtype, array.device)
    _transfer(_transposed(array, sizes, order), wrap(found, array.library), gather)
    return found


def assign(array: DeviceArray, sizes: Sizes, order: Sizes, value: Any) -> None:
    _transfer(_transposed(array, sizes, order), wrap(value, array.library), scatter)


def read(array: DeviceArray) -> np.ndarray:
    """A copy on the host, whatever the strides, the dtype and the library."""
    if not array.size:
        return np.empty(array.shape, array.dtype)
    if SIMULATED:
        return _host_view(array).view(array.dtype).copy()
    with cuda.gpus[array.device]:
        host: np.ndarray = cuda.as_cuda_array(Memory(array), sync=False).copy_to_host()
    return host.view(array.dtype)


_LAUNCH = (1, 4) if SIMULATED else (128, 128)  # blocks, threads: Numba warns of fewer blocks


def _transposed(array: DeviceArray, sizes: Sizes, order: Sizes) -> DeviceArray:
    """The array seen with these sizes, which may divide the first dimension, and transposed."""
    strides = array.strides if len(sizes) == array.ndim else (array.strides[0] * sizes[1], *array.strides)
    return replace(array, shape=tuple(sizes[i] for i in order), strides=tuple(strides[i] for i in order))


def _transfer(apart: DeviceArray, dense: DeviceArray, kernel: Any) -> None:
    """Copy the elements of an array of any strides to those of a C-contiguous one of its shape, or the other way."""
    if not apart.size:
        return
    first, last = apart.extent()
    size = apart.itemsize
    memory = replace(apart, address=first, shape=((last - first) // size,), strides=(size,))
    strides, start = tuple(s // size for s in apart.strides), (apart.address - first) // size
    flat = replace(dense, shape=(dense.size,), strides=(size,))
    with cuda.gpus[apart.device]:
        kernel[_LAUNCH](_as_numbas(memory), start, apart.shape, strides, _as_numbas(flat))


def _as_numbas(array: DeviceArray) -> Any:
    return _host_view(array) if SIMULATED else cuda.as_cuda_array(Memory(array), sync=False)


def _host_view(array: DeviceArray) -> np.ndarray:
    """The simulator's memory is the host's."""
    return np.asarray(SimpleNamespace(__array_interface__=Memory(array).__cuda_array_interface__))


def carrier(dtype: np.dtype) -> np.dtype:
    """An integer of the same size: Numba does not know each float."""
    return np.dtype(f"u{dtype.itemsize}")


class Memory:
    """The memory of an array, as Numba takes it from other libraries: of integers."""

    def __init__(self, array: DeviceArray) -> None:
        self.owner = array.owner
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "strides": array.strides,
            "typestr": carrier(array.dtype).str,
            "data": (array.address, False),
            "version": 3,
        }
