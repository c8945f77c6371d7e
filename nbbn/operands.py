"""What users pass beside the input, checked and brought to the form that the Dispatcher takes."""

from collections.abc import Callable
from typing import Any

import numpy as np

from nbbn import dtypes
from nbbn.layout import Sizes

Array = np.ndarray


def as_input(value: Any, argument: str = "inputs") -> Array:
    """A float array of rank 1 or more. Raises: TypeError for another dtype, ValueError for a scalar."""
    x = dtypes.as_float_array(value, argument)
    if x.ndim == 0:
        raise ValueError(f"{argument} must have at least one dimension; received a scalar of shape ()")
    return x


def check_out(out: Any, x: Array) -> None:
    """Raises: TypeError or ValueError unless `out` is a writable array of the shape and dtype of the result."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a NumPy array; received {type(out).__name__}")
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"out must have the shape {x.shape} and dtype {x.dtype.name} of the result; "
            f"received shape {out.shape} and dtype {out.dtype.name}"
        )
    broadcast = any(stride == 0 and size > 1 for stride, size in zip(out.strides, out.shape, strict=True))
    if not (out.flags.writeable and out.flags.aligned) or broadcast:
        raise ValueError("out must be writable memory of its own; received a read-only, unaligned or broadcast array")


def as_weights(mask: Any, shape: Sizes, axis: Sizes, argument: str = "mask") -> Array:
    """The weight of every element in the moments, broadcast to `shape`.

    Args:
        mask: bool (True counts) or real weights >= 0, of the input's rank, or broadcast against the dimensions that
            are not in `axis`.
    """
    array = np.asarray(mask)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"{argument} must be bool or real; received dtype {array.dtype.name}")
    reduced = tuple(s for i, s in enumerate(shape) if i not in axis)
    full, target = array, shape
    if array.ndim <= len(reduced):
        full, target = np.expand_dims(array.reshape((1,) * (len(reduced) - array.ndim) + array.shape), axis), shape
    try:
        if full.ndim != len(shape):
            raise ValueError
        weights = np.broadcast_to(full, target)
    except ValueError:
        raise ValueError(
            f"{argument} must broadcast against the input's non-feature dimensions {reduced} or its shape {shape}; "
            f"received shape {array.shape}"
        ) from None
    if array.dtype.kind != "b" and not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError(
            f"{argument} must be finite and not negative; received values from {array.min()} to {array.max()}"
        )
    return weights


def as_adjustment(adjustment: Callable[[Sizes], Any], shape: Sizes) -> tuple[Array, Array]:
    """The pair (a, b) for an input of this shape, each checked to broadcast against it."""
    pair = adjustment(shape)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"adjustment must return a pair (scale, bias); received {type(pair).__name__}")
    arrays = []
    for name, value in zip(("scale", "bias"), pair, strict=True):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
            raise TypeError(f"adjustment's {name} must be real; received dtype {array.dtype.name}")
        try:
            np.broadcast_to(array, shape)
        except ValueError:
            message = f"adjustment's {name} must broadcast against the input's shape {shape}; received {array.shape}"
            raise ValueError(message) from None
        arrays.append(array)
    return arrays[0], arrays[1]


def spread(array: Array, shape: Sizes, dtype: np.dtype) -> Array:
    """`array` in `dtype`, broadcast to `shape` without taking its memory."""
    return np.broadcast_to(array.astype(dtype, copy=False), shape)


def sum_to(array: Array, like: Array, default: np.dtype) -> Array:
    """The gradient of broadcasting: `array` summed to the shape of `like`, in its dtype if that is a float."""
    extra = array.ndim - like.ndim
    axes = tuple(range(extra)) + tuple(i + extra for i, s in enumerate(like.shape) if s == 1)
    dtype = like.dtype if like.dtype.name in dtypes.NAMES else default
    total: Array = array.sum(axis=axes, dtype=np.float64)
    return total.reshape(like.shape).astype(dtype)
