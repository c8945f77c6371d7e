"""nbbn.keras as Keras's own layer: names, inference, dtypes, fit."""

import contextlib

import keras
import numpy as np
import pytest
from keras import ops

from nbbn.keras import BatchNormalization
from tests.frameworks.cases import CLIPS, normal
from tests.frameworks.keras_backend import BACKEND, DATA, MARKS, TRAINABLE, Theirs, array, network, only, step

pytestmark = MARKS


def test_names_and_weights_are_keras_own():
    keras.backend.clear_session()
    theirs = Theirs(renorm=True)
    keras.backend.clear_session()
    ours = BatchNormalization(renorm=True)
    theirs.build((None, 3)), ours.build((None, 3))
    assert ours.name == theirs.name == "batch_normalization"
    assert [v.path for v in ours.weights] == [v.path for v in theirs.weights]
    assert [v.trainable for v in ours.weights] == [v.trainable for v in theirs.weights]


def test_inference_and_frozen_layers_are_keras_own():
    """Bit by bit."""
    x, ours, theirs = normal(8, 3, 3, 4), BatchNormalization(), Theirs()
    ours(x, training=True), theirs.build(x.shape)
    theirs.set_weights(ours.get_weights())
    np.testing.assert_array_equal(array(ours(x)), array(theirs(x)))
    before = ours.get_weights()
    ours.trainable = False
    np.testing.assert_array_equal(array(ours(x, training=True)), array(theirs(x)))
    for one, other in zip(before, [*ours.trainable_variables, *ours.non_trainable_variables], strict=True):
        np.testing.assert_array_equal(one, array(other))


WIDE = [] if BACKEND == "jax" else ["float64"]  # JAX has none, unless it is told at its start


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16", *WIDE])
def test_dtypes(policy):
    x, dy = normal(8, 3, 3, 4).astype(np.float32), normal(8, 3, 3, 4)
    layer, exact = BatchNormalization(dtype=policy), BatchNormalization()
    dtype = policy.removeprefix("mixed_")
    y = layer(ops.cast(x, dtype), training=True)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    assert {keras.backend.standardize_dtype(v.dtype) for v in layer.weights} == {
        "float32" if policy.startswith("mixed") else policy
    }
    expected, _ = step(exact, np.asarray(array(ops.cast(ops.cast(x, dtype), "float32"))), dy)
    eps = {"float16": 2e-3, "bfloat16": 2e-2, "float64": 1e-5}[dtype]  # twice a rounding of the output
    np.testing.assert_allclose(np.asarray(array(y), np.float32), expected, rtol=eps, atol=eps)
    mean, wanted = np.asarray(array(layer.moving_mean), np.float32), array(exact.moving_mean)
    # Statistics of a mixed layer are float32, and know nothing of 16 bits.
    np.testing.assert_allclose(mean, wanted, rtol=1e-5 if policy.startswith("mixed") else eps)


@TRAINABLE
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_fit_in_mixed_precision(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = network(BatchNormalization)
        losses = model.fit(*DATA, epochs=3, batch_size=16, verbose=0).history["loss"]
    finally:
        keras.config.set_dtype_policy(before)
    assert losses[-1] < 0.9 * losses[0]


@TRAINABLE
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Keras's own layer, compiled, too
@pytest.mark.parametrize("how", ["auto", "compiled", "eager"])
@pytest.mark.parametrize("options", [{}, {"renorm": True, "renorm_clipping": CLIPS, "renorm_momentum": 0.9}])
def test_fit_as_keras_own(how, options):
    """The same losses and weights after six steps, of which two are smaller.

    Keras's layer is not compiled by PyTorch: its renorm is another one there.
    """
    jit = (how == "compiled" and BACKEND != "tensorflow") or "auto"  # TensorFlow's XLA cannot call NumPy
    own = {"eager": True} if BACKEND == "torch" else {}
    given = {"eager": True} if how == "eager" else {"jit": jit}
    models = [network(Theirs, **own, **options), network(BatchNormalization, **given, **options)]
    losses = [m.fit(*DATA, epochs=2, batch_size=24, shuffle=False, verbose=0).history["loss"] for m in models]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for one, other in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(*(m.predict(DATA[0], verbose=0) for m in models), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(*(m.evaluate(*DATA, verbose=0) for m in models), rtol=1e-3)


@only("tensorflow")
def test_tensorflow_compiles_nothing_with_xla():
    model = network(BatchNormalization)
    assert not model.jit_compile
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        model.jit_compile = True


@only("torch")  # on the others Keras's scope gives layers no `training` that they could look at
def test_recomputing_counts_once():
    """Activations that are not kept: statistics are those of one call."""
    x, weights = normal(16, 6), []
    for scope in (contextlib.nullcontext(), keras.RematScope(mode="full")):
        keras.utils.set_random_seed(1)
        with scope:
            inputs = keras.Input((6,))
            model = keras.Model(inputs, keras.layers.Dense(1)(BatchNormalization(momentum=0.5)(inputs)))
            model.compile("sgd", "mse")
            model.train_on_batch(x, x[:, :1])
        weights.append(model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@only("torch")
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"renorm": True, "activation": "relu"}])
def test_small_calls_take_a_step_that_is_kept(options):
    """And the variables' memory; unless somebody watches operators, or replaces variables."""
    import torch

    from nbbn.keras import torch_quick

    layer, x = BatchNormalization(**options), torch.tensor(normal(8, 4))
    layer(x, training=True)
    (step,), views = torch_quick._kept[layer].steps.values(), torch_quick._kept[layer].views
    assert step is not None
    version = layer.moving_mean.value._version
    layer(x, training=True)
    assert torch_quick._kept[layer].views is views is not None
    assert layer.moving_mean.value._version > version  # autograd sees the change
    layer.moving_mean.value.data = torch.zeros(4)  # other memory
    layer(x, training=True)
    np.testing.assert_allclose(array(layer.moving_mean), 0.01 * array(x).mean(0), rtol=1e-5)
    before = layer.get_weights()
    torch.func.vmap(lambda x: layer(x, training=False))(x[None])
    values = [[v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables)]
    layer.stateless_call(*values, x, training=True)
    for one, other in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_stateless_calls_change_nothing():
    layer = BatchNormalization(momentum=0.0)
    layer.build((None, 4))
    x, before = normal(8, 4), layer.get_weights()
    values = [[v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables)]
    for _ in range(2):
        _, new = layer.stateless_call(*values, ops.convert_to_tensor(x), training=True)
        np.testing.assert_allclose(array(new[0]), x.mean(0), rtol=1e-5)
    for one, other in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_shapes_of_symbolic_calls():
    inputs, residual = keras.Input((4, 6)), keras.Input((4, 6))
    outputs = BatchNormalization(activation="relu")(inputs, residual=residual, mask=None)
    model = keras.Model([inputs, residual], outputs)
    assert outputs.shape == (None, 4, 6)
    x, r = normal(8, 4, 6), normal(8, 4, 6) - 5
    expected = np.maximum(x / np.sqrt(1.001) + r, 0)
    np.testing.assert_allclose(array(model([x, r])), expected, rtol=1e-5, atol=1e-5)
