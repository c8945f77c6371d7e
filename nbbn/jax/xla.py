"""A training call in XLA's own operations: what JAX differentiates, and what runs where there are no kernels.

The output is the formula (core/formula.py); the middle stage is that of the kernels, in JAX's operations.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nbbn.core import dtypes, formula, rules
from nbbn.jax.given import Config, Operands
from nbbn.kernels import channel
from nbbn.kernels.cpu.lanes import rules_of


def output(config: Config, given: Operands, weights: Any, corrections: Any = None) -> tuple[Any, Any, Any]:
    """The output; mean and variance (G, C). corrections: r and d of renorm."""
    dtype = dtypes.statistic(np.dtype(given.x.dtype))
    residual = None if given.residual is None else given.residual.astype(dtype)
    shared = {}
    if config.shared is not None:
        shared["total"] = partial(_total, config)
        weights = jnp.ones((), dtype) if weights is None else weights
    y, mean, variance = formula.train(
        jnp,
        given.x.astype(dtype),
        *given.params,
        config.steps.dispatcher.axis(given.x.ndim),
        config.options.epsilon,
        members=config.layout(given.x).members(),
        weights=weights,
        corrections=corrections,
        adjustment=None if given.a is None else (given.a, given.b),
        residual=residual,
        relu=config.options.activation is not None,
        **shared,
    )
    return y.astype(given.x.dtype), mean, variance


@partial(jax.jit, static_argnums=2)  # one program, where it is not in one
def apply(x: Any, coefficients: Any, axis: tuple[int, ...]) -> Any:
    """The output of an input with one group of statistics, by the coefficients of the middle stage."""
    mean, scale, shift = coefficients.reshape(-1, *formula.statistics_shape(x, axis))
    return rules.normalize(x.astype(coefficients.dtype), mean, scale, shift).astype(x.dtype)


def _total(config: Config, own: Any) -> Any:
    """A sum over all that share statistics."""
    if config.shared is None:
        return own
    names, groups = config.shared
    return jax.lax.psum(own, names, axis_index_groups=groups)


def train(
    config: Config, given: Operands, state: tuple[Any, ...], hyper: list[Any], weights: Any
) -> tuple[Any, tuple[Any, ...]]:
    """The output and the new state. hyper: the numbers of the middle stage."""
    _, mean, variance = jax.lax.stop_gradient(output(config, given, weights))  # XLA drops the output, and what is twice
    count, squares = _counts(config, given.x, weights)
    new_state, r, d = _middle(config, state, hyper, (count, mean, variance * count, squares))
    corrections = None
    if config.options.renorm:
        corrections = tuple(jnp.broadcast_to(c, mean.shape) for c in (r, d))
    return output(config, given, weights, corrections)[0], new_state


def _counts(config: Config, x: Any, weights: Any) -> tuple[Any, Any]:
    """The sums of the weights and of their squares, (G, C)."""
    lay, axis = config.layout(x), config.steps.dispatcher.axis(x.ndim)
    dtype = dtypes.statistic(np.dtype(x.dtype))
    reduced = tuple(i for i in range(x.ndim) if i not in axis)
    found = []
    for samples in lay.members():
        if weights is None:
            count = jnp.full(lay.channels, math.prod(x[samples].shape) // lay.channels, dtype)
            found.append((count, count))
        else:
            own = jnp.broadcast_to(weights, x.shape)[samples]
            found.append((own.sum(reduced).reshape(-1), (own**2).sum(reduced).reshape(-1)))
    count, squares = (_total(config, jnp.stack(sums)) for sums in zip(*found, strict=True))
    return count, squares


# -- the middle stage --------------------------------------------------------------------------------------------------


def _zero_where(condition: Any, x: Any) -> Any:
    return jnp.where(condition, jnp.zeros_like(x), x)


_rules = rules_of({"math": jnp, "type": lambda x: partial(jnp.full_like, x), "drop": _zero_where, "choose": jnp.where})
_stage = channel.functions(lambda function: function, _rules, lambda x: x)


class _State:
    """The rows of a state, as the middle stage reads and writes them: all channels, whatever it calls them."""

    def __init__(self, rows: tuple[Any, ...]) -> None:
        self.rows, self.itemsize = list(rows), rows[0].dtype.itemsize

    def __getitem__(self, place: tuple[int, Any]) -> Any:
        return self.rows[place[0]]

    def __setitem__(self, place: tuple[int, Any], value: Any) -> None:
        self.rows[place[0]] = value.astype(self.rows[0].dtype)


def _middle(
    config: Config, state: tuple[Any, ...], hyper: list[Any], moments: tuple[Any, ...]
) -> tuple[tuple[Any, ...], Any, Any]:
    """The new state; r and d of renorm."""
    saved, options = jnp.stack(moments), config.options  # in the order of the rows COUNT, BATCH_MEAN, M2, SQUARES
    sums: Any = (jnp.zeros_like(saved[0, 0]),) * 3
    for group in range(saved.shape[1]):
        count, squares, bessel = saved[channel.COUNT, group], saved[channel.SQUARES, group], hyper[channel.BESSEL]
        own = _stage.group_variance(group, count, squares, saved, bessel)
        sums = _stage.add_group(group, count, own, saved, bessel, *sums)
    flags = [True if flag else None for flag in (options.renorm, options.is_debiased, options.skip_nonfinite)]
    old, new = _State(state), _State(state)
    r, d = _stage.update(0, *sums, old, hyper, *flags, new)
    return tuple(new.rows), r, d
