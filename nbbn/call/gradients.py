"""From the gradient of a layer's output to those of its inputs and parameters, on arrays of every kind."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nbbn.arrays import Array, beside, found_on_gpu, place_of, view
from nbbn.call.operands import as_like, as_out, refuse_overlap
from nbbn.engine.base import Operands
from nbbn.engine.dispatcher import Dispatcher, bound_key
from nbbn.kernels import channel
from nbbn.state.variables import Variables


class Gradients(NamedTuple):
    """What a pullback returns; None for what does not exist. Arrays of the input's library.

    inputs: shape and dtype of the input; where that holds integers, the layer's dtype. gamma, beta: shape and dtype of
    the parameters. adjustment: a pair with the shapes of what `adjustment` returned. residual: its shape, dtype of the
    output.
    """

    inputs: Any = None
    gamma: Any = None
    beta: Any = None
    adjustment: tuple[Any, Any] | None = None
    residual: Any = None


class Record(NamedTuple):
    """What a forward pass leaves behind for its gradient. dtype: of the gradient, which is that of a float input. step:
    the bound step that the forward pass took. shared: by which exchange the ranks shared its statistics, and the number
    of that call. give: what makes arrays of the input's library, where that is another one than NumPy with arrays on
    the host."""

    x: Array
    saved: Array
    training: bool
    operands: Operands
    dtype: np.dtype
    variables: Variables
    step: Any = None
    shared: tuple[Any, int] | None = None
    give: Callable[[np.ndarray], Any] | None = None


def gradients(dispatcher: Dispatcher, record: Record, dy: Any, out: Any, scale: bool, center: bool) -> Gradients:
    """The pullback of a call. scale, center: whether there are gamma and beta.

    What follows is written for speed: a small step takes 3 us, and as much can be lost beside it.
    """
    x, saved, training, operands, _, variables, forward, _, give = record
    given_out = out
    is_numpy = type(x) is np.ndarray
    if give is not None:
        dy, out = view(dy), view(out)
    elif not is_numpy:
        dy, out = found_on_gpu(dy), found_on_gpu(out)
    residual, shapes = operands.residual, variables.shapes
    weights, mask_shape = operands.weights, None if forward is None else forward.mask_shape
    plain = training and (weights is None or mask_shape is not None)
    plain = plain and operands.lengths is None and operands.a is None
    step, adjustment, dz = None if forward is None else forward.gradient, None, None
    if step is None and plain:
        step = dispatcher.bound.get(bound_key("backward", x, residual is not None, mask_shape))
    if step is not None and dy is not None and step.fits(variables, x, out, residual, dy):
        dx, dparams, dz = step.backward(dy, x, residual, out, saved, weights)
        if give is None and residual is None and is_numpy and dparams.dtype == shapes.dtype and len(shapes.params) == 1:
            gamma, beta = dparams
            return Gradients(dx, gamma if scale else None, beta if center else None)
    else:
        upstream = Upstream(dispatcher, record, dy, out)
        dx, dparams, dz = dispatcher.backward(
            upstream.dy, x, saved, operands, training=training, out=upstream.target, wants_dz=upstream.wants_dz
        )
        dz = upstream.own(dz)  # after the step: planning stops there
        if operands.adjusted:
            adjustment = dispatcher.adjustment_gradients(x, saved, operands, dz)
        if plain:
            beside = upstream.dy, dx, residual
            dispatcher.bind("backward", x, residual is not None, beside, variables, weights, mask_shape)
    return _as_users_have_them(record, dx, dparams, dz, adjustment, given_out, scale, center)


def _as_users_have_them(
    record: Record, dx: Array, dparams: Array, dz: Array | None, adjustment: Any, out: Any, scale: bool, center: bool
) -> Gradients:
    shapes, place = record.variables.shapes, place_of(record.x)
    if dparams.dtype != shapes.dtype:
        dparams = place.astype(dparams, shapes.dtype)
    if record.dtype != record.x.dtype:
        dx = place.astype(dx, record.dtype)
    elif out is not None:
        dx = out
    rows = ((channel.GAMMA, scale), (channel.BETA, center))
    gamma, beta = [place.row(dparams, row, shapes.params) if there else None for row, there in rows]
    give: Callable[[Any], Any] = place.give
    if record.give is not None:
        give = record.give
        gamma, beta = [None if row is None else give(row) for row in (gamma, beta)]
    dz = None if record.operands.residual is None else give(dz)
    adjustment = None if adjustment is None else tuple(map(give, adjustment))
    return Gradients(dx if dx is out else give(dx), gamma, beta, adjustment, dz)


class Upstream:
    """The gradient of an output, checked.

    target: where to write the gradient of the input. wants_dz: whether operands need what the activation lets through.
    """

    def __init__(self, dispatcher: Dispatcher, record: Record, dy: Any, out: Any) -> None:
        x, operands, place = record.x, record.operands, place_of(record.x)
        self.dy = as_like(dy, x, "dy", "the output's")
        self.target = None if out is None else as_out(out, x)
        message = "out must not share memory with the input or the residual, which a later call needs"
        refuse_overlap(self.target, [x, operands.residual], message)
        self.wants_dz = operands.residual is not None or operands.adjusted
        same = self.wants_dz and dispatcher.options.activation is None  # dz is dy, which is the caller's
        if same and self.target is not None:  # and may be in `out`
            self.dy = place.astype(self.dy, self.dy.dtype, copy=True)
        self._is_callers = same and self.target is None and operands.residual is not None

    def own(self, dz: Array | None) -> Array | None:
        """dz as an array that is not the caller's dy."""
        return place_of(self.dy).astype(self.dy, self.dy.dtype, copy=True) if self._is_callers else dz


class Pullback:
    """The gradient of a training call in halves: the sums are merged with those of all that share the statistics.

    reduced: the sums of this input alone, (2, S), or with an adjustment (4, S), float64, where the input is.
    """

    def __init__(self, dispatcher: Dispatcher, record: Record, dy: Any, out: Any) -> None:
        self._dispatcher, self._record, self._out = dispatcher, record, out
        self._upstream = Upstream(dispatcher, record, dy, out)
        self.reduced, self._dparams = dispatcher.reduce_gradient(
            self._upstream.dy, record.x, record.saved, record.operands
        )

    @property
    def sums(self) -> np.ndarray:
        """The same on the host."""
        return place_of(self.reduced).to_host(self.reduced)

    def finish(self, sums: Array, scale: bool, center: bool) -> Gradients:
        """The gradients, of the sums of all, on the host or where the input is. Those of gamma and beta are of this
        input alone."""
        record, upstream, adjustment = self._record, self._upstream, None
        dx, dz = self._dispatcher.apply_gradient(
            upstream.dy,
            record.x,
            record.saved,
            beside(sums, record.x),
            record.operands,
            out=upstream.target,
            wants_dz=upstream.wants_dz,
        )
        dz = upstream.own(dz)
        if dz is not None and record.operands.adjusted:
            adjustment = self._dispatcher.adjustment_gradients(record.x, record.saved, record.operands, dz)
        return _as_users_have_them(record, dx, self._dparams, dz, adjustment, self._out, scale, center)
