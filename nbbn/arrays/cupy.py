"""CuPy's arrays: its memory pool, and the stream that is current when a call is made."""

from typing import Any

import cupy
import numpy as np

from nbbn.arrays.device import DeviceArray
from nbbn.core.layout import Sizes


def is_device_array(value: Any) -> bool:
    return isinstance(value, cupy.ndarray)


def is_writable(array: Any) -> bool:
    return True


def describe(array: Any) -> tuple[int, Sizes, Sizes, np.dtype, int]:
    return array.data.ptr, array.shape, array.strides, array.dtype, array.device.id


def address(array: Any) -> int:
    return int(array.data.ptr)


def empty(shape: Sizes, dtype: np.dtype, device: int) -> Any:
    with cupy.cuda.Device(device):
        return cupy.empty(shape, dtype)


def empty_like(array: Any) -> Any:
    with array.device:
        return cupy.empty_like(array)  # order "K": in the order of the array's memory


def from_host(array: np.ndarray, device: int) -> Any:
    with cupy.cuda.Device(device):
        # By itself CuPy goes on before the copy is there, and the array may be used in another stream.
        return cupy.array(array, order="C", blocking=True)


def send(array: np.ndarray, device: int) -> Any:
    with cupy.cuda.Device(device):
        return cupy.array(array, order="C")  # by way of pinned memory of CuPy's


def to_host(array: Any) -> np.ndarray:
    found: np.ndarray = cupy.asnumpy(array)
    return found


def stream(device: int) -> int:
    return int(cupy.cuda.get_current_stream(device).ptr)


def finish(device: int) -> None:
    """Nothing: CuPy's own work comes after, in the same stream."""


def astype(array: Any, dtype: np.dtype) -> Any:
    with array.device:
        return array.astype(dtype)


def copy(array: DeviceArray, sizes: Sizes, order: Sizes) -> Any:
    with cupy.cuda.Device(array.device):
        return cupy.broadcast_to(array.owner, array.shape).reshape(sizes).transpose(order).copy(order="C")


def assign(array: DeviceArray, sizes: Sizes, order: Sizes, value: Any) -> None:
    with cupy.cuda.Device(array.device):
        # A view: `sizes` divides dimensions and joins none.
        array.owner.reshape(sizes).transpose(order)[...] = value
