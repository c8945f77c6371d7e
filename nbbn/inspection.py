"""How a layer would run, and choices made by hand."""

from typing import Any

import numpy as np

from nbbn.dispatcher import Dispatcher, Force, Plan
from nbbn.layers import BatchNormalization
from nbbn.operands import as_input


def explain(layer: BatchNormalization, inputs: Any, training: bool = False) -> Plan:
    """How `layer` would run on `inputs`: step, view, schedule, chunks, dtypes and threads; print it to read it."""
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


def force(layer: BatchNormalization, **choices: Any) -> None:
    """Make `layer` run with a given schedule or thread mode (see Force); for tests and measurements."""
    layer._dispatcher = Dispatcher(layer.options, Force(**choices))
