"""Stateless batch normalization, with the names and signatures of tf.nn.

Arrays are those that a layer takes, on the host and on a GPU. Results are of the library of the first argument, where
that is; what stands beside it may be on the host, too. To a type checker they are NumPy's arrays.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import numpy as np

from nbbn.arrays import Array, Place, giver, numbers_of, place_of
from nbbn.call.operands import as_input, as_like, taken_weights
from nbbn.core import dtypes
from nbbn.core.layout import Sizes, resolve_axis
from nbbn.core.options import EPSILON, Options, boolean, check_number, parse_ints
from nbbn.engine.dispatcher import Dispatcher
from nbbn.kernels import channel

_Function = TypeVar("_Function", bound=Callable[..., Any])

_FUSED_AXIS = {"NHWC": (4, 3), "NCHW": (4, 1), "NDHWC": (5, 4), "NCDHW": (5, 1)}


@lru_cache(maxsize=64)  # a dispatcher remembers what it has found out about earlier arrays
def _dispatcher(axis: int | Sizes, epsilon: float = 0.0, momentum: float = 0.0, bessel: bool = True) -> Dispatcher:
    return Dispatcher(Options(axis=axis, momentum=momentum, epsilon=epsilon, bessel_correction=bessel))


def _as_given(function: _Function) -> _Function:
    """Results are arrays of the library of the first argument."""
    (first, *_) = function.__code__.co_varnames

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        give = giver(args[0] if args else kwargs[first])
        if give is None:
            return found
        return tuple(map(give, found)) if isinstance(found, tuple) else give(found)

    return cast(_Function, call)


def _input(value: Any) -> Array:
    return as_input(value, "x")


def _operand(value: Any, name: str, place: Place) -> Array:
    """Numbers that stand beside the input, where that is."""
    array = place.take_operand(value, name)
    if array is None:
        return place.send(numbers_of(value, name))
    dtypes.check(array.dtype, name, floats=False)
    return array


def _rows(arrays: Sequence[Array], shape: Sizes, x: Array) -> Array:
    """Arrays that broadcast to `shape`, one after the other, in the dtype of the statistics of `x`."""
    place = place_of(x)
    rows = place.empty((len(arrays), *shape), dtypes.statistic(x.dtype))
    for i, array in enumerate(arrays):
        place.put(place.cut(rows, slice(i, i + 1)), array)
    return rows


def _axes(axes: int | Sequence[int] | np.ndarray, rank: int) -> Sizes:
    parsed = parse_ints("axes", axes)
    return resolve_axis([parsed] if isinstance(parsed, int) else parsed, rank, "axes")


def _keepdims(keepdims: bool | None, keep_dims: bool | None) -> bool:
    if keepdims is not None and keep_dims is not None:
        raise ValueError(f"keepdims and keep_dims are one; received keepdims={keepdims!r} and keep_dims={keep_dims!r}")
    name, given = ("keepdims", keepdims) if keep_dims is None else ("keep_dims", keep_dims)
    return given is not None and boolean(name, given)


def _with_channels(x: Array, kept: Sizes) -> tuple[Array, Sizes]:
    """x with a kept axis: one of size 1 in front where there is none."""
    return (x, kept) if kept else (place_of(x).reshape(x, (1, *x.shape)), (0,))


def _moments(x: Array, weights: Array | None, reduced: Sizes, keepdims: bool) -> tuple[Any, Any]:
    kept, place = tuple(i for i in range(x.ndim) if i not in reduced), place_of(x)
    shape = tuple(s if i in kept else 1 for i, s in enumerate(x.shape))
    channels = math.prod(shape)
    if x.size == 0:
        found = place.send(np.full((2, channels), np.nan if weights is None else 0.0, x.dtype))
    else:
        seen, axis = _with_channels(x, kept)
        weights = weights if weights is None else place.broadcast(weights, seen.shape)
        dispatcher, nothing = _dispatcher(axis, bessel=False), place.send(np.zeros((2, channels)))
        # With a momentum of 0 the moving statistics are the batch's. Where nothing counts they stay what they were: 0.
        found, _, _ = dispatcher.finish(
            dispatcher.reduce(seen, weights), nothing, nothing, rank=seen.ndim, dtype=nothing.dtype
        )
    found, shape = place.astype(found, x.dtype), shape if keepdims else tuple(x.shape[i] for i in kept)
    return place.row(found, channel.MEAN, shape), place.row(found, channel.VARIANCE, shape)


@_as_given
def moments(
    x: Any,
    axes: int | Sequence[int] | np.ndarray,
    shift: None = None,
    name: str | None = None,
    keepdims: bool | None = None,
    keep_dims: bool | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance of `x` over `axes`, in its dtype.

    Args:
        x: float array. axes: the dimensions that are reduced.
        shift, name: not used, as in TensorFlow.
        keepdims: keep the reduced dimensions with size 1. keep_dims: TensorFlow 1's name for it.
    Returns: mean, variance; NaN where there is no value.
    """
    x = _input(x)
    return _moments(x, None, _axes(axes, x.ndim), _keepdims(keepdims, keep_dims))


@_as_given
def weighted_moments(
    x: Any,
    axes: int | Sequence[int] | np.ndarray,
    frequency_weights: Any,
    name: str | None = None,
    keepdims: bool | None = None,
    keep_dims: bool | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance of `x` over `axes`, each value counted `frequency_weights` times.

    Args: as of moments(); frequency_weights: real, >= 0, broadcasts against x.
    Returns: mean, variance; 0 where the weights sum to 0, as in TensorFlow.
    """
    x = _input(x)
    place = place_of(x)
    weights = taken_weights(frequency_weights, place, dtypes.statistic(x.dtype), "frequency_weights")
    try:
        weights = place.broadcast(weights, x.shape)
    except ValueError:
        received = f"received shape {weights.shape}"
        raise ValueError(f"frequency_weights must broadcast against the shape {x.shape} of x; {received}") from None
    return _moments(x, weights, _axes(axes, x.ndim), _keepdims(keepdims, keep_dims))


@_as_given
def batch_normalization(
    x: Any, mean: Any, variance: Any, offset: Any, scale: Any, variance_epsilon: float, name: str | None = None
) -> np.ndarray:
    """(x - mean) / sqrt(variance + variance_epsilon) * scale + offset, in the dtype of x.

    Args:
        x: float array. mean, variance: arrays that broadcast with x. offset, scale: likewise, or None.
    Raises: TypeError, ValueError for arguments that are not possible or do not broadcast.
    """
    x = _input(x)
    check_number("variance_epsilon", variance_epsilon, np.inf, EPSILON)
    operands = {"scale": 1.0 if scale is None else scale, "offset": 0.0 if offset is None else offset}
    operands |= {"mean": mean, "variance": variance}
    place = place_of(x)
    arrays = [_operand(o, name, place) for name, o in operands.items()]
    try:
        shape = np.broadcast_shapes(x.shape, *(a.shape for a in arrays))
    except ValueError:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in zip(operands, arrays, strict=True))
        raise ValueError(f"x and what stands beside it must broadcast; received x {x.shape}, {shapes}") from None
    padded = [place.reshape(a, (1,) * (len(shape) - a.ndim) + a.shape) for a in arrays]
    kept = tuple(i for i in range(len(shape)) if any(a.shape[i] != 1 for a in padded))  # where an operand varies
    numbers = _rows(padded, tuple(s if i in kept else 1 for i, s in enumerate(shape)), x)
    numbers = place.reshape(numbers, (len(operands), math.prod(numbers.shape[1:])))
    y = place.empty_like(x) if x.shape == shape else place.empty(shape, x.dtype)
    seen, axis = _with_channels(place.broadcast(x, shape), kept)
    params, state = place.cut(numbers, slice(2)), place.cut(numbers, slice(2, 4))
    _dispatcher(axis, float(variance_epsilon)).infer(seen, params, state, out=_with_channels(y, kept)[0])
    found: np.ndarray = place.give(y)
    return found


def _fused_dispatcher(x: Array, data_format: str, epsilon: float, momentum: float = 0.0) -> Dispatcher:
    check_number("epsilon", epsilon, np.inf, EPSILON)
    if not isinstance(data_format, str) or data_format not in _FUSED_AXIS:
        raise ValueError(f"data_format must be one of {list(_FUSED_AXIS)}; received {data_format!r}")
    rank, axis = _FUSED_AXIS[data_format]
    if x.ndim != rank:
        raise ValueError(f"x must have rank {rank} for data_format={data_format!r}; received shape {x.shape}")
    return _dispatcher(axis, float(epsilon), momentum)


def _per_channel(values: Sequence[Any], names: Sequence[str], x: Array, dispatcher: Dispatcher) -> Array:
    channels, place = x.shape[dispatcher.axis(x.ndim)[0]], place_of(x)
    arrays = [_operand(v, n, place) for v, n in zip(values, names, strict=True)]
    for name, array in zip(names, arrays, strict=True):
        if array.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), one value per channel; received {array.shape}")
    return _rows(arrays, (channels,), x)


@_as_given
def fused_batch_norm(
    x: Any,
    scale: Any,
    offset: Any,
    mean: Any = None,
    variance: Any = None,
    epsilon: float = 0.001,
    data_format: str = "NHWC",
    is_training: bool = True,
    name: str | None = None,
    exponential_avg_factor: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """TensorFlow's fused batch normalization.

    Args:
        x: rank 4 or 5 float array in `data_format` NHWC, NCHW, NDHWC or NCDHW. scale, offset: (C,).
        mean, variance: (C,): the statistics in inference; in training the running ones that the result blends with, not
            needed with an exponential_avg_factor of 1.
        epsilon: added to the variance.
        exponential_avg_factor: weight of the NEW value (1 - the layer's momentum).
    Returns: y; in training the running mean and variance, the latter with Bessel's correction; in inference those
        given.
    """
    x, is_training = _input(x), boolean("is_training", is_training)
    check_number("exponential_avg_factor", exponential_avg_factor, 1.0, "a number from 0 to 1")
    dispatcher = _fused_dispatcher(x, data_format, epsilon, 1.0 - float(exponential_avg_factor))
    params = _per_channel([scale, offset], ["scale", "offset"], x, dispatcher)
    for argument, value in (("mean", mean), ("variance", variance)):
        if value is not None:
            _operand(value, argument, place_of(x))
    given = mean is not None and variance is not None
    if not given and (not is_training or exponential_avg_factor != 1.0):
        raise ValueError(
            "mean and variance must be given when is_training=False or exponential_avg_factor is not 1; "
            f"received mean={mean!r}, variance={variance!r}"
        )
    statistics = [mean, variance] if given else [np.zeros(params.shape[1]), np.ones(params.shape[1])]
    state, place = _per_channel(statistics, ["mean", "variance"], x, dispatcher), place_of(x)
    if is_training:
        y, state, _ = dispatcher.train(x, params, state)
    else:
        y = dispatcher.infer(x, params, state)
    rows = (place.row(state, row, state.shape[1:]) for row in (channel.MEAN, channel.VARIANCE))
    return place.give(y), *rows


@_as_given
def fused_batch_norm_grad(
    y_backprop: Any,
    x: Any,
    scale: Any,
    mean: Any = None,
    variance: Any = None,
    epsilon: float = 0.001,
    data_format: str = "NHWC",
    is_training: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradients of fused_batch_norm with respect to x, scale and offset.

    Args:
        y_backprop: the gradient of y, of the shape and dtype of x.
        mean, variance: (C,) the statistics that inference used; not used in training, where those of x are taken.
    """
    x, is_training = _input(x), boolean("is_training", is_training)
    dy, place = as_like(y_backprop, x, "y_backprop", "x's"), place_of(x)
    dispatcher = _fused_dispatcher(x, data_format, epsilon)
    params = _per_channel([scale, np.zeros(x.shape[dispatcher.axis(x.ndim)[0]])], ["scale", "offset"], x, dispatcher)
    if not is_training:
        saved = dispatcher.freeze(params, _per_channel([mean, variance], ["mean", "variance"], x, dispatcher))
    elif x.size:  # of a state that nobody asks for
        _, saved, _ = dispatcher.finish(dispatcher.reduce(x), params, params, rank=x.ndim, dtype=x.dtype)
    else:
        _, _, saved = dispatcher.train(x, params, params)
    dx, dparams, _ = dispatcher.backward(dy, x, saved, training=is_training)
    dscale, doffset = (place.row(dparams, row, params.shape[1:]) for row in (channel.GAMMA, channel.BETA))
    return place.give(dx), dscale, doffset
