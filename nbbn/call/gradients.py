"""From the gradient of a layer's output to those of its inputs and parameters, on arrays of every kind."""

from typing import Any, NamedTuple

import numpy as np

from nbbn.arrays import Array, place_of
from nbbn.call.operands import as_like, as_out, refuse_overlap, sum_to
from nbbn.core import rules
from nbbn.engine.base import Operands
from nbbn.engine.dispatcher import Dispatcher
from nbbn.kernels import channel
from nbbn.state.variables import Variables


class Gradients(NamedTuple):
    """What a pullback returns; None for what does not exist. Arrays of the input's library.

    inputs: shape and dtype of the input; where that holds integers, the layer's dtype. gamma, beta: shape and dtype of
    the parameters. adjustment: a pair with the shapes of what `adjustment` returned, NumPy arrays. residual: its shape,
    dtype of the output.
    """

    inputs: Any = None
    gamma: Any = None
    beta: Any = None
    adjustment: tuple[np.ndarray, np.ndarray] | None = None
    residual: Any = None


class Record(NamedTuple):
    """What a forward pass leaves behind for its gradient. dtype: of the gradient, which is that of a float input. step:
    the bound step that the forward pass took."""

    x: Array
    saved: Array
    training: bool
    operands: Operands
    dtype: np.dtype
    variables: Variables
    step: Any = None


def gradients(dispatcher: Dispatcher, record: Record, dy: Any, out: Any, scale: bool, center: bool) -> Gradients:
    """The pullback of a call. scale, center: whether there are gamma and beta.

    What follows is written for speed: a small step takes 3 us, and as much can be lost beside it.
    """
    x, saved, training, operands, dtype, variables, forward = record
    residual, shapes = operands.residual, variables.shapes
    plain = training and operands.weights is None and operands.a is None
    step, adjustment, dz = None if forward is None else forward.gradient, None, None
    if step is None and plain and type(x) is np.ndarray:
        step = dispatcher.bound.get(("backward", residual is not None, x.shape, x.dtype))
    if step is not None and dy is not None and step.fits(variables, x, out, residual, dy):
        dparams = np.empty_like(variables.params)
        if residual is None and dparams.dtype == shapes.dtype and len(shapes.params) == 1:
            dx, (gamma, beta) = step.backward(dy, x, None, None, out, dparams, saved), dparams
            return Gradients(dx, gamma if scale else None, beta if center else None)
        activated = dispatcher.options.activation is not None
        if residual is not None:
            dz = np.empty_like(x) if activated else dy.copy()
        dx = step.backward(dy, x, residual, dz if activated else None, out, dparams, saved)
    else:
        dx, dparams, dz = _general_gradients(dispatcher, record, dy, out)
        if operands.adjusted:
            adjustment = _adjustment_gradients(dispatcher, record, dz)
        if plain and all(a is None or _is_like(a, x) for a in (dy, out, residual)):
            dispatcher.bind("backward", x, residual is not None, variables)
    place = place_of(x)
    if dparams.dtype != shapes.dtype:
        dparams = place.astype(dparams, shapes.dtype)
    if dtype != x.dtype:
        dx = place.astype(dx, dtype)
    elif out is not None:
        dx = out
    return Gradients(
        dx if dx is out else place.give(dx),
        place.row(dparams, channel.GAMMA, shapes.params) if scale else None,
        place.row(dparams, channel.BETA, shapes.params) if center else None,
        adjustment,
        None if residual is None else place.give(dz),
    )


def _is_like(dy: Any, x: Array) -> bool:
    if type(dy) is not np.ndarray or dy.shape != x.shape or dy.strides != x.strides or dy.dtype != x.dtype:
        return False
    return dy.flags.aligned


def _general_gradients(dispatcher: Dispatcher, record: Record, dy: Any, out: Any) -> tuple[Array, Array, Array | None]:
    """dx, the gradients of gamma and beta, and dz, an array of its own, where operands need it."""
    x, operands, place = record.x, record.operands, place_of(record.x)
    dy = as_like(dy, x, "dy", "the output's")
    target = None if out is None else as_out(out, x)
    message = "out must not share memory with the input or the residual, which a later call needs"
    refuse_overlap(target, [x, operands.residual], message)
    wants_dz = operands.residual is not None or operands.adjusted
    same = wants_dz and dispatcher.options.activation is None  # dz is dy, which is the caller's and may be in `out`
    if same and target is not None:
        dy = place.astype(dy, dy.dtype, copy=True)
    result = dispatcher.backward(dy, x, record.saved, operands, training=record.training, out=target, wants_dz=wants_dz)
    if same and target is None and operands.residual is not None:  # after the step: planning stops there
        return *result[:2], place.astype(dy, dy.dtype, copy=True)
    return result


def _adjustment_gradients(dispatcher: Dispatcher, record: Record, dz: Array) -> tuple[np.ndarray, np.ndarray]:
    """da = dz * gamma * (x_hat * r + d) and db = dz * gamma, summed to the shapes of a and b; on the host."""
    x, saved, dz64 = (place_of(a).to_host(a).astype(np.float64) for a in (record.x, record.saved, dz))
    per_channel = [n if i in dispatcher.axis(x.ndim) else 1 for i, n in enumerate(x.shape)]
    mean, rstd, r, d, gamma = (
        saved[row].reshape(per_channel)
        for row in (channel.BATCH_MEAN, channel.RSTD, channel.R, channel.D, channel.USED_GAMMA)
    )
    if record.operands.weights is not None:
        weights = place_of(record.x).to_host(record.operands.weights)
        x, dz64 = (np.where((weights > 0) | np.isfinite(x), *pair) for pair in ((x, mean), (dz64, 0.0)))
    z = rules.normalize(x, mean, *rules.output_terms(mean, mean, rstd, r, d, gamma))
    a: Any = record.operands.a
    b: Any = record.operands.b
    return sum_to(dz64 * z, a.shape, a.dtype), sum_to(dz64 * gamma, b.shape, b.dtype)
