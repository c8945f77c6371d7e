"""nbbn.keras with every option, against nbbn.BatchNormalization."""

import keras
import numpy as np
import pytest

import nbbn
from nbbn.keras import BatchNormalization
from tests.frameworks.cases import CASES, normal
from tests.frameworks.keras_backend import BACKEND, HAS_GRADIENTS, MARKS, TRAINABLE, array, step

pytestmark = MARKS

PAIR = normal(8, 1), normal(1, 5)
CASES = CASES | {
    "neither gamma nor beta": ((8, 5), {"scale": False, "center": False}, {}),
    "adjustment": ((8, 5), {"adjustment": lambda shape: PAIR}, {}),
    "adjustment, renorm, relu": (
        (8, 5),
        {"adjustment": lambda shape: PAIR, "renorm": True, "activation": "relu"},
        {"residual": normal(8, 5) - 3},
    ),
}
if BACKEND == "tensorflow":
    del CASES["many alternating axes"]  # inference is Keras's own operations, and TensorFlow does not broadcast these
EVERY_CASE = pytest.mark.parametrize("case", CASES)


def twin(shape, options):
    """nbbn's own layer with Keras's choices."""
    layer = nbbn.BatchNormalization(**{"bessel_correction": False} | options)
    layer.build(shape)
    return layer


def as_flat(weights):
    return [np.asarray(w).ravel() for w in weights]


@EVERY_CASE
@pytest.mark.parametrize("compiled", [False, True] if BACKEND in ("jax", "tensorflow") else [False])
def test_agrees_with_the_layer(case, compiled):
    """Two steps: outputs, gradients, every statistic; then inference."""
    shape, options, operands = CASES[case]
    ours, reference = BatchNormalization(**options), twin(shape, options)
    ours.build(shape)
    if ours.gamma is not None:
        gamma, beta = normal(*ours.gamma.shape), normal(*ours.beta.shape)
        ours.gamma.assign(gamma), ours.beta.assign(beta)
        reference.gamma, reference.beta = gamma.reshape(reference.gamma.shape), beta.reshape(reference.beta.shape)
    close = {"rtol": 2e-4, "atol": 2e-2 if case.startswith("large") else 2e-4}  # sums of 4096 float32 products
    for _ in range(2):
        x, dy = normal(*shape), normal(*shape) - 3
        y, gradients = step(ours, x, dy, compiled, **operands)
        expected, pullback = reference.vjp(x, training=True, **operands)
        np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)
        assert y.dtype == np.float32
        found = pullback(dy)
        wanted = [found.inputs, *([found.residual] if "residual" in operands else [])]
        wanted += [found.gamma, found.beta] if ours.scale else []
        for one, other in zip(gradients, wanted if HAS_GRADIENTS else [], strict=True):
            np.testing.assert_allclose(one.ravel(), other.ravel(), **close)
        for one, other in zip(as_flat(ours.get_weights()), as_flat(reference.get_weights()), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)
    added = {"residual": operands["residual"]} if "residual" in operands else {}
    np.testing.assert_allclose(array(ours(x, **added)), reference(x, **added), rtol=2e-5, atol=2e-5)


@TRAINABLE
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_an_adjustment(compiled):
    """a and b may be weights of the model."""
    a, b = (keras.Variable(value, name=name) for value, name in zip(PAIR, "ab", strict=True))
    shape, options = (8, 5), {"renorm": True, "activation": "relu"}
    x, dy = normal(*shape), normal(*shape)
    ours = BatchNormalization(**options)
    ours.a, ours.b = a, b  # variables of the layer
    ours.adjustment = lambda shape: (ours.a.value, ours.b.value)
    reference = twin(shape, options | {"adjustment": lambda shape: PAIR})
    _, gradients = step(ours, x, dy, compiled)
    found = reference.vjp(x, training=True)[1](dy)
    named = dict(zip(["x", *(v.name for v in ours.trainable_variables)], gradients, strict=True))
    for one, other in zip((named["a"], named["b"]), found.adjustment, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("axis", [-1, 1])
def test_large_means_and_what_is_excluded(axis):
    """What float32 sums would lose, and NaN where nothing counts."""
    shape = (6, 4, 5) if axis == -1 else (6, 5, 4)
    x, mask = normal(*shape) + 2e4, np.array([True, True, False, True, True, True])
    x[2] = np.nan
    layer = BatchNormalization(axis=axis, momentum=0.0)
    y = array(layer(x, training=True, mask=mask))
    kept, axes = x[mask].astype(np.float64), (0, 1) if axis == -1 else (0, 2)
    np.testing.assert_allclose(array(layer.moving_variance), kept.var(axes), rtol=1e-5)
    assert np.isfinite(y[mask]).all()


def test_a_mask_of_a_layer_before_is_about_positions():
    """Masking says which of the steps (N, T) count. With axis=1 those are features: it is the mask of their values."""
    x = normal(5, 3, 3)  # as many steps as features
    x[:, 1] = 0.0
    layer = BatchNormalization(axis=1, momentum=0.0)
    layer(keras.layers.Masking()(x), training=True)
    np.testing.assert_allclose(array(layer.moving_mean)[[0, 2]], x[:, [0, 2]].mean((0, 2)), rtol=1e-5)
    assert array(layer.moving_mean)[1] == 0.0  # nothing counts: it stays as it was
    explicit = BatchNormalization(axis=1, momentum=0.0)
    explicit(x, training=True, mask=np.array([[True, False, True]] * 5))  # of what is no feature: dimensions 0 and 2
    np.testing.assert_allclose(array(explicit.moving_mean), x[:, :, [0, 2]].mean((0, 2)), rtol=1e-5, atol=1e-6)


def test_the_mask_goes_on_beside_a_residual():
    x = normal(5, 4, 3)
    x[:, 1] = 0.0
    masked = keras.layers.Masking()(x)
    layer = BatchNormalization(momentum=0.0)
    layer(masked, training=True, residual=x)
    np.testing.assert_allclose(array(layer.moving_mean), x[:, [0, 2, 3]].mean((0, 1)), rtol=1e-5)


def test_schedules():
    """Callables are read at each call."""
    seen = iter([0.0, 1.0, 0.5])
    layer = BatchNormalization(momentum=lambda: next(seen))
    reference = np.zeros(4)
    for momentum in (0.0, 1.0, 0.5):
        x = normal(8, 4)
        layer(x, training=True)
        reference = momentum * reference + (1 - momentum) * x.mean(0)
        np.testing.assert_allclose(array(layer.moving_mean), reference, rtol=1e-5)


def test_clips_are_variables_or_numbers():
    rmax = keras.Variable(1.0, trainable=False)
    clips = {"rmax": rmax_of(rmax), "rmin": lambda: 1.0, "dmax": 0.0}
    renorm, plain = BatchNormalization(renorm=True, renorm_clipping=clips), BatchNormalization()
    x = normal(8, 4)
    np.testing.assert_allclose(array(renorm(x, training=True)), array(plain(x, training=True)), rtol=1e-5, atol=1e-5)
    rmax.assign(3.0)
    assert abs(array(renorm(x, training=True)) - array(plain(x, training=True))).max() > 0.1


def rmax_of(variable):
    return lambda: variable
