"""What may be set as weights: whatever training leaves, and nothing that cannot be statistics."""

import re

import numpy as np
import pytest

import nbbn
from nbbn import BatchNormalization

F32 = np.float32
SHAPE = (4, 3)
X = np.random.default_rng(0).uniform(0.5, 2, SHAPE).astype(F32)


def renormed(values):
    """A layer with renorm of two channels, and its weights but for some."""
    layer = BatchNormalization(renorm=True)
    layer.build((None, 2))
    weights = dict(zip(layer._variables.names, layer.get_weights(), strict=True))
    return layer, list((weights | {n: np.array(v) for n, v in values.items()}).values())


SPREADS = [("moving_variance", "moving_mean"), ("moving_stddev", "moving_mean"), ("renorm_stddev", "renorm_mean")]


@pytest.mark.parametrize("value", [-1.0, -1e-30, np.nan, -np.inf])
@pytest.mark.parametrize(("name", "mean"), SPREADS)
def test_a_spread_that_cannot_be(name, mean, value):
    layer, weights = renormed({name: [1.0, value]})
    before = layer.get_weights()
    message = f"{name} must not be negative, nor NaN where {mean} is finite; received {F32(value)}"
    with pytest.raises(ValueError, match=message):
        layer.set_weights(weights)
    with pytest.raises(ValueError, match=message):
        setattr(layer, name, [1.0, value])
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("options", [{}, {"renorm": True}], ids=str)
def test_squares_beyond_float64_leave_a_state_that_can_be_loaded(options):
    """And that ordinary batches bring back."""
    layer, twin = BatchNormalization(**options, momentum=0.5, renorm_momentum=0.5), BatchNormalization(**options)
    layer(np.array([[1e200], [-1e200]]), training=True)
    twin.build((None, 1), np.float64)
    twin.set_weights(layer.get_weights())
    for _ in range(1100):  # 2 ** -1074 is the smallest number
        layer(np.array([[1.0], [3.0]]), training=True)
    np.testing.assert_allclose(layer.moving_variance, 1, rtol=2e-3)  # renorm's is that with epsilon, without it again


@pytest.mark.parametrize("datum", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"renorm": True}], ids=str)
def test_what_training_on_bad_data_leaves_can_be_loaded(options, datum):
    x = X.copy()
    x[0, 1] = datum
    layer, twin = BatchNormalization(**options), BatchNormalization(**options)
    layer(x, training=True)
    twin.build(SHAPE)
    twin.set_weights(layer.get_weights())
    assert np.isnan(twin.moving_variance).tolist() == [False, True, False]
    # And it can be mended, in either order.
    twin.moving_mean = np.zeros(3)
    twin.moving_variance = np.ones(3)


def test_an_initial_variance_below_zero():
    layer = BatchNormalization(moving_variance_initializer=nbbn.initializers.Constant(-1))
    with pytest.raises(ValueError, match="moving_variance must not be negative"):
        layer(X)
    assert not layer.built


NO_WEIGHTS = {
    "a dict": (lambda w: {"gamma": w[0]}, TypeError, "a dict with the keys ['gamma']"),
    "None": (lambda w: None, TypeError, "None"),
    "a text": (lambda w: "abcd", TypeError, "'abcd'"),
    "a number": (lambda w: 4, TypeError, "4"),
    "of a state_dict": (
        lambda w: [*w, np.array(7)],
        ValueError,
        "5, of shapes [(3,), (3,), (3,), (3,), ()]: PyTorch's num_batches_tracked is no weight",
    ),
}


@pytest.mark.parametrize(("make", "error", "received"), NO_WEIGHTS.values(), ids=NO_WEIGHTS)
def test_what_are_no_weights(make, error, received):
    layer = BatchNormalization()
    layer.build(SHAPE)
    takes = "set_weights() takes a list of 4 arrays (gamma, beta, moving_mean, moving_variance); received "
    with pytest.raises(error, match=re.escape(takes + received)):
        layer.set_weights(make(layer.get_weights()))


def test_weights_from_whatever_is_iterated():
    layer = BatchNormalization()
    layer.build(SHAPE)
    layer.set_weights(w + 1 for w in layer.get_weights())
    np.testing.assert_array_equal(layer.gamma, 2)
