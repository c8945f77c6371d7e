"""How a layer would run, and choices made by hand."""

from typing import Any

import numpy as np

from nbbn.dispatcher import Dispatcher, Force
from nbbn.layers import BatchNormalization
from nbbn.operands import as_input


def explain(layer: BatchNormalization, inputs: Any, training: bool = False) -> Any:
    """How `layer` would run on `inputs`: a Plan with step, view, schedule, chunks, dtypes and threads, or one with what
    a GPU does; print it to read it."""
    if layer._is_for_gpu(inputs):
        return _explain_on_gpu(layer, inputs, training)
    x = as_input(inputs)
    if layer.options.dtype is not None:
        x = x.astype(layer.options.dtype, copy=False)
    layer._check_input(x)
    dispatcher = layer._dispatcher
    output = np.empty_like(x, subok=False)
    if layer._uses_batch(training):
        return dispatcher.plan(
            "train", dispatcher.layout(x.shape, True), [x, None], [None] * 3, [output], dispatcher.flags("train")
        )
    return dispatcher.plan(
        "infer", dispatcher.layout(x.shape, False), [x, None], [], [output], dispatcher.flags("infer")
    )


def _explain_on_gpu(layer: BatchNormalization, inputs: Any, training: bool) -> Any:
    from nbbn.gpu.arrays import as_device_array

    x = as_device_array(inputs, "inputs")
    if layer.options.dtype is not None:
        x = x.astype(layer.options.dtype)
    layer._check_input(x)  # type: ignore[arg-type]  # it has a shape and a dtype
    return layer._device_dispatcher().explain(x, layer._uses_batch(training))


def force(layer: BatchNormalization, **choices: Any) -> None:
    """Make `layer` run with a given schedule or thread mode (see Force); for tests and measurements."""
    layer._dispatcher = Dispatcher(layer.options, Force(**choices))
