"""What users of JAX pass beside the input, checked and brought into the shape that steps take."""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nbbn.core import dtypes
from nbbn.core.layout import Sizes
from nbbn.core.options import Options


def state_names(options: Options) -> tuple[str, ...]:
    """The rows of the state, in their order."""
    renorm = ("stddev", "renorm_mean", "renorm_stddev") if options.renorm else ()
    return ("mean", "var", *renorm, *(("seen_mean", "seen_var") if options.is_debiased else ()))


def as_input(x: Any) -> Any:
    """Raises: TypeError for another dtype than those of nbbn, ValueError for a scalar."""
    if not isinstance(x, (jax.Array, np.ndarray, np.generic)):
        raise TypeError(f"x must be an array of JAX or NumPy; received {type(x).__name__}")
    dtypes.check(np.dtype(x.dtype), "x", floats=True)
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension; received a scalar of shape ()")
    return jnp.asarray(x)


def _as_reals(value: Any, name: str) -> Any:
    """Raises: TypeError for what is no array of real numbers."""
    if isinstance(value, jax.Array):
        array = value
    else:
        try:
            array = jnp.asarray(value)
        except (TypeError, ValueError) as error:  # of what is no array, and of what has no shape
            raise TypeError(f"{name} must be an array of real numbers; received {reprlib.repr(value)}") from error
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be an array of real numbers; received dtype {array.dtype}")
    return array


def as_parameter(value: Any, name: str, features: Sizes, dtype: np.dtype, default: float) -> Any:
    """gamma or beta as (C,); None stands for the default. Raises: ValueError for another shape."""
    if value is None:
        return jnp.full((math.prod(features),), default, dtype)
    return _as_row(value, name, features).astype(dtype)


def as_state(state: Any, options: Options, features: Sizes) -> tuple[Any, ...]:
    """The rows (C,) of a state, float32 or float64. Raises: TypeError, ValueError for another state."""
    names = state_names(options)
    if not isinstance(state, Mapping) or set(state) != set(names):
        received = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"state must be a dict with the keys {list(names)} for these options; received {received}")
    rows = [_as_row(state[name], f"state[{name!r}]", features) for name in names]
    dtype = dtypes.statistic(np.dtype(jnp.result_type(*rows)))
    return tuple(row.astype(dtype) for row in rows)


def _as_row(value: Any, name: str, features: Sizes) -> Any:
    array = _as_reals(value, name)
    channels = math.prod(features)
    if array.shape not in (features, (channels,)):
        raise ValueError(f"{name} must have shape {features}; received {array.shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be an array of floats; received dtype {array.dtype}")
    return array.reshape(channels)


def as_residual(value: Any, x: Any) -> Any:
    """Raises: ValueError for another shape than the input's."""
    if value is None:
        return None
    array = _as_reals(value, "residual")
    if array.shape != x.shape:
        raise ValueError(f"residual must have the input's shape {x.shape}; received {array.shape}")
    return array.astype(x.dtype)


def as_weights(mask: Any, x: Any, kept: Sizes, dtype: np.dtype) -> Any:
    """The weights, which broadcast against the input: of its rank.

    mask: bool (True counts) or real weights >= 0, which are not looked at if they are JAX's. With fewer dimensions than
        `x` they are its leading ones that are not in `kept`; with as many it broadcasts as in NumPy.
    """
    if not isinstance(mask, jax.Array):
        mask = dtypes.as_numbers(mask, "mask")
        if not (np.isfinite(mask).all() and (mask >= 0).all()):
            raise ValueError(f"mask must be finite and not negative; received from {mask.min()} to {mask.max()}")
    reduced = tuple(n for i, n in enumerate(x.shape) if i not in kept)
    shape = mask.shape
    if len(shape) <= len(reduced):
        sizes = iter(shape)
        shape = tuple(1 if i in kept else next(sizes, 1) for i in range(x.ndim))
    if len(shape) != x.ndim or any(n not in (1, full) for n, full in zip(shape, x.shape, strict=True)):
        raise ValueError(
            f"mask must broadcast against the input's leading non-feature dimensions {reduced} (batch first) or, with "
            f"{x.ndim} dimensions, its shape {x.shape}; received shape {mask.shape}"
        )
    return jax.lax.stop_gradient(jnp.asarray(mask).astype(dtype).reshape(shape))


def as_mask(lengths: Any, x: Any, steps: int) -> Any:
    """The mask (N, T) of the first `lengths` steps of each sample, in the input's rank. steps: their dimension.

    Raises: TypeError for what are no integers; ValueError unless there is one for each sample, and, of values that are
        not JAX's, for one that is negative or more than there are steps.
    """
    counts = _as_reals(lengths, "lengths")
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        raise TypeError(f"lengths must be integers; received dtype {counts.dtype}")
    if counts.shape != x.shape[:1]:
        raise ValueError(f"lengths must have shape {x.shape[:1]}, one for each sample; received {counts.shape}")
    if not isinstance(lengths, jax.Array) and x.size:
        least, most = np.min(lengths), np.max(lengths)
        if not 0 <= least <= most <= x.shape[steps]:
            raise ValueError(
                f"lengths must be from 0 to {x.shape[steps]}, the size of dimension {steps} of the input; received "
                f"values from {least} to {most}"
            )
    shape = [n if i in (0, steps) else 1 for i, n in enumerate(x.shape)]
    return (jnp.arange(x.shape[steps]) < counts[:, None]).reshape(shape)


def as_adjustment(value: Any, x: Any, dtype: np.dtype) -> tuple[Any, Any]:
    """a and b, of the input's rank. value: the pair, or a function of the input's shape that gives it.

    Raises: ValueError for what is no pair, or does not broadcast against the input.
    """
    pair = value(x.shape) if callable(value) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"adjustment must be, or give, a pair (scale, bias); received {type(pair).__name__}")
    a, b = (_as_operand(v, x, dtype, f"adjustment's {n}") for n, v in zip(("scale", "bias"), pair, strict=True))
    return a, b


def _as_operand(value: Any, x: Any, dtype: np.dtype, name: str) -> Any:
    array = _as_reals(value, name)
    shape = (*(1,) * (x.ndim - array.ndim), *array.shape)
    if len(shape) != x.ndim or any(n not in (1, full) for n, full in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{name} must broadcast against the input's shape {x.shape}; received shape {array.shape}")
    return array.astype(dtype).reshape(shape)


Adjustment = Callable[[Sizes], Any] | tuple[Any, Any]
