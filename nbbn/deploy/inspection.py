"""How a layer would run, and choices made by hand."""

from typing import Any

from nbbn.call.preparation import take
from nbbn.engine.base import Force
from nbbn.engine.dispatcher import Dispatcher
from nbbn.layer.layer import BatchNormalization


def explain(layer: BatchNormalization, inputs: Any, training: bool = False) -> Any:
    """How `layer` would run on `inputs`: a plan with step, view, schedule, chunks, dtypes and threads, or what there is
    of these on a GPU; print it to read it. Where training shares its statistics, the plan is of what comes before."""
    x, _, _ = take(layer, inputs)
    step = "infer" if not layer._uses_batch(training) else "reduce" if layer._in_halves else "train"
    return layer._dispatcher.explain(x, step)


def force(layer: BatchNormalization, **choices: Any) -> None:
    """Make `layer` run with a given schedule or thread mode (see Force); for tests and measurements.

    Raises: TypeError, ValueError for choices that there are not where the layer is.
    """
    forced = Dispatcher(layer.options, Force(**choices))
    if layer._variables is not None:
        forced.engine(layer._variables.params)
    layer._dispatcher = forced
