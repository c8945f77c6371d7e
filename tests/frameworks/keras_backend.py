"""What tests of nbbn.keras share. Keras has the backend that KERAS_BACKEND names when it is imported."""

import keras
import numpy as np
import pytest
from keras import ops

from tests.frameworks.cases import RNG, normal

MARKS = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of Keras's variables
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # of PyTorch's compiler
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # of the same
]

BACKEND = keras.backend.backend()
Theirs = keras.layers.BatchNormalization
HAS_GRADIENTS = BACKEND != "numpy"


def only(*backends):
    """A test that is for these backends: on others there is no such test."""

    def mark(test):
        return test if BACKEND in backends else None

    return mark


TRAINABLE = only("torch", "jax", "tensorflow")


def array(value):
    return ops.convert_to_numpy(value)


def step(layer, x, dy, compiled=False, **operands):
    """A training call: the output, and the gradients of x, of the trainable weights and of the residual."""
    own = {name: ops.convert_to_tensor(value) for name, value in operands.items()}
    x, dy = ops.convert_to_tensor(x), ops.convert_to_tensor(dy)
    if not layer.built:
        layer.build(x.shape)
    residual = [own.pop("residual")] if "residual" in own else []

    def call(x, *residual):
        return layer(x, training=True, **own, **dict(zip(("residual",), residual, strict=False)))

    inputs = [x, *residual]
    if BACKEND == "torch":
        import torch

        inputs = [t.clone().requires_grad_() for t in inputs]
        y = (torch.compile(call, backend="aot_eager") if compiled else call)(*inputs)
        weights = [v.value for v in layer.trainable_variables]
        for w in weights:
            w.grad = None
        y.backward(dy)
        return array(y), [array(t.grad) for t in (*inputs, *weights)]
    if BACKEND == "jax":
        import jax

        def pure(inputs, weights, state):
            named = dict(zip(("residual",), inputs[1:], strict=False))
            return layer.stateless_call(weights, state, inputs[0], training=True, **own, **named)

        def run(inputs, weights, state):
            y, pullback, new = jax.vjp(lambda i, w: pure(i, w, state), inputs, weights, has_aux=True)
            return y, pullback(dy), new

        values = [v.value for v in layer.trainable_variables], [v.value for v in layer.non_trainable_variables]
        y, gradients, new = (jax.jit(run) if compiled else run)(inputs, *values)
        for variable, value in zip(layer.non_trainable_variables, new, strict=True):
            variable.assign(value)
        return array(y), [array(g) for g in (*gradients[0], *gradients[1])]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def run(*inputs):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                y = call(*inputs)
            return y, tape.gradient(y, [*inputs, *(v.value for v in layer.trainable_variables)], dy)

        y, gradients = (tf.function(run) if compiled else run)(*inputs)
        return array(y), [array(g) for g in gradients]
    return array(call(*inputs)), []


DATA = normal(64, 6), RNG.normal(size=(64, 1)).astype(np.float32)


def network(norm, jit="auto", eager=False, **options):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8)(inputs)
    x = norm(**options)(x)
    x = keras.layers.Dense(8, activation="relu")(x)
    x = norm(**options)(x)
    model = keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(x))
    model.compile(keras.optimizers.SGD(0.02), "mse", jit_compile=jit, run_eagerly=eager)
    return model


def trained(norm, **options):
    model = network(norm, **options)
    for _ in range(3):
        model(DATA[0], training=True)
    return model
