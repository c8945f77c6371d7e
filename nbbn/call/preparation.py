"""All that is checked and found out before a call changes anything."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from nbbn.arrays import HOST, Array, place_of
from nbbn.call.operands import (
    Lengths,
    as_adjustment,
    as_input,
    as_lengths,
    as_like,
    as_out,
    as_weights,
    refuse_both,
    refuse_overlap,
)
from nbbn.core import dtypes
from nbbn.core.options import Numbers, Options
from nbbn.engine.base import NOTHING, Operands
from nbbn.engine.dispatcher import Dispatcher
from nbbn.runtime import StateLock
from nbbn.state.shapes import Shapes, check_input
from nbbn.state.variables import Variables


class Layer(Protocol):
    """What a call needs of a layer."""

    name: str
    _dispatcher: Dispatcher
    _variables: Variables | None
    _building: StateLock

    @property
    def options(self) -> Options: ...

    def _make_variables(self, shapes: Shapes) -> Variables: ...


class Prepared(NamedTuple):
    """The input, where to write the result, what stands beside the input, the dtype of the input's gradient, the
    numbers of a training step, which are None where the options are constant, and the variables."""

    x: Array
    target: Array | None
    operands: Operands
    dtype: np.dtype
    numbers: Numbers | None
    variables: Variables


def take(layer: Layer, inputs: Any) -> tuple[Array, np.dtype, Shapes]:
    """An input in the layer's dtype, the dtype of its gradient, and the shapes, which it agrees with."""
    own, known = layer.options.dtype, layer._variables
    x = as_input(inputs, floats=own is None)
    given = x.dtype if own is None or x.dtype.name in dtypes.NAMES else own  # integers have no gradient of their dtype
    layer._dispatcher.engine(x)  # raises where there is none
    if own is not None:
        x = place_of(x).astype(x, own)
    return x, given, check_input(layer.options, None if known is None else known.shapes, x.shape, x.dtype)


def prepare(layer: Layer, inputs: Any, batch: bool, mask: Any, out: Any, residual: Any, keep: bool) -> Prepared:
    """What a call needs, checked. The variables are made if there are none.

    batch: whether the call uses the statistics of its batch. keep: whether its gradient will be asked for.
    """
    refuse_both(mask)
    x, given, shapes = take(layer, inputs)
    target = None if out is None else as_out(out, x)
    added = None if residual is None else as_like(residual, x, "residual", "the input's")
    if keep:
        message = "out must not share memory with inputs or residual in vjp(), because the gradient needs them"
        refuse_overlap(target, [x, added], message)
    operands, numbers, dtype = NOTHING if added is None else Operands(added), None, dtypes.statistic(x.dtype)
    if batch:
        layer._dispatcher.layout(x.shape, training=True)  # raises where a virtual batch does not fit
        if layer.options.adjustment is not None:
            a, b = as_adjustment(layer.options.adjustment, x, dtype)
            operands = operands._replace(a=a, b=b)
    if isinstance(mask, Lengths):
        lengths = as_lengths(mask.value, x, layer._dispatcher.steps(x.ndim))
        operands = operands._replace(lengths=lengths)
        if place_of(x) is not HOST:  # where no kernel reads them
            operands = layer._dispatcher.weighted(x, operands)
    elif mask is not None:
        operands = operands._replace(weights=as_weights(mask, x, tuple(shapes.features), dtype))
    if batch and not layer.options.is_constant:
        numbers = layer.options.numbers()  # callables are asked once, and raise before anything changes
    return Prepared(x, target, operands, given, numbers, _variables_for(layer, x, shapes))


def _variables_for(layer: Layer, x: Array, shapes: Shapes) -> Variables:
    """Those for an input, which builds the layer where it lies. Raises: ValueError if they are elsewhere."""
    place = place_of(x)
    with layer._building:
        if layer._variables is None:
            made = layer._make_variables(shapes)
            layer._variables = made if place is HOST else made.moved(place)
        variables = layer._variables
    if variables.place.name != place.name:
        there = "the host" if place is HOST else place.name
        raise ValueError(
            f"inputs must be where the variables of {layer.name} are, on {variables.place.name}; received an array "
            f"on {there}: call to({place.name!r}) first"
        )
    return variables
