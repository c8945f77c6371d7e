"""Numba's device arrays. Numba allocates each one by itself, which is slow: other libraries have pools."""

from typing import Any

import numpy as np
from numba import cuda

from nbbn.gpu.arrays import DeviceArray
from nbbn.kernels.cuda.target import SIMULATED
from nbbn.layout import Sizes


def is_device_array(value: Any) -> bool:
    return bool(cuda.is_cuda_array(value)) if not SIMULATED else hasattr(value, "_ary")


def describe(array: Any) -> tuple[int, Sizes, Sizes, np.dtype, int]:
    if SIMULATED:
        host = array._ary
        return host.__array_interface__["data"][0], host.shape, host.strides, host.dtype, 0
    return (
        array.device_ctypes_pointer.value or 0,
        array.shape,
        array.strides,
        array.dtype,
        array.gpu_data.context.device.id,
    )


def empty(shape: Sizes, dtype: np.dtype, device: int) -> Any:
    with cuda.gpus[device]:
        return cuda.device_array(shape, dtype)


def empty_like(array: Any) -> Any:
    return empty(array.shape, array.dtype, describe(array)[4])


def from_host(array: np.ndarray, device: int) -> Any:
    with cuda.gpus[device]:
        return cuda.to_device(array)


def to_host(array: Any) -> np.ndarray:
    found: np.ndarray = array.copy_to_host()
    return found


def stream(device: int) -> int:
    return 0


def astype(array: Any, dtype: np.dtype) -> Any:
    return from_host(to_host(array).astype(dtype), describe(array)[4])


def copy(array: DeviceArray, sizes: Sizes, order: Sizes) -> Any:
    host = np.broadcast_to(to_host(array.owner), array.shape).reshape(sizes).transpose(order)
    return from_host(np.ascontiguousarray(host), array.device)


def assign(array: DeviceArray, sizes: Sizes, order: Sizes, value: Any) -> None:
    host = np.empty(sizes, array.dtype)
    host.transpose(order)[...] = to_host(value)
    array.owner.copy_to_device(host.reshape(array.shape))
