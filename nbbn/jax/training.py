"""A training call and its derivatives, of first and second order, as JAX differentiates them.

The output is a custom_vjp whose gradient is one, too: a kernel's call has no derivative that JAX could find. The
gradient's own derivatives, which are rarely asked for, are those of the formula (core/formula.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from nbbn.core import dtypes
from nbbn.jax import xla
from nbbn.jax.crossing import as_float64, as_pairs, of_pairs
from nbbn.jax.given import Config, Constants, Operands
from nbbn.kernels import channel

# Elements. With a relu behind it took 0.72 to 0.96 of the kernel's time, 1.07 with 16 channels; alone 1.04 to 1.35.
_LEFT_FROM = 1 << 20

# -- the output --------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def train(config: Config, given: Operands, constants: Constants) -> tuple[Any, tuple[Any, ...], Any]:
    """The output, the new state, and what the gradient needs; no derivative goes through these two."""
    steps, lay, weights = config.steps, config.layout(given.x), constants.weights
    middle = {"params": given.params, "state": constants.state, "hyper": constants.hyper}
    views = {"x": given.x, "residual": given.residual, "a": given.a, "b": given.b}
    left = _is_left_to_xla(config, given)
    if not (left or config.by_stages(given.x)):
        made = steps.run("train", lay, views | middle | {"weights": weights})
        return made["y"], made["new_state"], made["saved"]
    moments = steps.run("reduce", lay, {"x": given.x, "weights": weights})["moments"]
    if config.shared is not None:
        moments = steps.merge(_of_all(config, moments))
    made = steps.finish(middle | {"moments": moments}, given.a is not None, config.names)
    if left:
        y = xla.apply(given.x, made["coefficients"], steps.dispatcher.axis(given.x.ndim))
    else:
        y = steps.run("apply", lay, views | {"coefficients": made["coefficients"]})["y"]
    return y, made["new_state"], made["saved"]


def _is_left_to_xla(config: Config, given: Operands) -> bool:
    """Whether the output is XLA's own operation, of the statistics that the kernels make.

    What is behind, as a relu of the program's, is then fused with it, and a gradient needs no array of it. One kernel
    for all is quicker where there is no gradient, or the caches hold the input, with 16 bits, and where it does what is
    behind itself.
    """
    x, beside = given.x, (config.options.activation, given.residual, given.a)
    is_plain = all(what is None for what in beside) and config.layout(x).groups == 1
    is_wide = x.dtype == given.params[0].dtype
    is_large = config.has_gradient and x.size >= _LEFT_FROM
    return is_plain and is_wide and is_large and jax.default_backend() == "cpu"


def _of_all(config: Config, array: Any) -> Any:
    """The arrays of all that share statistics, in a new first dimension."""
    assert config.shared is not None
    names, groups = config.shared
    return jax.lax.all_gather(array, names, axis_index_groups=groups)


def _train_forward(config: Config, given: Operands, constants: Constants) -> Any:
    # Not the kernel itself: this is differentiated, too, for a second order.
    made = train(config._replace(has_gradient=True), given, constants)
    return made, (given, made[2], constants.weights)


def _train_backward(config: Config, kept: Any, cotangents: Any) -> tuple[Operands, None]:
    given, saved, weights = kept
    return gradient(config, cotangents[0], given, saved, weights), None


train.defvjp(_train_forward, _train_backward)


# -- its gradient ------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def gradient(config: Config, dy: Any, given: Operands, saved: Any, weights: Any) -> Operands:
    """The gradients of all operands."""
    steps, lay, (x, _, residual, a, b) = config.steps, config.layout(given.x), given
    views = {"dy": dy, "x": x, "residual": residual, "weights": weights, "a": a, "b": b, "saved": saved}
    wants_dz = residual is not None
    if not config.by_stages(x):
        made = steps.run("backward", lay, views, wants_dz)
    else:
        made = steps.run("reduce_gradient", lay, views)
        sums = made["sums"]
        if config.shared is not None:
            sums = _add(_of_all(config, sums))
        shared = {"sums": sums, "dparams": made["dparams"]}
        made |= steps.run("apply_gradient", lay, views | shared, wants_dz)
    da, db = _adjustment_gradient(config, dy, given, saved, weights)
    return Operands(made["dx"], made["dparams"], made.get("dz", dy) if wants_dz else None, da, db)


def _add(parts: Any) -> Any:
    """Sums that cross, added in their order."""
    with jax.enable_x64(True):
        total = as_float64(parts[0])
        for part in parts[1:]:
            total = jax.lax.add(total, as_float64(part))
        return as_pairs(total)


def _adjustment_gradient(config: Config, dy: Any, given: Operands, saved: Any, weights: Any) -> tuple[Any, Any]:
    """Those of a and b, which no kernel makes."""
    if given.a is None:
        return None, None
    output = _formula(config, saved, weights)
    _, pullback = jax.vjp(lambda a, b: output(given._replace(a=a, b=b)), given.a, given.b)
    da, db = pullback(dy)
    return da, db


def _gradient_forward(config: Config, dy: Any, given: Operands, saved: Any, weights: Any) -> Any:
    return gradient(config, dy, given, saved, weights), (dy, given, saved, weights)


def _gradient_backward(config: Config, kept: Any, cotangents: Operands) -> tuple[Any, Operands, None, None]:
    dy, given, saved, weights = kept
    output = _formula(config, saved, weights)
    _, pullback = jax.vjp(lambda dy, given: jax.vjp(output, given)[1](dy)[0], dy, given)
    d_dy, d_given = pullback(cotangents)
    return d_dy, d_given, None, None


gradient.defvjp(_gradient_forward, _gradient_backward)


def _formula(config: Config, saved: Any, weights: Any) -> Callable[[Operands], Any]:
    """The output as a function of its operands that JAX differentiates. saved: where r and d of renorm are taken from,
    which are constants."""

    def output(given: Operands) -> Any:
        lay, corrections = config.layout(given.x), None
        if config.options.renorm:
            rows = [saved[row].reshape(lay.groups, lay.channels, 2) for row in (channel.R, channel.D)]
            corrections = tuple(of_pairs(row, dtypes.statistic(np.dtype(given.x.dtype))) for row in rows)
        return xla.output(config, given, weights, corrections)[0]

    return output
