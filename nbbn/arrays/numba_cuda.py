"""Numba's device arrays. Numba allocates each one by itself, which is slow: other libraries have pools.

Kernels run on the default stream, which Numba's other streams wait for, and which waits for them.
"""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from nbbn.arrays import moving
from nbbn.arrays.device import DeviceArray, wrap
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


def send(array: np.ndarray, device: int) -> Any:
    """What is more than the driver's staging memory holds waits for what is queued before: it is not pinned, as memory
    that is waits, too, when it is given back."""
    with cuda.gpus[device]:
        return cuda.to_device(array, stream=cuda.default_stream())


def to_host(array: Any) -> np.ndarray:
    found: np.ndarray = array.copy_to_host()
    return found


def stream(device: int) -> int:
    return 0


def finish(device: int) -> None:
    """Nothing: the default stream is Numba's own."""


def astype(array: Any, dtype: np.dtype) -> Any:
    return cast(wrap(array, _this), dtype)


def cast(array: DeviceArray, dtype: np.dtype) -> Any:
    """A contiguous array of Numba's with the elements of any library's."""
    found = empty(array.shape, dtype, array.device)
    moving.copy(array, wrap(found, _this))
    return found


def copy(array: DeviceArray, sizes: Sizes, order: Sizes) -> Any:
    return cast(moving.transposed(array, sizes, order), array.dtype)


def assign(array: DeviceArray, sizes: Sizes, order: Sizes, value: Any) -> None:
    moving.copy(wrap(value, array.library), moving.transposed(array, sizes, order))


def read(array: DeviceArray) -> np.ndarray:
    """A copy on the host, whatever the strides, the dtype and the library."""
    if not array.size:
        return np.empty(array.shape, array.dtype)
    if SIMULATED:
        return _host_view(array).view(array.dtype).copy()
    with cuda.gpus[array.device]:
        host: np.ndarray = cuda.as_cuda_array(Memory(array), sync=False).copy_to_host()
    return host.view(array.dtype)


def _host_view(array: DeviceArray) -> np.ndarray:
    """The simulator's memory is the host's."""
    return np.asarray(SimpleNamespace(__array_interface__=Memory(array).__cuda_array_interface__))


class Memory:
    """The memory of an array, as Numba takes it from other libraries: of integers."""

    def __init__(self, array: DeviceArray) -> None:
        self.owner = array.owner
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"<u{array.itemsize}",
            "data": (array.address, False),
            "version": 3,
        }


_this: Any = sys.modules[__name__]
