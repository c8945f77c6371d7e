"""Batch normalization as a function of JAX."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from nbbn.arrays import availability
from nbbn.core import dtypes
from nbbn.core.layout import Layout, Sizes
from nbbn.core.options import Options, boolean
from nbbn.engine.dispatcher import Dispatcher
from nbbn.jax import operands, xla
from nbbn.jax.crossing import varying_alike
from nbbn.jax.given import Config, Constants, Operands
from nbbn.jax.numbers import hyper, hyper_values, is_in_program, now
from nbbn.jax.steps import Steps
from nbbn.jax.training import train

State = dict[str, Any]


def batch_norm(
    x: Any,
    scale: Any,
    bias: Any,
    state: Mapping[str, Any],
    *,
    training: bool,
    axis: int | tuple[int, ...] = -1,
    momentum: Any = 0.99,
    epsilon: float = 1e-5,
    mask: Any = None,
    lengths: Any = None,
    residual: Any = None,
    activation: str | None = None,
    adjustment: operands.Adjustment | None = None,
    renorm: bool = False,
    renorm_clipping: Mapping[str, Any] | None = None,
    renorm_momentum: Any = 0.99,
    virtual_batch_size: int | None = None,
    ragged: str = "error",
    virtual_batch_order: str = "interleaved",
    bessel_correction: bool = False,
    debias: bool = False,
    skip_nonfinite: bool = False,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    ffi: bool = True,
) -> tuple[jax.Array, State]:
    """Normalize `x`, with its own statistics where it is a training call, else with the moving ones.

    Differentiable in x, scale, bias, residual and adjustment, twice in reverse mode; nothing goes through the state.

    Args:
        x: float16, bfloat16, float32 or float64. scale, bias: of the feature axes' sizes, (C,) for one axis, or None.
        state: the moving statistics, as initial_state() makes them for these options.
        training: True or False, no value of a traced program.
        axis: the feature axes. momentum: the weight of the old moving average; None weighs all batches equally.
        mask: what counts, bool or weights >= 0, of the leading dimensions that are no features, or of the input's rank.
        lengths: (N,) integers in the place of a mask, so many steps of each sample count.
        residual: of the shape of x, added before the activation. activation: "relu" or None.
        adjustment: (a, b), or a function of the input's shape that gives them; they broadcast against x.
        axis_name: the mapped axes, of vmap, pmap or shard_map, that share statistics, in which every value counts the
            same. axis_index_groups: groups of their indices that share statistics, as jax.lax.all_gather takes them.
        ffi: False calls back into Python in the place of kernels that the program calls: slower, for debugging.
        The others are those of nbbn.BatchNormalization. momentum, renorm_momentum and the values of renorm_clipping may
        be scalars of the program, as of a schedule, or functions, called in each call; in a training program that is
        compiled they have to give scalars of the program.
    Returns: y, of the shape and dtype of x, and the new state, which is `state` where it is no training call.
    Raises: TypeError, ValueError that name the argument, what was received and what is accepted.
    """
    x = operands.as_input(x)
    if is_in_program(training):
        raise TypeError(f"training must be True or False, known while a program is traced; received {training}")
    training = boolean("training", training)
    if isinstance(renorm_clipping, Mapping):
        renorm_clipping = {name: now(name, value, training) for name, value in renorm_clipping.items()}
    given, numbers = _options(
        {n: now(n, v, training) for n, v in (("momentum", momentum), ("renorm_momentum", renorm_momentum))},
        renorm_clipping,
        axis=axis,
        epsilon=epsilon,
        activation=activation,
        adjustment=None if adjustment is None else _is_given,
        renorm=renorm,
        virtual_batch_size=virtual_batch_size,
        ragged=ragged,
        virtual_batch_order=virtual_batch_order,
        bessel_correction=bessel_correction,
        debias=debias,
        skip_nonfinite=skip_nonfinite,
    )
    steps = _steps(given, boolean("ffi", ffi))
    dispatcher, dtype = steps.dispatcher, dtypes.statistic(np.dtype(x.dtype))
    kept = dispatcher.axis(x.ndim)
    features = tuple(x.shape[i] for i in kept)
    params = (
        operands.as_parameter(scale, "scale", features, dtype, 1.0),
        operands.as_parameter(bias, "bias", features, dtype, 0.0),
    )
    rows = operands.as_state(state, given, features)
    added = operands.as_residual(residual, x)
    if not training:
        return _infer(x, params, rows, kept, given, added), dict(state)
    if not all(isinstance(n, int) for n in x.shape):
        raise ValueError(f"x must have a known shape in training; received {x.shape}")
    if lengths is not None:
        mask = _mask_of(lengths, mask, x, dispatcher)
    weights = None if mask is None else operands.as_weights(mask, x, kept, dtype)
    a, b = (None, None) if adjustment is None else operands.as_adjustment(adjustment, x, dtype)
    shared = None if axis_name is None else (_names(axis_name), _groups(axis_index_groups))
    config = Config(steps, shared)
    config.layout(x)  # raises where a virtual batch does not fit
    if not x.size:
        return x, dict(state)
    y, new_rows = _train(config, Operands(x, params, added, a, b), rows, weights, numbers)
    return y, _as_given(new_rows, state, given)


def initial_state(
    features: int | tuple[int, ...],
    *,
    renorm: bool = False,
    momentum: Any = 0.99,
    debias: bool = False,
    dtype: Any = jnp.float32,
) -> State:
    """The moving statistics before the first batch: means of 0, variances and deviations of 1.

    Args:
        features: the sizes of the feature axes. The others are those of batch_norm(), which decide what there is.
        dtype: float32 or float64; a narrower one is what is stored, not what is computed with.
    Raises: TypeError for a dtype that is not of floats.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be one of floats; received {np.dtype(dtype)}")
    options = Options(renorm=renorm, momentum=None if momentum is None else 0.99, debias=debias)
    zeros = ("mean", "renorm_mean", "seen_mean", "seen_var")
    return {n: jnp.full(features, 0.0 if n in zeros else 1.0, dtype) for n in operands.state_names(options)}


def _mask_of(lengths: Any, mask: Any, x: Any, dispatcher: Dispatcher) -> Any:
    """The mask that lengths stand for. Raises: ValueError beside a mask."""
    if mask is not None:
        raise ValueError("mask and lengths both say what counts: pass one of them; received both")
    return operands.as_mask(lengths, x, dispatcher.steps(x.ndim))


def _train(config: Config, given: Operands, rows: Any, weights: Any, numbers: Mapping[str, Any]) -> tuple[Any, Any]:
    """The output and the new state's rows."""
    x, everything = given.x, varying_alike(given)
    values = hyper_values(config.steps.dispatcher, x.ndim, np.dtype(x.dtype), numbers)
    if not has_kernels(config.layout(x)):
        return xla.train(config, everything, rows, values, weights)
    y, new_rows, _ = train(config, everything, Constants(rows, hyper(values), weights))
    return y, new_rows


def has_kernels(lay: Layout) -> bool:
    """Whether programs of this process call nbbn's kernels: where JAX runs them on a CPU, unless told otherwise, or on
    a GPU of NVIDIA that Numba can use, but for batches in parts."""
    backend = str(jax.default_backend())
    if backend == "gpu":
        return "cuda" in jax.extend.backend.backends() and not lay.parts and availability.missing() is None
    return backend == "cpu"


def _is_given(shape: Sizes) -> Any:
    """Stands for an adjustment among the options."""
    raise NotImplementedError


def _options(momenta: Mapping[str, Any], clipping: Any, **others: Any) -> tuple[Options, dict[str, Any]]:
    """The options, without the numbers of a step, and these: values of the program, or checked ones."""
    varying = {name: value for name, value in momenta.items() if is_in_program(value)}
    fixed = {name: value for name, value in momenta.items() if name not in varying}
    bounds = clipping
    if isinstance(clipping, Mapping):
        bounds = {k: None if is_in_program(v) else v for k, v in clipping.items()}
        varying |= {k: v for k, v in clipping.items() if is_in_program(v)}
    for name, value in varying.items():
        if value.shape:
            raise ValueError(f"{name} must be a scalar; received an array of shape {value.shape}")
    checked = Options(**others, **fixed, renorm_clipping=bounds)
    if bounds and not checked.renorm:
        raise ValueError(f"renorm_clipping needs renorm=True; received {dict(clipping)!r}")
    numbers = checked.numbers()._asdict() | varying
    momentum = None if checked.momentum is None else 0.0
    return replace(checked, momentum=momentum, renorm_momentum=0.0, renorm_clipping=None), numbers


@lru_cache(maxsize=1024)
def _steps(options: Options, ffi: bool) -> Steps:
    return Steps(Dispatcher(options), ffi)


def _names(axis_name: Any) -> Any:
    return tuple(axis_name) if isinstance(axis_name, list) else axis_name


def _groups(groups: Any) -> tuple[tuple[int, ...], ...] | None:
    """Hashable, as a static argument has to be."""
    return None if groups is None else tuple(tuple(int(i) for i in group) for group in groups)


def _infer(x: Any, params: tuple[Any, Any], rows: tuple[Any, ...], kept: Sizes, options: Options, added: Any) -> Any:
    """By XLA's own operations, which it fuses with those before and behind."""
    dtype, shape = params[0].dtype, [n if i in kept else 1 for i, n in enumerate(x.shape)]
    mean, variance = (row.astype(dtype) for row in rows[:2])
    factor = params[0] * jax.lax.rsqrt(variance + np.asarray(options.epsilon, dtype))
    mean, factor, shift = (a.reshape(shape) for a in (mean, factor, params[1]))
    z = (x.astype(dtype) - mean) * factor + shift
    if added is not None:
        z = z + added.astype(dtype)
    if options.activation is not None:
        z = jnp.where(z <= 0, jnp.zeros_like(z), z)  # NaN stays NaN
    return z.astype(x.dtype)


def _as_given(rows: tuple[Any, ...], state: Mapping[str, Any], options: Options) -> State:
    """The new state in the shapes and dtypes of the old one."""
    found = {}
    for name, row in zip(operands.state_names(options), rows, strict=True):
        old = jnp.asarray(state[name])
        found[name] = row.reshape(old.shape).astype(old.dtype)
    return found
