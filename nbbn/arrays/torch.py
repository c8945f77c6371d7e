"""PyTorch's tensors. On a GPU: its allocator, and the stream that is current when a call is made."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from nbbn.arrays.device import DeviceArray
from nbbn.core import dtypes
from nbbn.core.layout import Sizes

# What torch.cuda.current_stream() asks, without an object made around the answer; builds without CUDA have none.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def is_device_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


def is_writable(array: Any) -> bool:
    return True


def describe(array: Any) -> tuple[int, Sizes, Sizes, np.dtype, int]:
    """Raises: ValueError as _check()."""
    _check(array)
    dtype = _to_numpy(array.dtype)
    size = dtype.itemsize
    # A device's number is None for the CPU, on which the tests of this module run.
    device = array.device.index or 0
    return array.data_ptr(), tuple(array.shape), tuple([s * size for s in array.stride()]), dtype, device


def _check(array: Any) -> None:
    """Raises: ValueError for a tensor that autograd follows, a negative view, and memory without strides."""
    if array.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "autograd does not see what nbbn computes: a tensor with requires_grad=True must be passed as "
            "tensor.detach(), or inside torch.no_grad(); the layer's vjp() gives the gradients, and the modules of "
            "nbbn.torch take part in autograd"
        )
    if array.layout is not torch.strided or array.is_neg():
        raise ValueError(
            f"a tensor must have strides, and no negation that is still to come; received layout {array.layout}, "
            f"is_neg() {array.is_neg()}: tensor.to_dense() and tensor.resolve_neg() give such a one"
        )


def address(array: Any) -> int:
    return int(array.data_ptr())


def empty(shape: Sizes, dtype: np.dtype, device: int) -> Any:
    return torch.empty(shape, dtype=_to_torch(dtype), device=_device(device))


def empty_like(array: Any) -> Any:
    return torch.empty_like(array)  # in the memory format of the array


def from_host(array: np.ndarray, device: int) -> Any:
    owned = np.array(array, order="C")  # PyTorch warns of memory that it must not write to
    return _from_numpy(owned).to(_device(device))


def send(array: np.ndarray, device: int) -> Any:
    # PyTorch keeps pinned memory until the copy is done, and then for others.
    return _pinned(_from_numpy(np.array(array, order="C"))).to(_device(device), non_blocking=True)


def to_host(array: Any) -> np.ndarray:
    return _as_numpy(array.detach().cpu())


def stream(device: int) -> int:
    if _raw_stream is not None:
        return int(_raw_stream(device))
    return int(torch.cuda.current_stream(device).cuda_stream)


def finish(device: int) -> None:
    """Nothing: PyTorch's own work comes after, in the same stream."""


def astype(array: Any, dtype: np.dtype) -> Any:
    return array.detach().to(_to_torch(dtype), copy=True)


def copy(array: DeviceArray, sizes: Sizes, order: Sizes) -> Any:
    seen = array.owner.detach().expand(array.shape).reshape(sizes).permute(order)
    return seen.clone(memory_format=torch.contiguous_format)


def assign(array: DeviceArray, sizes: Sizes, order: Sizes, value: Any) -> None:
    array.owner.detach().view(sizes).permute(order).copy_(value)


# -- in the host's memory ----------------------------------------------------------------------------------------------


def is_host_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cpu


def view(array: Any) -> np.ndarray:
    """Raises: ValueError as _check()."""
    _check(array)
    return _as_numpy(array.detach() if array.requires_grad else array)


def giver(array: Any) -> Callable[[np.ndarray], Any]:
    return _from_numpy


def _as_numpy(array: Any) -> np.ndarray:
    """The same memory, of a tensor of the host that autograd does not follow."""
    if array.dtype is torch.bfloat16:  # which NumPy knows by another package
        return array.view(torch.int16).numpy().view(_to_numpy(torch.bfloat16))  # type: ignore[no-any-return]
    return array.numpy()  # type: ignore[no-any-return]


def _from_numpy(array: np.ndarray) -> Any:
    """The same memory as a tensor."""
    if array.dtype.itemsize == 2 and array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _pinned(tensor: Any) -> Any:
    return tensor.pin_memory()


@lru_cache(maxsize=64)
def _device(number: int) -> Any:
    return torch.device("cuda", number)


@lru_cache(maxsize=64)
def _to_numpy(dtype: Any) -> np.dtype:
    """Raises: TypeError for a dtype that NumPy has no equal of."""
    name = str(dtype).removeprefix("torch.")
    return dtypes.resolve(name) if name == "bfloat16" else np.dtype(name)


@lru_cache(maxsize=64)
def _to_torch(dtype: np.dtype) -> Any:
    return getattr(torch, dtype.name)
