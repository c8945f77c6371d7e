"""Tensors as nbbn's Arrays, and back."""

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from nbbn.arrays import Array, as_array
from nbbn.arrays.host import beside
from nbbn.core import dtypes

MaybeTensor: TypeAlias = Tensor | None
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def array_of(tensor: Tensor, argument: str = "input") -> Array:
    """A view of the tensor's memory. Raises: TypeError for a dtype that is none of DTYPES."""
    if tensor.dtype not in DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{argument} must be a tensor of {accepted}; received {tensor.dtype}")
    tensor = tensor.detach().resolve_neg()
    if tensor._is_zerotensor():  # which has no memory
        tensor = tensor.clone()
    return numpy_of(tensor) if tensor.is_cpu else as_array(tensor, argument)


def numpy_of(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor on the host."""
    if tensor.dtype is torch.bfloat16:
        found: np.ndarray = tensor.view(torch.int16).numpy().view(dtypes.resolve("bfloat16"))
        return found
    found = tensor.numpy()
    return found


def tensor_of(array: Array) -> Tensor:
    """The tensor over an Array of float32 or float64 that nbbn has made."""
    if isinstance(array, np.ndarray):
        return torch.from_numpy(array)
    found: Tensor = array.owner
    return found


def statistic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of parameters and statistics for an input's."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def rows_of(
    first: MaybeTensor, second: MaybeTensor, fill: tuple[float, float], like: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Two tensors (C,) on the host as the rows of one array, without a copy; a missing one is full of its `fill`.

    like: an array (C,) of the dtype and size that they must have.
    Returns: the array, and the rows, which have to live as long.
    Raises: ValueError if they have not, or are not contiguous.
    """
    rows = [
        np.full_like(like, value) if t is None else numpy_of(t.detach())
        for t, value in zip((first, second), fill, strict=True)
    ]
    if any(row.dtype != like.dtype or row.shape != like.shape for row in rows):
        raise ValueError("rows must be those of the input")
    return beside(*rows), rows


def check_saved(*tensors: MaybeTensor) -> None:
    """Raises: RuntimeError for what autograd cannot keep, of which it would speak after the call."""
    if any(t is not None and t.is_inference() for t in tensors):
        raise RuntimeError(
            "Inference tensors cannot be saved for backward: input, weight, bias and residual must have been made "
            "outside of torch.inference_mode(), or be clones made there; received one that was not"
        )


def align(mask: Tensor, x: Tensor, axis: int) -> Tensor:
    """A mask with as many dimensions as `x`, in the dtype of its statistics; what has fewer stands for the leading
    dimensions that are no features. Raises: TypeError, ValueError if it is no such mask."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor of bool, or of real weights; received {type(mask).__name__}")
    if mask.is_complex():
        raise TypeError(f"mask must be a tensor of bool, or of real weights; received {mask.dtype}")
    axis, shape = axis % x.dim(), tuple(mask.shape)
    if mask.dim() < x.dim():
        sizes = iter(shape)
        shape = tuple(1 if i == axis else next(sizes, 1) for i in range(x.dim()))
    if len(shape) != x.dim() or any(n not in (1, m) for n, m in zip(shape, x.shape, strict=True)):
        raise ValueError(
            f"mask must have the input's leading dimensions without features, as (N,) or (N, T), or broadcast against "
            f"its shape {tuple(x.shape)}; received shape {tuple(mask.shape)}"
        )
    return mask.detach().reshape(shape).to(x.device, statistic(x.dtype))
