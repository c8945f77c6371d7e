"""Training calls by Keras's backend of JAX, in its compiled programs and outside."""

from typing import Any

import keras

from nbbn.jax import batch_norm
from nbbn.jax.numbers import is_compiling
from nbbn.keras import asked
from nbbn.keras.asked import Beside

# nbbn.jax's names for the statistics.
_NAMES = {"moving_variance": "var", "seen_variance": "seen_var"}


def train(layer: Any, x: Any, beside: Beside) -> Any:
    """The output; the moving statistics are assigned."""
    variables = layer.state
    state = {_NAMES.get(v.name, v.name.removeprefix("moving_")): v.value.reshape(-1) for v in variables}
    scale, bias = (None if v is None else v.value.reshape(-1) for v in (layer.gamma, layer.beta))
    y, new_state = batch_norm(
        x,
        scale,
        bias,
        state,
        training=True,
        axis=tuple(layer.axis) if isinstance(layer.axis, (list, tuple)) else layer.axis,
        **asked.fixed(layer),
        **asked.numbers(layer, _as_number),
        **beside._asdict(),
    )
    for variable, value in zip(variables, new_state.values(), strict=True):
        variable.assign(value.reshape(variable.shape))
    return y


def _as_number(value: Any) -> Any:
    """What a callable has given. Raises: ValueError for a number in a program that is being compiled."""
    if isinstance(value, keras.Variable):
        return value.value
    if is_compiling():
        raise ValueError(
            "callables for momenta and renorm_clipping must give a keras.Variable of the model where JAX compiles the "
            f"program, which would keep a number for ever; received {value!r}. Or compile(..., run_eagerly=True)"
        )
    return value
