"""The forward pass of a layer, on arrays of every kind."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nbbn.arrays import HOST, Array, place_of
from nbbn.call.gradients import Gradients, Record, gradients
from nbbn.call.operands import as_adjustment, as_input, as_like, as_out, as_weights, refuse_overlap
from nbbn.core import dtypes
from nbbn.core.options import Options, boolean
from nbbn.engine.base import NOTHING, Operands
from nbbn.engine.dispatcher import Dispatcher
from nbbn.runtime import StateLock
from nbbn.state.shapes import Shapes, check_input
from nbbn.state.variables import Variables

NO_LOCK = contextlib.nullcontext()


class Normalizer:
    """What can be called: options, and variables that the first input makes where it lies.

    Whatever a class overrides is asked in every call, also in one that takes a bound step: what that leaves out are
    functions of this module.
    """

    name: str
    scale: bool
    center: bool
    _trainable: bool
    _dispatcher: Dispatcher

    _FREEZES = True  # trainable=False means inference

    def __init__(self) -> None:
        self._variables: Variables | None = None
        self._building = StateLock()

    @property
    def options(self) -> Options:
        return self._dispatcher.options

    def _built_variables(self, what: str) -> Variables:
        if self._variables is None:
            raise ValueError(f"{what} needs a built layer; call build(input_shape) first")
        return self._variables

    def _make_variables(self, shapes: Shapes) -> Variables:
        """Variables with their initial values, on the host."""
        raise NotImplementedError

    def __call__(
        self,
        inputs: Any,
        training: bool | None = None,
        mask: Any = None,
        update_statistics: bool = True,
        out: Any = None,
        residual: Any = None,
    ) -> Any:
        """The normalized input: an array of its shape and dtype.

        Args:
            inputs: float16, bfloat16, float32 or float64 array of the rank that the layer was built for; never changed.
                A layer with a dtype takes bools and integers, too, and casts them.
            training: use the batch's statistics and update the moving ones. None means False.
            mask: bool or real weights >= 0 of the elements in the batch's statistics. With fewer dimensions than the
                input it stands for the leading ones that are no feature axes, as Keras's masks do: (N,) for samples,
                (N, T) for steps, where 1 stands for all, as in (1, T). With the input's rank it broadcasts against
                it. Ignored in inference.
            update_statistics: False leaves the moving statistics alone.
            out: an array for the result, which is returned; may be `inputs` or `residual` itself.
            residual: array of the input's shape that is added to the normalized input, before the activation.
        Raises: TypeError, ValueError; the layer is then as it was.
        """
        return self._forward(inputs, training, mask, update_statistics, out, residual, False)[0]

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """The same as calling the layer."""
        return self(*args, **kwargs)

    def vjp(
        self,
        inputs: Any,
        training: bool | None = None,
        mask: Any = None,
        update_statistics: bool = True,
        out: Any = None,
        residual: Any = None,
    ) -> tuple[Any, Callable[..., Gradients]]:
        """The normalized input, and a function from the gradient of the output to Gradients.

        The function, `pullback(dy, out=None)`, may be called any number of times, from any thread; `out` takes the
        gradient of the input. It refers to `inputs` and `residual`, which must not change until then; parameters and
        statistics are those of this call.
        """
        y, record = self._forward(inputs, training, mask, update_statistics, out, residual, True)
        assert record is not None

        def pullback(dy: Any, out: Any = None) -> Gradients:
            return gradients(self._dispatcher, record, dy, out, self.scale, self.center)

        return y, pullback

    def _uses_batch(self, training: bool | None) -> bool:
        if training is True:
            return self._trainable or not self._FREEZES
        if training is None or training is False:
            return False
        return self._uses_batch(boolean("training", training, "True, False or None"))

    def _update(self, variables: Variables, new_state: Array, saved: Array, inputs: Any) -> None:
        """Make the statistics after a training step those of the layer. The caller holds the variables' lock.

        saved: begins with the moments of the batch, see Engine. inputs: as the caller has passed them.
        """
        variables.keep(new_state)

    def _forward(
        self, inputs: Any, training: bool | None, mask: Any, update: bool, out: Any, residual: Any, keep: bool
    ) -> tuple[Any, Record | None]:
        """The output, an array of the input's library, and its record if it is to be kept.

        A call with nothing but an output and a residual beside its input takes the step that an earlier one like it
        has left behind. It stands for the checks and choices in _prepare(), and for nothing else.
        """
        batch = self._uses_batch(training)
        if update is not True and update is not False:
            update = boolean("update_statistics", update)
        variables: Any = self._variables  # None only before _prepare()
        x: Any = inputs
        step: Any = None  # the bound step of these arrays, where there is one
        if mask is None and type(inputs) is np.ndarray:
            name = "train" if batch else "infer"
            step = self._dispatcher.bound.get((name, residual is not None, inputs.shape, inputs.dtype))
        general = step is None or not step.fits(variables, inputs, out, residual)
        if general:
            x, target, operands, dtype, clips, variables = _prepare(self, inputs, batch, mask, out, residual, keep)
            residual = operands.residual
        if batch:
            # The lock makes the update one step of a sequence: threads that train one layer lose none.
            with variables.lock if update else NO_LOCK:
                state = variables.state
                if general:
                    in_place = variables.place.in_place and update and type(self)._update is Normalizer._update
                    y, new_state, saved = self._dispatcher.train(
                        x, variables.params, state, operands, clips=clips, out=target, in_place=in_place
                    )
                else:
                    y, new_state, saved = step.train(x, residual, out, variables.params, state)
                if update and new_state is not state:
                    self._update(variables, new_state, saved, inputs)
        else:
            params, state = variables.params, variables.state
            if general:
                y = self._dispatcher.infer(x, params, state, residual=residual, out=target)
            else:
                y = step.infer(x, residual, out, params, state)
            if keep:
                saved = self._dispatcher.freeze(params, state, x.dtype)
        record = None
        if keep:
            if not general:
                operands, dtype = NOTHING if residual is None else Operands(residual), x.dtype
            record = Record(x, saved, batch, operands, dtype, variables, None if general or not batch else step)
        if general:
            beside = [a for a in (target, residual) if a is not None]
            if mask is None and all(isinstance(a, np.ndarray) and a.flags.c_contiguous for a in beside):
                self._dispatcher.bind("train" if batch else "infer", x, residual is not None, variables)
            y = place_of(y).give(y) if out is None else out
        return y, record


def take(layer: Normalizer, inputs: Any) -> tuple[Array, np.dtype, Shapes]:
    """An input in the layer's dtype, the dtype of its gradient, and the shapes, which it agrees with."""
    own, known = layer.options.dtype, layer._variables
    x = as_input(inputs, floats=own is None)
    given = x.dtype if own is None or x.dtype.name in dtypes.NAMES else own  # integers have no gradient of their dtype
    layer._dispatcher.engine(x)  # raises where there is none
    if own is not None:
        x = place_of(x).astype(x, own)
    return x, given, check_input(layer.options, None if known is None else known.shapes, x.shape, x.dtype)


def _prepare(
    layer: Normalizer, inputs: Any, batch: bool, mask: Any, out: Any, residual: Any, keep: bool
) -> tuple[Array, Array | None, Operands, np.dtype, Mapping[str, float] | None, Variables]:
    """All that is checked and found out before anything changes: the input, where to write the result, what stands
    beside the input, the dtype of its gradient, the clips of a training step, and the variables, which are made
    if there are none."""
    x, given, shapes = take(layer, inputs)
    target = None if out is None else as_out(out, x)
    added = None if residual is None else as_like(residual, x, "residual", "the input's")
    if keep:
        message = "out must not share memory with inputs or residual in vjp(), because the gradient needs them"
        refuse_overlap(target, [x, added], message)
    operands, clips, dtype = NOTHING if added is None else Operands(added), None, dtypes.statistic(x.dtype)
    if batch:
        layer._dispatcher.layout(x.shape, training=True)  # raises where a virtual batch does not fit
        if layer.options.adjustment is not None:
            a, b = as_adjustment(layer.options.adjustment, x, dtype)
            operands = operands._replace(a=a, b=b)
        if mask is not None:
            operands = operands._replace(weights=as_weights(mask, x, tuple(shapes.features), dtype))
        if not layer.options.is_constant:
            clips = layer.options.clip_values()  # callables are asked once, and raise before anything changes
    return x, target, operands, given, clips, _variables_for(layer, x, shapes)


def _variables_for(layer: Normalizer, x: Array, shapes: Shapes) -> Variables:
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
