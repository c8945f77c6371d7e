"""The forward pass of a layer, on arrays of every kind."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nbbn.arrays import Array, found_on_gpu, giver, place_of, view
from nbbn.call.collector import Collector
from nbbn.call.gradients import Gradients, Record, gradients
from nbbn.call.operands import Lengths, own_weights, refuse_both
from nbbn.call.preparation import prepare
from nbbn.call.step import Host, TrainingStep
from nbbn.core import dtypes
from nbbn.core.options import Numbers, Options, boolean
from nbbn.engine.base import NOTHING, Operands
from nbbn.engine.dispatcher import Dispatcher, bound_key
from nbbn.runtime import StateLock
from nbbn.state.shapes import Shapes
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
    _collector: Collector | None = None  # takes the moments of training calls in the place of an update

    def __init__(self) -> None:
        self._variables: Variables | None = None
        self._building = StateLock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, as a checkpoint is one, has no part in what its original takes part in."""
        return {name: value for name, value in self.__dict__.items() if name != "_collector"}

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
        lengths: Any = None,
    ) -> Any:
        """The normalized input: an array of its shape and dtype.

        Args:
            inputs: float16, bfloat16, float32 or float64 array of the rank that the layer was built for; never changed.
                A layer with a dtype takes bools and integers, too, and casts them.
            training: use the batch's statistics and update the moving ones. None means False.
            mask: bool or real weights >= 0 of the elements in the batch's statistics. With fewer dimensions than the
                input it stands for the leading ones that are no feature axes, as Keras's masks do: (N,) for samples,
                (N, T) for steps, where 1 stands for all, as in (1, T). With the input's rank it broadcasts against
                it. Without consequence for the output of inference.
            update_statistics: False leaves the moving statistics alone.
            out: an array for the result, which is returned; may be `inputs` or `residual` itself.
            residual: array of the input's shape that is added to the normalized input, before the activation.
            lengths: (N,) integers, in the place of a mask: of sample n the first lengths[n] steps are in the batch's
                statistics, 0 to all. Steps are the first dimension after the batch that is no feature axis: 1 of
                (N, T, C), 2 of (N, C, T) with axis=1. On the host or, as the input, on a GPU, where nobody checks them.
        Raises: TypeError, ValueError; the layer is then as it was.
        """
        if lengths is not None:
            mask = Lengths(lengths, mask)
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
        lengths: Any = None,
    ) -> tuple[Any, Callable[..., Gradients]]:
        """The normalized input, and a function from the gradient of the output to Gradients.

        The function, `pullback(dy, out=None)`, may be called any number of times, from any thread; `out` takes the
        gradient of the input. It refers to `inputs` and `residual`, which must not change until then; parameters and
        statistics are those of this call.
        """
        if lengths is not None:
            mask = Lengths(lengths, mask)
        y, record = self._forward(inputs, training, mask, update_statistics, out, residual, True)
        assert record is not None

        def pullback(dy: Any, out: Any = None) -> Gradients:
            return self._gradients(record, dy, out)

        return y, pullback

    def _gradients(self, record: Record, dy: Any, out: Any) -> Gradients:
        return gradients(self._dispatcher, record, dy, out, self.scale, self.center)

    def start(
        self,
        inputs: Any,
        mask: Any = None,
        update_statistics: bool = True,
        out: Any = None,
        residual: Any = None,
        lengths: Any = None,
    ) -> TrainingStep:
        """The first half of a training call, for whoever merges its statistics with those of others: see TrainingStep.

        The arguments are those of a call; `inputs` and `residual` must not change until the gradient is there.

        Raises: TypeError, ValueError as a call; ValueError if the layer does not use the statistics of a batch. The
            layer is then as it was.
        """
        if not self._uses_batch(True):
            raise ValueError(f"start() is for training, and {self.name} is not trainable: call it")
        if lengths is not None:
            mask = Lengths(lengths, mask)
        return TrainingStep(self, inputs, mask, update_statistics, out, residual)

    @property
    def _in_halves(self) -> bool:
        """Whether a training call is a TrainingStep, because others share its statistics."""
        return False

    def _shared_moments(
        self, steps: Sequence[TrainingStep], own: Host | None, cause: Exception | None = None
    ) -> Host | None:
        """The moments of all that share the statistics of steps, which are one call: here, of nobody else. own: of
        these; None where they cannot take part, for a cause."""
        return own

    def _shared_sums(self, record: Record, own: Host | None, cause: Exception | None = None) -> Host | None:
        """The sums of the gradient of all that share the statistics of a step, likewise."""
        return own

    def _uses_batch(self, training: bool | None) -> bool:
        if training is True:
            return self._trainable or not self._FREEZES
        if training is None or training is False:
            return False
        return self._uses_batch(boolean("training", training, "True, False or None"))

    @property
    def _updates_in_place(self) -> bool:
        return self._collector is None and type(self)._update is Normalizer._update

    def _update(
        self, variables: Variables, new_state: Array, saved: Array, inputs: Any, numbers: Numbers | None
    ) -> None:
        """Make the statistics after a training step those of the layer. The caller holds the variables' lock.

        saved: begins with the moments of the batch, see Engine. inputs: as the caller has passed them. numbers: what
        the options have given for this call; None where they are constant.
        """
        variables.keep(new_state)

    def _forward(
        self, inputs: Any, training: bool | None, mask: Any, update: bool, out: Any, residual: Any, keep: bool
    ) -> tuple[Any, Record | None]:
        """The output, an array of the input's library, and its record if it is to be kept.

        A call with nothing but an output, a residual and a mask beside its input takes the step that an earlier one
        like it has left behind. It stands for the checks and choices in prepare(), and for nothing else.
        """
        batch = self._uses_batch(training)
        if update is not True and update is not False:
            update = boolean("update_statistics", update)
        variables: Any = self._variables  # None only before prepare()
        x: Any = inputs
        target, give = out, None
        step: Any = None  # the bound step of these arrays, where there is one
        is_numpy, on_gpu = type(inputs) is np.ndarray, False
        if not is_numpy and (give := giver(inputs)) is not None:
            x, target, residual, is_numpy = view(inputs), view(out), view(residual), True
        elif not is_numpy:
            x = found_on_gpu(inputs)
            if on_gpu := x is not inputs:
                target, residual = found_on_gpu(out), found_on_gpu(residual)
        name, mask_shape, weights = "train" if batch else "infer", None, None
        if mask is not None and not (batch or keep):
            refuse_both(mask)
            mask = None  # inference has no sums
        if mask is not None:
            known = batch and type(mask) is np.ndarray and not on_gpu
            mask_shape = mask.shape if known else ()  # which no mask of a bound step has
        if is_numpy:
            step = self._dispatcher.bound.get((name, residual is not None, x.shape, x.dtype, mask_shape))
        elif on_gpu:
            step = self._dispatcher.bound.get(bound_key(name, x, residual is not None, mask_shape))
        general = step is None or not step.fits(variables, x, target, residual)
        if general and is_numpy and not x.flags.c_contiguous:
            step = self._dispatcher.bound.get((name, residual is not None, x.shape, x.dtype, mask_shape, x.strides))
            general = step is None or not step.fits(variables, x, target, residual)
        if general:
            x, target, operands, dtype, numbers, variables = prepare(self, x, batch, mask, target, residual, keep)
            residual = operands.residual
        elif mask is not None:
            weights = own_weights(mask, x, self._dispatcher.axis(x.ndim), dtypes.statistic(x.dtype))
        if batch:
            # The lock makes the update one step of a sequence: threads that train one layer lose none.
            with variables.lock if update else NO_LOCK:
                state = variables.state
                in_place = variables.place.in_place and update and self._updates_in_place
                if general:
                    y, new_state, saved = self._dispatcher.train(
                        x, variables.params, state, operands, numbers=numbers, out=target, in_place=in_place
                    )
                else:
                    numbers = None
                    new_state = state if in_place else None
                    y, new_state, saved = step.train(x, residual, target, variables.params, state, weights, new_state)
                if update and new_state is not state:
                    if self._collector is None:
                        self._update(variables, new_state, saved, inputs, numbers)
                    else:
                        self._collector.take(self, saved, x, numbers)
        else:
            params, state = variables.params, variables.state
            if general:
                y = self._dispatcher.infer(x, params, state, residual=residual, out=target)
            else:
                y = step.infer(x, residual, target, params, state)
            if keep:
                saved = self._dispatcher.freeze(params, state, x.dtype)
        record = None
        if keep:
            if not general:
                operands = NOTHING if residual is None and weights is None else Operands(residual, weights)
                dtype = x.dtype
            record = Record(
                x, saved, batch, operands, dtype, variables, None if general or not batch else step, None, give
            )
        if general and mask_shape != ():
            self._dispatcher.bind(name, x, residual is not None, (y, residual), variables, operands.weights, mask_shape)
        if general or give is not None:
            y = out if out is not None else (give or place_of(y).give)(y)
        return y, record
