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
    broadcast = out.size and any(n > 1 and s == 0 for n, s in zip(out.shape, out.strides, strict=True))
    if not (out.flags.writeable and out.flags.aligned) or broadcast:
        raise ValueError("out must be writable memory of its own; received a read-only, unaligned or broadcast array")


def as_residual(value: Any, x: Array) -> Array:
    """An array of the shape and dtype of `x`. Raises: TypeError, ValueError for another shape or no float dtype."""
    residual = dtypes.as_float_array(value, "residual")
    if residual.shape != x.shape:
        raise ValueError(f"residual must have the input's shape {x.shape}; received {residual.shape}")
    return residual.astype(x.dtype, copy=False)


def as_weights(mask: Any, shape: Sizes, axis: Sizes, dtype: np.dtype, argument: str = "mask") -> Array:
    """The weight of every element in the moments: a copy in `dtype`, broadcast to `shape` without taking its memory.

    Args:
        mask: bool (True counts) or real weights >= 0, of the input's rank, or broadcast against the dimensions that
            are not in `axis`.
    """
    array = np.asarray(mask)
    check_real(array, argument)
    reduced = tuple(s for i, s in enumerate(shape) if i not in axis)
    with np.errstate(over="ignore"):  # what does not fit is infinite, and refused below
        full = array.astype(dtype)
    if array.ndim <= len(reduced):
        full = np.expand_dims(full.reshape((1,) * (len(reduced) - array.ndim) + array.shape), axis)
    try:
        if full.ndim != len(shape):
            raise ValueError
        weights = np.broadcast_to(full, shape)
    except ValueError:
        raise ValueError(
            f"{argument} must broadcast against the input's non-feature dimensions {reduced} or its shape {shape}; "
            f"received shape {array.shape}"
        ) from None
    if not (np.isfinite(full).all() and (full >= 0).all()):
        raise ValueError(
            f"{argument} must be finite in {dtype.name} and not negative; "
            f"received values from {array.min()} to {array.max()}"
        )
    return weights


def as_adjustment(adjustment: Callable[[Sizes], Any], shape: Sizes, dtype: np.dtype) -> tuple[Array, Array]:
    """The pair (a, b) for an input of this shape: copies in `dtype`, which broadcast against it."""
    pair = adjustment(shape)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"adjustment must return a pair (scale, bias); received {type(pair).__name__}")
    a, b = (_as_operand(v, shape, dtype, f"adjustment's {n}") for n, v in zip(("scale", "bias"), pair, strict=True))
    return a, b


def _as_operand(value: Any, shape: Sizes, dtype: np.dtype, argument: str) -> Array:
    array = np.asarray(value)
    check_real(array, argument)
    try:
        np.broadcast_to(array, shape)
    except ValueError:
        message = f"{argument} must broadcast against the input's shape {shape}; received shape {array.shape}"
        raise ValueError(message) from None
    return array.astype(dtype)


def check_real(array: Array, argument: str) -> None:
    """Raises: TypeError unless the array holds bools, integers or floats."""
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"{argument} must be bool or real; received dtype {array.dtype.name}")


def sum_to(array: Array, shape: Sizes, dtype: np.dtype) -> Array:
    """The gradient of broadcasting: `array` summed to `shape`."""
    extra = array.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(i + extra for i, s in enumerate(shape) if s == 1)
    total: Array = array.sum(axis=axes, dtype=np.float64)
    return total.reshape(shape).astype(dtype)
