"""JAX's arrays. On a GPU its streams cannot be had: kernels run on the default stream, which waits for what JAX has
queued. JAX's streams cannot be told to wait for it, so a call waits for its kernels.

JAX's arrays never change once there are results in them. Kernels write to those only that are new, from empty() and
from_host().
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import numpy as np

from nbbn.arrays.device import DeviceArray
from nbbn.core.layout import Sizes

# numba.cuda is imported by what runs on a GPU only: JAX's arrays of the host come here, too.

_CUDA = 2  # DLPack's kDLCUDA
_LEGACY = 1  # the default stream, as DLPack names it


def is_device_array(value: Any) -> bool:
    """Raises: ValueError for an array that several devices share."""
    if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
        return False  # a tracer has no memory; NumPy's error says so
    devices: Any = value.sharding.device_set
    if len(devices) > 1:
        if all(d.platform == "cpu" for d in devices):
            return False
        raise ValueError(f"an array must be on one device; received one on {len(devices)}")
    return int(cast(Any, value).__dlpack_device__()[0]) == _CUDA


def is_writable(array: Any) -> bool:
    return False


def describe(array: Any) -> tuple[int, Sizes, Sizes, np.dtype, int]:
    """Strides are (): an array is C-contiguous."""
    return address(array), array.shape, (), np.dtype(array.dtype), _number(array.device)


def address(array: Any) -> int:
    """What is queued from now on waits until JAX has computed the array, or no longer writes to it, as it does to an
    empty one."""
    _order(array)
    return int(array.unsafe_buffer_pointer())


def _order(array: Any) -> None:
    """Let the default stream wait for JAX's, as DLPack's protocol has it; the capsule itself is of no use."""
    array.__dlpack__(stream=_LEGACY)


def empty(shape: Sizes, dtype: np.dtype, device: int) -> Any:
    return _empty(shape, dtype, _device(device))


def empty_like(array: Any) -> Any:
    return _empty(array.shape, array.dtype, array.device)


def _empty(shape: Sizes, dtype: np.dtype, device: Any) -> Any:
    with jax.enable_x64(dtype.itemsize == 8):  # without it float64 is float32, and kernels write past its end
        return jax.numpy.empty(shape, dtype, device=device)


def from_host(array: np.ndarray, device: int) -> Any:
    with jax.enable_x64(array.dtype.itemsize == 8):
        return jax.device_put(np.array(array, order="C"), _device(device))


send = from_host  # JAX copies in its own time


def to_host(array: Any) -> np.ndarray:
    """Of a copy, as JAX remembers what it has brought to the host, while kernels change a layer's statistics."""
    with jax.enable_x64(True):
        return np.asarray(jax.numpy.array(array, copy=True))


def stream(device: int) -> int:
    return 0


def finish(device: int) -> None:
    """Wait for the kernels: JAX takes it that what is in its arrays is there, and an input may be donated next."""
    from numba import cuda

    with cuda.gpus[device]:
        cuda.default_stream().synchronize()


def astype(array: Any, dtype: np.dtype) -> Any:
    with jax.enable_x64(dtype.itemsize == 8):
        return jax.numpy.array(array, dtype=dtype, copy=True)


def copy(array: DeviceArray, sizes: Sizes, order: Sizes) -> Any:
    seen = jax.numpy.broadcast_to(array.owner, array.shape).reshape(sizes)
    return jax.numpy.array(jax.numpy.transpose(seen, order), copy=True)


def assign(array: DeviceArray, sizes: Sizes, order: Sizes, value: Any) -> None:
    from nbbn.arrays import numba_cuda

    numba_cuda.assign(array, sizes, order, value)
    finish(array.device)


# -- in the host's memory ----------------------------------------------------------------------------------------------


def is_host_array(value: Any) -> bool:
    if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
        return False
    return all(d.platform == "cpu" for d in cast(Any, value).sharding.device_set)


def view(array: Any) -> np.ndarray:
    """Waits until the array has been computed. One that several devices share is put together, a copy."""
    return np.asarray(array)


def giver(array: Any) -> Callable[[np.ndarray], Any]:
    return partial(_from_numpy, device=min(array.sharding.device_set, key=lambda d: d.id))


def _from_numpy(array: np.ndarray, device: Any) -> Any:
    """An array on that device that can meet those on others: it is not committed to where it is, as JAX says."""
    with jax.enable_x64(array.dtype.itemsize == 8), jax.default_device(device):
        return jax.numpy.asarray(array)


def _number(device: Any) -> int:
    found = device.local_hardware_id
    return 0 if found is None else int(found)


def _device(number: int) -> Any:
    return next(d for d in jax.local_devices() if _number(d) == number)
