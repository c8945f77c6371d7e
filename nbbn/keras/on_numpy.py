"""Training calls by Keras's backend of NumPy, which has no gradients."""

from typing import Any

from nbbn.keras import host
from nbbn.keras.asked import Beside, checked_numbers


def train(layer: Any, x: Any, beside: Beside) -> Any:
    """The output; the moving statistics are assigned."""
    variables, given = layer.state, host.given_of(layer, x, beside)
    made = host.train(host.dispatcher_of(layer), checked_numbers(layer), given, [v.value for v in variables])
    for variable, value in zip(variables, made.state, strict=True):
        variable.assign(value)
    return made.y
