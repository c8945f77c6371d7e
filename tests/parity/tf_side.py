"""TensorFlow as the parity tests use it: imported quietly on the CPU, its layers, and one call with gradients.

The tests get TensorFlow and its parts from here, because nothing of it may be imported before the environment is set.
"""

import os
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest

# TensorFlow reads these while it is imported. The GPUs are hidden from it only, not from the rest of the process.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
    tf = pytest.importorskip("tensorflow", reason="the parity tests compare with TensorFlow")
    tf_keras = pytest.importorskip("tf_keras", reason="the parity tests compare with Keras 2 (tf_keras)")
tf.config.set_visible_devices([], "GPU")

from tensorflow.python import tf2  # noqa: E402, F401
from tf_keras.src.layers.normalization import batch_normalization_v1  # noqa: E402
from tf_keras.src.legacy_tf_layers import normalization as legacy  # noqa: E402, F401

LAYERS = {"V1": batch_normalization_v1.BatchNormalization, "V2": tf_keras.layers.BatchNormalization}

PARAMETERS_16_BIT = {"float16": "float32", "bfloat16": "float32"}


def parameter_dtype(dtype: str) -> str:
    """The dtype of weights, statistics and arithmetic of a layer of this dtype."""
    return PARAMETERS_16_BIT.get(dtype, dtype)


def numpy_dtype(dtype: str) -> np.dtype:
    """NumPy's dtype for a name, bfloat16 included."""
    return np.dtype(tf.as_dtype(dtype).as_numpy_dtype)


class Call(NamedTuple):
    """One call: output, gradients of sum(y * dy), and the weights after it. None for what does not exist."""

    y: np.ndarray
    inputs: np.ndarray
    gamma: np.ndarray | None
    beta: np.ndarray | None
    a: np.ndarray | None
    b: np.ndarray | None
    weights: list[np.ndarray]


def call(
    layer: Any,
    x: np.ndarray,
    dy: np.ndarray,
    training: bool | None,
    mask: np.ndarray | None = None,
    adjustment: tuple[Any, Any] | None = None,
) -> Call:
    """Call a built layer eagerly; `adjustment` holds the tensors (a, b) that its `adjustment` function returns."""
    inputs = tf.constant(x)
    sources = {"inputs": inputs, "gamma": layer.gamma, "beta": layer.beta}
    sources |= dict(zip("ab", adjustment or (None, None), strict=True))
    sources = {name: source for name, source in sources.items() if source is not None}
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(list(sources.values()))
        y = layer(inputs, training=training, mask=mask)
    gradients = tape.gradient(y, sources, output_gradients=tf.constant(dy))
    found = {name: g if g is None else g.numpy() for name, g in gradients.items()}
    return Call(y.numpy(), *(found.get(name) for name in ("inputs", "gamma", "beta", "a", "b")), layer.get_weights())
