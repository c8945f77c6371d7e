"""From the gradient of a layer's output to those of its inputs and parameters."""

from typing import Any, NamedTuple

import numpy as np

from nbbn import dtypes
from nbbn.dispatcher import Dispatcher
from nbbn.kernels import channel
from nbbn.operands import Array, check_out, sum_to
from nbbn.variables import Shapes


class Gradients(NamedTuple):
    """What a pullback returns; None for what does not exist.

    inputs: shape and dtype of the input. gamma, beta: shape and dtype of the parameters.
    adjustment: a pair with the shapes of what `adjustment` returned. residual: its shape, dtype of the output.
    """

    inputs: Array | None = None
    gamma: Array | None = None
    beta: Array | None = None
    adjustment: tuple[Array, Array] | None = None
    residual: Array | None = None


class Record(NamedTuple):
    """What a forward pass leaves behind; after inference, which used `state`, without `saved` and `new_state`."""

    x: Array
    params: Array
    state: Array
    saved: Array | None = None
    new_state: Array | None = None
    residual: Array | None = None
    weights: Array | None = None
    adjustment: tuple[Array, Array] | None = None

    def is_plain(self) -> bool:
        """Whether it is that of a training step on the input alone."""
        return self.saved is not None and self.residual is None and self.weights is None and self.adjustment is None

    def counted(self) -> Array:
        """(C,) bool: the channels of which the batch has any value."""
        assert self.saved is not None
        groups = self.saved[channel.COUNT].reshape(-1, self.params.shape[1])
        return np.asarray(groups.any(axis=0))


def pull_back(
    dispatcher: Dispatcher, record: Record, dy: Any, out: Array | None, shapes: Shapes
) -> tuple[Gradients, Array]:
    """compute_gradients(), in the short way where it is known for variables of these shapes."""
    plain = record.is_plain() and _is_like(dy, record.x)
    if plain:
        repeat = dispatcher.known("backward", record.x, shapes)
        if repeat is not None and (out is None or repeat.takes(out, record.x, dy)):
            assert record.saved is not None
            dx, dparams = repeat.backward(dy, record.x, out, record.params, record.saved)
            return Gradients(dx), dparams
    found = compute_gradients(dispatcher, record, dy, out)
    if plain:
        dispatcher.remember("backward", record.x, out, shapes)
    return found


def _is_like(dy: Any, x: Array) -> bool:
    if type(dy) is not np.ndarray or dy.shape != x.shape or dy.strides != x.strides or dy.dtype != x.dtype:
        return False
    return dy.flags.aligned


def compute_gradients(dispatcher: Dispatcher, record: Record, dy: Any, out: Array | None) -> tuple[Gradients, Array]:
    """The gradients but those of gamma and beta, and those as one (2, C) array."""
    dy = dtypes.as_float_array(dy, "dy")
    if dy.shape != record.x.shape:
        raise ValueError(f"dy must have the shape of the output, {record.x.shape}; received {dy.shape}")
    dy = dy.astype(record.x.dtype, copy=False)
    if out is not None:
        _check_gradient_out(out, record)
    training = record.saved is not None
    activated = record.residual is not None or record.adjustment is not None
    if out is not None and activated and dispatcher.options.activation is None and np.may_share_memory(out, dy):
        dy = dy.copy()  # the gradients of the residual and the adjustment need it after `out` is written
    dx, dparams, dz = dispatcher.backward(
        dy,
        record.x,
        record.params,
        dispatcher.saved_of(record.state) if record.saved is None else record.saved,
        training=training,
        residual=record.residual,
        weights=record.weights,
        adjustment=record.adjustment,
        out=out,
        activated=activated,
    )
    adjustment = None
    if record.adjustment is not None:
        assert dz is not None
        adjustment = _pull_back_adjustment(dispatcher, record, record.adjustment, dz)
    residual = None
    if record.residual is not None:
        residual = dz.copy() if dz is dy else dz
    return Gradients(dx, None, None, adjustment, residual), dparams


def _check_gradient_out(out: Array, record: Record) -> None:
    check_out(out, record.x)
    if any(a is not None and np.may_share_memory(out, a) for a in (record.x, record.residual)):
        raise ValueError("out must not share memory with the input or the residual, which a later call needs")


def _pull_back_adjustment(
    dispatcher: Dispatcher, record: Record, adjustment: tuple[Array, Array], dz: Array
) -> tuple[Array, Array]:
    """da = dz * gamma * (x_hat * r + d) and db = dz * gamma, summed to the shapes of a and b."""
    assert record.saved is not None
    gamma, saved = record.params[channel.GAMMA], record.saved
    # An inference step whose parameters and statistics make it compute gamma * (x_hat * r + d).
    scale = gamma * saved[channel.R] * saved[channel.RSTD]
    state = np.stack([saved[channel.BATCH_MEAN], np.ones_like(gamma)]).astype(gamma.dtype)
    shift = gamma * saved[channel.D] - (saved[channel.BATCH_MEAN] - state[channel.MEAN]) * scale
    params = np.stack([scale * np.sqrt(1 + dispatcher.options.epsilon), shift]).astype(gamma.dtype)
    z = dispatcher.infer(record.x.astype(gamma.dtype, copy=False), params, state, activate=False)
    axis = dispatcher.axis(record.x.ndim)
    per_channel = gamma.reshape([s if i in axis else 1 for i, s in enumerate(record.x.shape)])
    dz64 = dz.astype(np.float64)
    a, b = adjustment
    return sum_to(dz64 * z, a.shape, gamma.dtype), sum_to(dz64 * per_channel, b.shape, gamma.dtype)
