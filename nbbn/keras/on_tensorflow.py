"""Training calls by Keras's backend of TensorFlow: its programs call the kernels on NumPy arrays, on the host."""

from typing import Any

import numpy as np
import tensorflow as tf

from nbbn.keras import host
from nbbn.keras.asked import Beside, checked_numbers
from nbbn.kernels.channel import SAVED_ROWS


def train(layer: Any, x: Any, beside: Beside) -> Any:
    """The output; the moving statistics are assigned."""
    variables, run = layer.state, host.dispatcher_of(layer)
    given = {name: tf.convert_to_tensor(value) for name, value in host.given_of(layer, x, beside).items()}
    state, names = [tf.convert_to_tensor(v.value) for v in variables], list(given)
    differentiable = [name for name in names if name in host.DIFFERENTIABLE]

    def forward(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        made = host.train(run, checked_numbers(layer), dict(zip(names, arrays, strict=False)), [*arrays[len(names) :]])
        return made.y, made.saved, *made.state

    def backward(dy: np.ndarray, saved: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
        found = host.backward(run, dy, saved, dict(zip(names, arrays, strict=True)))
        return [found[name] for name in differentiable]

    @tf.custom_gradient
    def normalize(*tensors: Any) -> Any:
        own = tensors[: len(names)]
        y, saved, *new_state = _call(forward, tensors, [x, None, *state])
        saved.set_shape((SAVED_ROWS, None))

        @tf.custom_gradient
        def gradient(dy: Any, saved: Any, *own: Any) -> Any:
            like = [given[name] for name in differentiable]
            return _call(backward, (dy, saved, *own), like), _no_second

        def gradients(dy: Any, *_: Any) -> list[Any]:
            made = tf.nest.flatten(gradient(dy, saved, *own))
            found = dict(zip(differentiable, made, strict=True))
            return [*map(found.get, names), *(None for _ in state)]

        return (y, saved, *new_state), gradients

    y, _, *new_state = normalize(*given.values(), *state)
    for variable, value in zip(variables, new_state, strict=True):
        variable.assign(value)
    return y


def _call(function: Any, tensors: Any, like: list[Any]) -> list[Any]:
    """What a function of NumPy arrays makes, with the dtypes and shapes of `like`; None stands for float64."""
    dtypes = [tf.float64 if t is None else t.dtype for t in like]
    made = tf.nest.flatten(tf.numpy_function(function, tensors, dtypes))  # one tensor does not come as a list
    for tensor, t in zip(made, like, strict=True):
        if t is not None:
            tensor.set_shape(t.shape)
    return made


def _no_second(*_: Any) -> Any:
    raise NotImplementedError(
        "nbbn.keras has no second derivatives with TensorFlow: use the backend torch or jax, or Keras's own layer"
    )
