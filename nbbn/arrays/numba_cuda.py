"""Numba's device arrays. Numba allocates each one by itself, which is slow: other libraries have pools.

Kernels run on the default stream, which Numba's other streams wait for, and which waits for them.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from nbbn.arrays.device import DeviceArray
from nbbn.core.layout import Sizes
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
    """By way of the host."""
    host = np.broadcast_to(array.library.to_host(array.owner), array.shape).reshape(sizes).transpose(order)
    return from_host(np.ascontiguousarray(host), array.device)


def assign(array: DeviceArray, sizes: Sizes, order: Sizes, value: Any) -> None:
    """By way of the host."""
    host = np.empty(sizes, array.dtype)
    host.transpose(order)[...] = array.library.to_host(value)
    write(array, host.reshape(array.shape))


def read(array: DeviceArray) -> np.ndarray:
    """A copy on the host, whatever the strides, the dtype and the library."""
    if not array.size:
        return np.empty(array.shape, array.dtype)
    if SIMULATED:
        return _host_view(array).view(array.dtype).copy()
    with cuda.gpus[array.device]:
        host: np.ndarray = cuda.as_cuda_array(Memory(array), sync=False).copy_to_host()
    return host.view(array.dtype)


def write(array: DeviceArray, host: np.ndarray) -> None:
    """Copy `host`, of the same shape and dtype, to where the array lies, whatever its strides and its library."""
    integers = np.ascontiguousarray(host).view(carrier(array.dtype))
    if SIMULATED:
        _host_view(array)[...] = integers
    elif array.size:
        with cuda.gpus[array.device]:
            cuda.as_cuda_array(Memory(array), sync=False)[...] = integers


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
