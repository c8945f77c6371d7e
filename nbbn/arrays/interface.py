"""Any other library's arrays that have DLPack's methods or __cuda_array_interface__.

Neither lets one allocate, so results are Numba's device arrays, unless out= is given. Kernels run on the legacy default
stream: it waits for the stream that the array's library names, and the host waits for nothing. Work that other streams
do with the results must wait for that stream in turn; all but those made as "non-blocking" do so anyway.
"""

import sys
from typing import Any

import numpy as np
from numba import cuda

from nbbn.arrays import dlpack, numba_cuda
from nbbn.arrays.device import wrap
from nbbn.core.layout import Sizes

_LEGACY = 1  # the legacy default stream, in both protocols

address, empty, from_host, send = numba_cuda.address, numba_cuda.empty, numba_cuda.from_host, numba_cuda.send
copy, assign = numba_cuda.copy, numba_cuda.assign
stream, finish = numba_cuda.stream, numba_cuda.finish


def is_device_array(value: Any) -> bool:
    return _has_dlpack(value) or getattr(value, "__cuda_array_interface__", None) is not None


def is_writable(array: Any) -> bool:
    if _is_numba(array) or _has_dlpack(array):
        return True  # DLPack exports nothing read-only without being asked for its version 1
    return not array.__cuda_array_interface__["data"][1]


def describe(array: Any) -> tuple[int, Sizes, Sizes, np.dtype, int]:
    """Raises: TypeError for a masked array, or a dtype that NumPy has no equal of."""
    if _is_numba(array):
        return numba_cuda.describe(array)
    if _has_dlpack(array):
        return dlpack.describe(array.__dlpack__(stream=_LEGACY))
    facts = array.__cuda_array_interface__
    if facts.get("mask") is not None:
        raise TypeError(f"a masked array has no kernels; received a {type(array).__name__} with a mask")
    address, shape = facts["data"][0] or 0, tuple(facts["shape"])
    device = _device_of(address)
    if facts.get("stream") not in (None, _LEGACY):  # version 3; whoever has version 2 has nothing to wait for
        _wait_for(facts["stream"], device)
    return address, shape, tuple(facts.get("strides") or ()), np.dtype(facts["typestr"]), device


def empty_like(array: Any) -> Any:
    _, shape, strides, dtype, device = describe(array)
    with cuda.gpus[device]:
        return cuda.device_array(shape, dtype, strides=strides if _is_dense(shape, strides, dtype.itemsize) else None)


def to_host(array: Any) -> np.ndarray:
    return numba_cuda.to_host(array) if _is_numba(array) else numba_cuda.read(wrap(array, _this))


def astype(array: Any, dtype: np.dtype) -> Any:
    return numba_cuda.cast(wrap(array, _this), dtype)


def _is_numba(array: Any) -> bool:
    """Whether it is one of this module's results."""
    return type(array).__module__.startswith("numba.")


def _has_dlpack(array: Any) -> bool:
    device = getattr(array, "__dlpack_device__", None)
    return device is not None and int(device()[0]) == dlpack.CUDA


def _is_dense(shape: Sizes, strides: Sizes, itemsize: int) -> bool:
    """Whether the elements lie side by side, in whatever order of the dimensions."""
    step = itemsize
    for stride, size in sorted(zip(strides, shape, strict=False)):
        if size != 1 and stride != step:
            return False
        step *= size
    return bool(strides)


def _device_of(address: int) -> int:
    """The number of the device that memory is on, which __cuda_array_interface__ does not tell."""
    if len(cuda.gpus) == 1:
        return 0
    if address == 0:  # of an empty array
        return int(cuda.current_context().device.id)
    from numba.cuda.cudadrv import driver

    attribute = driver.binding.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(driver.driver.cuPointerGetAttribute(attribute, driver.binding.CUdeviceptr(address)))


def _wait_for(other: int, device: int) -> None:
    """Let the default stream wait for what is in another one by now."""
    with cuda.gpus[device]:
        event = cuda.event(timing=False)
        event.record(cuda.external_stream(other))
        event.wait(cuda.legacy_default_stream())


_this: Any = sys.modules[__name__]
