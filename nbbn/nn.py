"""Stateless batch normalization, with the names and signatures of tf.nn.

Arrays are those of the host: NumPy's, and PyTorch's and JAX's there. Results are of the library of the first argument.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import numpy as np

from nbbn.arrays import HOST, giver, numbers_of
from nbbn.call.operands import as_input, as_weights
from nbbn.core import dtypes
from nbbn.core.layout import Sizes, resolve_axis
from nbbn.core.options import EPSILON, Options, boolean, check_number, parse_ints
from nbbn.engine.dispatcher import Dispatcher
from nbbn.kernels import channel

Array = np.ndarray
_Function = TypeVar("_Function", bound=Callable[..., Any])

_FUSED_AXIS = {"NHWC": (4, 3), "NCHW": (4, 1), "NDHWC": (5, 4), "NCDHW": (5, 1)}


@lru_cache(maxsize=64)  # a dispatcher remembers what it has found out about earlier arrays
def _dispatcher(axis: int | Sizes, epsilon: float = 0.0, momentum: float = 0.0) -> Dispatcher:
    return Dispatcher(Options(axis=axis, momentum=momentum, epsilon=epsilon, bessel_correction=True))


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
    x: Array = as_input(HOST.take(value, "x"), "x")
    return x


def _axes(axes: int | Sequence[int] | Array, rank: int) -> Sizes:
    parsed = parse_ints("axes", axes)
    return resolve_axis([parsed] if isinstance(parsed, int) else parsed, rank, "axes")


def _keepdims(keepdims: bool | None, keep_dims: bool | None) -> bool:
    if keepdims is not None and keep_dims is not None:
        raise ValueError(f"keepdims and keep_dims are one; received keepdims={keepdims!r} and keep_dims={keep_dims!r}")
    name, given = ("keepdims", keepdims) if keep_dims is None else ("keep_dims", keep_dims)
    return given is not None and boolean(name, given)


def _broadcasts(shape: Sizes, target: Sizes) -> bool:
    """Whether an array of one shape can stand beside one of another that stays as it is."""
    last = target[len(target) - len(shape) :]
    return len(shape) <= len(target) and all(n in (1, size) for n, size in zip(shape, last, strict=True))


def _with_channels(x: Array, kept: Sizes) -> tuple[Array, Sizes]:
    """x with a kept axis: one of size 1 in front where there is none."""
    return (x, kept) if kept else (x[np.newaxis], (0,))


def _moments(x: Array, weights: Array | None, reduced: Sizes, keepdims: bool) -> tuple[Array, Array]:
    kept = tuple(i for i in range(x.ndim) if i not in reduced)
    shape = tuple(s if i in kept else 1 for i, s in enumerate(x.shape))
    if not keepdims:
        shape = tuple(x.shape[i] for i in kept)
    if x.size == 0:
        count, mean, variance = np.zeros((3, int(np.prod(shape))))
    else:
        x, kept = _with_channels(x, kept)
        weights = weights if weights is None or weights.ndim == x.ndim else weights[np.newaxis]
        count, mean, m2, _ = _dispatcher(kept).reduce(x, weights)
        variance = m2 / np.maximum(count, np.finfo(np.float64).tiny)  # m2 is 0 where nothing counts
    if weights is None and not count.all():
        mean, variance = np.full_like(mean, np.nan), np.full_like(variance, np.nan)
    return mean.reshape(shape).astype(x.dtype), variance.reshape(shape).astype(x.dtype)


@_as_given
def moments(
    x: Any,
    axes: int | Sequence[int] | Array,
    shift: None = None,
    name: str | None = None,
    keepdims: bool | None = None,
    keep_dims: bool | None = None,
) -> tuple[Array, Array]:
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
    axes: int | Sequence[int] | Array,
    frequency_weights: Any,
    name: str | None = None,
    keepdims: bool | None = None,
    keep_dims: bool | None = None,
) -> tuple[Array, Array]:
    """Mean and biased variance of `x` over `axes`, each value counted `frequency_weights` times.

    Args: as of moments(); frequency_weights: real, >= 0, broadcasts against x.
    Returns: mean, variance; 0 where the weights sum to 0, as in TensorFlow.
    """
    x = _input(x)
    weights = numbers_of(frequency_weights, "frequency_weights")
    if not _broadcasts(weights.shape, x.shape):
        raise ValueError(
            f"frequency_weights must broadcast against the shape {x.shape} of x; received shape {weights.shape}"
        )
    weights = weights.reshape((1,) * (x.ndim - weights.ndim) + weights.shape)
    weights = as_weights(weights, x, (), dtypes.statistic(x.dtype), "frequency_weights")
    return _moments(x, weights, _axes(axes, x.ndim), _keepdims(keepdims, keep_dims))


@_as_given
def batch_normalization(
    x: Any, mean: Any, variance: Any, offset: Any, scale: Any, variance_epsilon: float, name: str | None = None
) -> Array:
    """(x - mean) / sqrt(variance + variance_epsilon) * scale + offset, in the dtype of x.

    Args:
        x: float array. mean, variance: arrays that broadcast with x. offset, scale: likewise, or None.
    Raises: TypeError, ValueError for arguments that are not possible or do not broadcast.
    """
    x = _input(x)
    check_number("variance_epsilon", variance_epsilon, np.inf, EPSILON)
    operands = {"scale": 1.0 if scale is None else scale, "offset": 0.0 if offset is None else offset}
    operands |= {"mean": mean, "variance": variance}
    arrays = [numbers_of(o, name) for name, o in operands.items()]
    try:
        shape = np.broadcast_shapes(x.shape, *(a.shape for a in arrays))
    except ValueError:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in zip(operands, arrays, strict=True))
        raise ValueError(f"x and what stands beside it must broadcast; received x {x.shape}, {shapes}") from None
    padded = [a.reshape((1,) * (len(shape) - a.ndim) + a.shape) for a in arrays]
    kept = tuple(i for i in range(len(shape)) if any(a.shape[i] != 1 for a in padded))  # where an operand varies
    target = tuple(s if i in kept else 1 for i, s in enumerate(shape))
    numbers = np.stack([np.broadcast_to(a, target).ravel() for a in padded]).astype(dtypes.statistic(x.dtype))
    x, kept = _with_channels(np.broadcast_to(x, shape), kept)
    y: Array = _dispatcher(kept, float(variance_epsilon)).infer(x, numbers[:2], numbers[2:]).reshape(shape)
    return y


def _fused_dispatcher(x: Array, data_format: str, epsilon: float, momentum: float = 0.0) -> Dispatcher:
    check_number("epsilon", epsilon, np.inf, EPSILON)
    if not isinstance(data_format, str) or data_format not in _FUSED_AXIS:
        raise ValueError(f"data_format must be one of {list(_FUSED_AXIS)}; received {data_format!r}")
    rank, axis = _FUSED_AXIS[data_format]
    if x.ndim != rank:
        raise ValueError(f"x must have rank {rank} for data_format={data_format!r}; received shape {x.shape}")
    return _dispatcher(axis, float(epsilon), momentum)


def _per_channel(values: Sequence[Any], names: Sequence[str], x: Array, dispatcher: Dispatcher) -> Array:
    channels = x.shape[dispatcher.axis(x.ndim)[0]]
    arrays = [numbers_of(v, n).astype(dtypes.statistic(x.dtype)) for v, n in zip(values, names, strict=True)]
    for name, array in zip(names, arrays, strict=True):
        if array.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), one value per channel; received {array.shape}")
    return np.stack(arrays)


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
) -> tuple[Array, Array, Array]:
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
            numbers_of(value, argument)
    given = mean is not None and variance is not None
    if not given and (not is_training or exponential_avg_factor != 1.0):
        raise ValueError(
            "mean and variance must be given when is_training=False or exponential_avg_factor is not 1; "
            f"received mean={mean!r}, variance={variance!r}"
        )
    state = np.stack([np.zeros_like(params[0]), np.ones_like(params[0])])
    if given:
        state = _per_channel([mean, variance], ["mean", "variance"], x, dispatcher)
    if not is_training:
        return dispatcher.infer(x, params, state), state[channel.MEAN], state[channel.VARIANCE]
    y, new_state, _ = dispatcher.train(x, params, state)
    return y, new_state[channel.MEAN], new_state[channel.VARIANCE]


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
) -> tuple[Array, Array, Array]:
    """The gradients of fused_batch_norm with respect to x, scale and offset.

    Args:
        y_backprop: the gradient of y, of the shape and dtype of x.
        mean, variance: (C,) the statistics that inference used; not used in training, where those of x are taken.
    """
    x, is_training = _input(x), boolean("is_training", is_training)
    dy = HOST.take(y_backprop, "y_backprop").astype(x.dtype, copy=False)
    if dy.shape != x.shape:
        raise ValueError(f"y_backprop must have the shape of x, {x.shape}; received {dy.shape}")
    dispatcher = _fused_dispatcher(x, data_format, epsilon)
    (gamma,) = _per_channel([scale], ["scale"], x, dispatcher)
    params = np.stack([gamma, np.zeros_like(gamma)])
    if not is_training:
        saved = dispatcher.freeze(params, _per_channel([mean, variance], ["mean", "variance"], x, dispatcher))
    elif x.size:
        _, saved, _ = dispatcher.finish(dispatcher.reduce(x), params, np.ones_like(params), rank=x.ndim, dtype=x.dtype)
    else:
        _, _, saved = dispatcher.train(x, params, np.ones_like(params))
    dx, (dscale, doffset), _ = dispatcher.backward(dy, x, saved, training=is_training)
    return dx, dscale, doffset
