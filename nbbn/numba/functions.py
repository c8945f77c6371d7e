"""The functions as Python sees them, by way of the Dispatcher; overloads.py has what compiled functions call."""

import math
from functools import lru_cache
from typing import Any

import numpy as np

from nbbn.arrays.host import beside
from nbbn.core import dtypes
from nbbn.core.options import MOMENTUM, Numbers, Options, check_clip_values, check_number
from nbbn.engine.base import Operands
from nbbn.engine.dispatcher import Dispatcher

Array = np.ndarray


def batch_norm_train(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    moving_mean: Array | None,
    moving_variance: Array | None,
    axis: int = -1,
    epsilon: float = 1e-3,
    momentum: float = 0.99,
    out: Array | None = None,
    residual: Array | None = None,
    weights: Array | None = None,
    activation: str | None = None,
    bessel_correction: bool = False,
    renorm: tuple[Array, Array, Array] | None = None,
    renorm_momentum: float = 0.99,
    rmin: float = 0.0,
    rmax: float = math.inf,
    dmax: float = math.inf,
    virtual_batch_size: int | None = None,
) -> tuple[Array, Array]:
    """Normalize with the mean and variance of the batch, and update the moving statistics in place.

        y = activation((x - mean) / sqrt(variance + epsilon) * gamma + beta + residual)

    To be called from functions that Numba compiles, and from Python. Which of the arguments are None, and `activation`,
    must be known when a function is compiled. It runs on one thread: in a `prange` loop every iteration needs moving
    statistics of its own, or None.

    Args:
        x: (…) float32 or float64, with any strides. C is its size along `axis`, an integer that may be negative.
        gamma, beta: (C,) float32, of a float64 x float64; None stands for ones and zeros.
        moving_mean, moving_variance: (C,) float32 or float64, written to; None, both, if nobody needs them.
        momentum: the weight of the old value.
        out: for y; it may be x. residual: is added before the activation. Both have shape and dtype of x.
        weights: shape of x, dtype of gamma, at least 0: how much each value counts in the statistics.
        activation: "relu" or None.
        bessel_correction: whether moving_variance gets the unbiased variance.
        renorm: (moving_stddev, renorm_mean, renorm_stddev), each like moving_mean and written to, for batch
            renormalization with renorm_momentum and r clipped to rmin and rmax, d to dmax.
        virtual_batch_size: samples of a group with statistics of its own; sample n is in group n % G.
    Returns: y, which is `out` if that was given, and `saved`, (9, G * C) float64, which batch_norm_backward needs; the
        rows 1 and 2 are the batch's mean and its sum of squared differences from it.
    Raises: numba.TypingError when a function is compiled, TypeError in Python, for a wrong dtype, rank or constant;
        ValueError for shapes and numbers that do not fit. Both name the argument, and nothing has changed.
    """
    _check_arrays(x, axis, weights, out=out, residual=residual)
    check_number("momentum", momentum, 1.0, MOMENTUM)
    check_number("renorm_momentum", renorm_momentum, 1.0, MOMENTUM)
    bounds = check_clip_values({"rmin": rmin, "rmax": rmax, "dmax": dmax})
    run = _dispatcher(axis, epsilon, activation, bool(bessel_correction), renorm is not None, virtual_batch_size)
    channels = x.shape[axis]
    params, rows = _params(x, gamma, beta, channels), _state_rows(moving_mean, moving_variance, renorm, channels)
    state = _together(rows) if rows else np.ones((2, channels), dtypes.statistic(x.dtype))
    y, new_state, saved = run.train(
        x,
        params,
        state,
        Operands(residual, weights),
        numbers=Numbers(momentum, renorm_momentum, **bounds),
        out=out,
        in_place=True,
    )
    for row, new in zip(rows, new_state, strict=False):
        row[...] = new
    return y, saved


def batch_norm_infer(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    moving_mean: Array,
    moving_variance: Array,
    axis: int = -1,
    epsilon: float = 1e-3,
    out: Array | None = None,
    residual: Array | None = None,
    activation: str | None = None,
) -> Array:
    """Normalize with the moving statistics.

        y = activation((x - moving_mean) / sqrt(moving_variance + epsilon) * gamma + beta + residual)

    Args, Raises: as for batch_norm_train().
    Returns: y, which is `out` if that was given.
    """
    _check_arrays(x, axis, None, out=out, residual=residual)
    channels = x.shape[axis]
    rows = _state_rows(moving_mean, moving_variance, None, channels, required=True)
    run = _dispatcher(axis, epsilon, activation, False, False, None)
    y: Array = run.infer(x, _params(x, gamma, beta, channels), _together(rows), residual=residual, out=out)
    return y


def batch_norm_backward(
    dy: Array,
    x: Array,
    saved: Array,
    axis: int = -1,
    out: Array | None = None,
    residual: Array | None = None,
    weights: Array | None = None,
    activation: str | None = None,
    virtual_batch_size: int | None = None,
) -> tuple[Array, ...]:
    """The gradients of batch_norm_train().

    Args:
        dy: that of y, with its shape and dtype. saved: as batch_norm_train() returned it.
        out: for the gradient of x; it may be dy.
        x, axis, residual, weights, activation, virtual_batch_size: as they were given to batch_norm_train().
    Returns: the gradients of x, gamma and beta; with a residual, as a fourth, that of the residual, which without an
        activation is dy itself.
    Raises: as batch_norm_train().
    """
    _check_arrays(x, axis, weights, dy=dy, out=out, residual=residual)
    dtypes.check(saved.dtype, "saved", floats=True)
    run = _dispatcher(axis, 0.0, activation, False, False, virtual_batch_size)
    own, wants_dz = np.ascontiguousarray(saved, np.float64), residual is not None
    operands = Operands(residual, weights)
    dx, dparams, dz = run.backward(dy, x, own, operands, training=True, out=out, wants_dz=wants_dz)
    gradients: tuple[Any, ...] = dx, dparams[0], dparams[1], dz
    return gradients if wants_dz else gradients[:3]


@lru_cache(maxsize=256)
def _dispatcher(
    axis: int, epsilon: float, activation: str | None, bessel: bool, renorm: bool, virtual_batch_size: int | None
) -> Dispatcher:
    options: dict[str, Any] = {"renorm": renorm, "virtual_batch_size": virtual_batch_size, "activation": activation}
    return Dispatcher(Options(axis=axis, epsilon=epsilon, bessel_correction=bessel, **options))


def _check_array(name: str, array: Any, dtype: np.dtype | None, shape: tuple[int, ...] | None, accepted: str) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array; received {type(array).__name__}")
    dtypes.check(array.dtype, name, floats=True)
    if dtype is not None and array.dtype != dtype:
        raise TypeError(f"{name} must be an array of {dtype.name}; received {dtypes.describe(array.dtype)}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} must have {accepted} {shape}; received {array.shape}")


def _check_arrays(x: Any, axis: Any, weights: Any, **like_x: Any) -> None:
    """Raises: TypeError, ValueError for what is no array, or not like x."""
    _check_array("x", x, None, None, "")
    if not isinstance(axis, (int, np.integer)) or isinstance(axis, bool):
        raise TypeError(f"axis must be an integer; received {axis!r}")
    if not -x.ndim <= axis < x.ndim:
        limits = f"between {-x.ndim} and {x.ndim - 1} for an input of rank {x.ndim}"
        raise ValueError(f"axis must be {limits}; received {axis}")
    for name, array in like_x.items():
        if array is not None:
            _check_array(name, array, x.dtype, x.shape, "the shape of x,")
    if weights is not None:
        _check_array("weights", weights, dtypes.statistic(x.dtype), x.shape, "the shape of x,")


def _params(x: Array, gamma: Array | None, beta: Array | None, channels: int) -> Array:
    rows = {"gamma": gamma, "beta": beta}
    for name, row in rows.items():
        if row is not None:
            _check_array(name, row, dtypes.statistic(x.dtype), (channels,), "a number per channel,")
    own = [np.full(channels, i, dtypes.statistic(x.dtype)) if r is None else r for i, r in ((1, gamma), (0, beta))]
    if gamma is None or beta is None:
        return np.stack(own)  # of a row that was made here nobody else would keep the memory
    return _together(own)


def _state_rows(mean: Any, variance: Any, renorm: Any, channels: int, required: bool = False) -> list[Array]:
    """The rows of the state, which is none where nobody needs it."""
    if renorm is not None and (not isinstance(renorm, tuple) or len(renorm) != 3 or mean is None):
        accepted = "None or (moving_stddev, renorm_mean, renorm_stddev), beside moving_mean and moving_variance"
        raise TypeError(f"renorm must be {accepted}; received {renorm!r}")
    if mean is None and variance is None and not required:
        return []
    names = "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev"
    rows = [mean, variance, *(renorm or ())]
    for name, row in zip(names, rows, strict=False):
        _check_array(name, row, getattr(mean, "dtype", None), (channels,), "a number per channel,")
    return rows


def _together(rows: list[Array]) -> Array:
    """Rows as kernels take them, in their place where that is possible."""
    if len(rows) == 2 and all(r.flags.c_contiguous and r.flags.aligned for r in rows):
        return beside(*rows)
    return np.stack(rows)
