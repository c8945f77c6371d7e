"""What users pass beside the input, checked and brought to the input's place and shape."""

import reprlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from nbbn.arrays import Array, Place, as_array, as_numpy, numbers_of, place_of
from nbbn.core import dtypes
from nbbn.core.layout import Sizes


def as_input(value: Any, argument: str = "inputs", floats: bool = True) -> Array:
    """An array of rank 1 or more, of floats or, where those will do, too, of bools or integers.

    Raises: TypeError for another dtype, ValueError for a scalar.
    """
    x = as_array(value, argument, floats)
    if x.ndim == 0:
        raise ValueError(f"{argument} must have at least one dimension; received a scalar of shape ()")
    return x


def as_out(value: Any, x: Array) -> Array:
    """Where to write a result like `x`.

    Raises: TypeError or ValueError unless it is writable memory of the shape and dtype of the result, where `x` is.
    """
    out = place_of(x).take_out(value)
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"out must have the shape {x.shape} and dtype {x.dtype.name} of the result; "
            f"received shape {out.shape} and {dtypes.describe(out.dtype)}"
        )
    if out.size and any(n > 1 and s == 0 for n, s in zip(out.shape, out.strides, strict=True)):
        raise ValueError("out must be writable memory of its own; received a broadcast array")
    return out


def as_like(value: Any, x: Array, argument: str, whose: str) -> Array:
    """An array of the shape and dtype of `x`, where `x` is. Raises: TypeError, ValueError for another shape."""
    place = place_of(x)
    array = place.take(value, argument)
    if array.shape != x.shape:
        raise ValueError(f"{argument} must have {whose} shape {x.shape}; received {array.shape}")
    return place.astype(array, x.dtype)


def refuse_overlap(out: Array | None, needed: list[Array | None], message: str) -> None:
    """Raises: ValueError if `out` may share memory with what is needed later."""
    if out is not None and any(a is not None and place_of(out).overlap(out, a) for a in needed):
        raise ValueError(message)


def as_weights(mask: Any, x: Array, kept: Sizes, dtype: np.dtype, argument: str = "mask") -> Array:
    """The weight of every element in the moments: own_weights(), broadcast to the shape of `x`."""
    return place_of(x).broadcast(own_weights(mask, x, kept, dtype, argument), x.shape)


def own_weights(mask: Any, x: Array, kept: Sizes, dtype: np.dtype, argument: str = "mask") -> Array:
    """Weights as a copy in `dtype`, with the dimensions of `x`, of size 1 where they are the same for all; beside a
    C-contiguous `x` they are C-contiguous, too.

    Args:
        mask: bool (True counts) or real weights >= 0. With fewer dimensions than `x` they are its leading ones that are
            not in `kept`; with as many it broadcasts as in NumPy. The values of one that lies on a GPU are not looked
            at, which would have to wait.
    """
    place, reduced = place_of(x), tuple(s for i, s in enumerate(x.shape) if i not in kept)
    in_order = isinstance(x, np.ndarray) and x.flags.c_contiguous  # as the input, or the two have no common view
    weights = taken_weights(mask, place, dtype, argument, "C" if in_order else "K")
    shape = weights.shape
    if len(shape) <= len(reduced):
        sizes = iter(shape)
        shape = tuple(1 if i in kept else next(sizes, 1) for i in range(x.ndim))
    if len(shape) != x.ndim or any(n != size and n != 1 for n, size in zip(shape, x.shape, strict=True)):
        batch_first = f"leading non-feature dimensions {reduced} (batch first) or, with {x.ndim} dimensions, its "
        raise ValueError(
            f"{argument} must broadcast against the input's {batch_first if kept else ''}shape {x.shape}; "
            f"received shape {weights.shape}"
        )
    return place.reshape(weights, shape)


def taken_weights(mask: Any, place: Place, dtype: np.dtype, argument: str, order: Literal["C", "K"] = "K") -> Array:
    """Weights as a copy in `dtype`, in their own shape. order: in the host's memory."""
    array = place.take_operand(mask, argument)
    if array is None:
        return _weights_of_host(mask, place, dtype, argument, order)
    dtypes.check(array.dtype, argument, floats=False)
    return place.astype(array, dtype, copy=True)


class Lengths(NamedTuple):
    """How many steps of each sample count, in the place of a mask. mask: what was passed beside them."""

    value: Any
    mask: Any


def refuse_both(mask: Any) -> None:
    """Raises: ValueError for lengths beside a mask."""
    if isinstance(mask, Lengths) and mask.mask is not None:
        raise ValueError("mask and lengths both say what counts: pass one of them; received both")


def as_lengths(value: Any, x: Array, steps: int) -> Array:
    """int64, where `x` is; on the host a copy. Of lengths that lie on a GPU the values are not looked at, which would
    have to wait: one below 0 means 0, and one above the number of steps means all.

    Raises: TypeError for what are no integers; ValueError unless there is one for each sample of `x`, from 0 to the
        size of its dimension `steps`.
    """
    dtypes.refuse_masked(value, "lengths")
    place = place_of(x)
    array = place.take_operand(value, "lengths")
    if array is not None:
        _check_lengths(array, x)
        return place.astype(array, np.dtype(np.int64))
    try:
        found, most = as_numpy(value, "lengths"), x.shape[steps]
    except TypeError as error:  # of numbers of any kind
        raise TypeError(f"lengths must be integers; received {reprlib.repr(value)}") from error
    _check_lengths(found, x)
    if found.size and not (found.min() >= 0 and found.max() <= most):
        raise ValueError(
            f"lengths must be from 0 to {most}, the size of dimension {steps} of the input; "
            f"received values from {found.min()} to {found.max()}"
        )
    return place.send(found.astype(np.int64))


def _check_lengths(lengths: Array, x: Array) -> None:
    if lengths.dtype.kind not in "iu" and lengths.size:
        raise TypeError(f"lengths must be integers; received {dtypes.describe(lengths.dtype)}")
    if lengths.shape != x.shape[:1]:
        raise ValueError(f"lengths must have shape {x.shape[:1]}, one for each sample; received {lengths.shape}")


def _weights_of_host(mask: Any, place: Place, dtype: np.dtype, argument: str, order: Literal["C", "K"]) -> Array:
    array = numbers_of(mask, argument)
    if array.dtype == np.bool_:  # there are no wrong values
        return place.send(array.astype(dtype, order))
    with np.errstate(over="ignore"):  # what does not fit is infinite, and refused below
        weights = array.astype(dtype, order)
    if weights.size and not 0 <= weights.min() <= weights.max() < np.inf:  # nor if one of them is NaN
        raise ValueError(
            f"{argument} must be finite in {dtype.name} and not negative; "
            f"received values from {array.min()} to {array.max()}"
        )
    if not weights.any() and array.any():
        raise ValueError(f"{argument} must be more than 0 in {dtype.name} somewhere; received at most {array.max()}")
    return place.send(weights)


def as_adjustment(adjustment: Callable[[Sizes], Any], x: Array, dtype: np.dtype) -> tuple[Array, Array]:
    """The pair (a, b) for the input: copies in `dtype`, which broadcast against it."""
    pair = adjustment(x.shape)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"adjustment must return a pair (scale, bias); received {type(pair).__name__}")
    a, b = (_as_operand(v, x, dtype, f"adjustment's {n}") for n, v in zip(("scale", "bias"), pair, strict=True))
    return a, b


def _as_operand(value: Any, x: Array, dtype: np.dtype, argument: str) -> Array:
    place = place_of(x)
    array = place.take_operand(value, argument)
    if array is None:
        array = place.send(numbers_of(value, argument).astype(dtype))
    else:
        dtypes.check(array.dtype, argument, floats=False)
        array = place.astype(array, dtype, copy=True)
    try:
        place.broadcast(array, x.shape)
    except ValueError:
        message = f"{argument} must broadcast against the input's shape {x.shape}; received shape {array.shape}"
        raise ValueError(message) from None
    return array
