"""A layer's weights, losses, constraints and switches."""

import itertools

import numpy as np
import pytest

import nbbn
from nbbn import BatchNormalization
from tests.helpers.layer_examples import X, batches, trained

# --- weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("center", "scale"), list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_weight_lists(center, scale, renorm, trainable):
    layer = BatchNormalization(center=center, scale=scale, renorm=renorm, trainable=trainable)
    assert layer.weights == layer.trainable_weights == layer.non_trainable_weights == layer.get_weights() == []
    layer.build((None, 3))
    parameters = [layer.gamma] * scale + [layer.beta] * center
    statistics = [layer.moving_mean, layer.moving_variance]
    if renorm:
        statistics += [layer.moving_stddev, layer.renorm_mean, layer.renorm_stddev]
    for found, expected in (
        (layer.weights, parameters + statistics),
        (layer.trainable_weights, parameters if trainable else []),
        (layer.non_trainable_weights, statistics if trainable else parameters + statistics),
    ):
        assert len(found) == len(expected)
        assert all(np.shares_memory(a, b) for a, b in zip(found, expected, strict=True))
    assert (layer.gamma is None, layer.beta is None) == (not scale, not center)
    assert (layer.moving_stddev is None) == (not renorm)
    assert layer.count_params() == 3 * len(layer.weights)


def test_before_build():
    layer = BatchNormalization(renorm=True)
    assert not layer.built
    assert layer.gamma is layer.beta is layer.moving_mean is layer.renorm_stddev is None
    for use in (layer.count_params, lambda: layer.set_weights([]), lambda: setattr(layer, "gamma", [1.0])):
        with pytest.raises(ValueError, match="build"):
            use()


def test_build_twice_changes_nothing():
    layer = trained()
    before = layer.get_weights()
    layer.build((None, 3))
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_get_weights_are_copies():
    layer = trained()
    for weight in layer.get_weights():
        weight[...] = 77
    assert not any((weight == 77).any() for weight in layer.weights)


def test_set_weights():
    layer = BatchNormalization(renorm=True)
    layer.build((None, 3))
    values = [np.full(3, i, np.float64) for i in range(7)]
    layer.set_weights(values)
    for value, weight in zip(values, layer.weights, strict=True):
        np.testing.assert_array_equal(weight, value)
        assert weight.dtype == np.float32
    values[0][...] = 77
    assert (layer.gamma == 0).all(), "the layer must not keep the arrays that it was given"


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (np.ones(2), ValueError),
        (1.0, ValueError),
        ("abc", TypeError),
        (np.ones(3) * 1j, TypeError),
        (None, TypeError),
    ],
    ids=["shape", "scalar", "text", "complex", "None"],
)
@pytest.mark.parametrize("name", ["gamma", "moving_variance"])
def test_values_that_are_no_weight(value, error, name):
    layer = trained()
    before = layer.get_weights()
    with pytest.raises(error, match=name):
        setattr(layer, name, value)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_assigning_what_the_layer_does_not_have():
    layer = BatchNormalization(center=False)
    layer.build((None, 3))
    with pytest.raises(AttributeError, match="beta"):
        layer.beta = np.ones(3)
    with pytest.raises(AttributeError, match="renorm_mean"):
        layer.renorm_mean = np.ones(3)


def test_parameters_are_persistent():
    """An optimizer may hold them, and write to them in place."""
    layer = trained()
    gamma, beta = layer.gamma, layer.beta
    gamma -= 0.5
    layer.beta *= 2
    layer(X, training=True)
    layer.set_weights([w + 1 for w in layer.get_weights()])
    layer.gamma = layer.gamma + 1
    np.testing.assert_array_equal(gamma, [2.5, 3.5, 4.5])
    np.testing.assert_array_equal(beta, [9, 11, 13])
    assert np.shares_memory(gamma, layer.gamma)
    np.testing.assert_allclose(layer(layer.moving_mean[None])[0], beta, rtol=1e-6)


def test_assigned_statistics_are_used():
    layer = trained()
    layer.moving_mean = [1, 2, 3]
    layer.moving_variance = np.array([4, 9, 16]) - 1e-3
    y = layer(np.array([[1, 2, 3], [3, 5, 7]], np.float32))
    np.testing.assert_allclose(y, [layer.beta, layer.gamma + layer.beta], rtol=1e-6)


def test_statistics_that_were_read_do_not_change():
    """A training call replaces them: what was read before stays as it was."""
    layer = trained()
    mean = layer.moving_mean
    before = mean.copy()
    layer(X + 5, training=True)
    np.testing.assert_array_equal(mean, before)
    assert not np.array_equal(layer.moving_mean, before)


def test_layers_without_features():
    layer = BatchNormalization()
    assert layer(np.zeros((4, 0), np.float32), training=True).shape == (4, 0)
    assert [w.shape for w in layer.weights] == [(0,)] * 4


@pytest.mark.parametrize("shape", [(None, 3), [5, 3], (5, 3)])
def test_compute_output_shape(shape):
    assert BatchNormalization().compute_output_shape(shape) == tuple(shape)


def test_apply_is_the_call():
    layer = trained()
    np.testing.assert_array_equal(layer.apply(X), layer(X))
    layer.apply(X, training=True, mask=np.ones(8, bool))


def test_lists_are_inputs():
    with pytest.raises(TypeError, match="int64"):
        BatchNormalization()([[1, 2], [3, 4]])
    assert BatchNormalization()([[1.0, 2.0], [3.0, 4.0]]).dtype == np.float64


def test_masked_arrays_are_refused():
    x = np.ma.masked_less(X, 0)
    with pytest.raises(TypeError, match="mask"):
        BatchNormalization()(x, training=True)


# --- losses, constraints, updates ------------------------------------------------------------------------------


def test_losses():
    layer = BatchNormalization(gamma_regularizer=nbbn.regularizers.L2(0.5), beta_regularizer=nbbn.regularizers.L1(2.0))
    assert layer.losses == []
    layer.build((None, 3))
    layer.gamma[...] = [1, 2, 3]
    layer.beta[...] = [-1, 0, 1]
    assert layer.losses == layer.get_losses_for(None) == [7.0, 4.0]
    assert layer.get_losses_for(X) == []
    gradients = layer.regularization_gradients()
    np.testing.assert_array_equal(gradients.gamma, [1, 2, 3])
    np.testing.assert_array_equal(gradients.beta, [-2, 0, 2])
    assert gradients.inputs is None
    assert gradients.adjustment is None


def test_losses_of_what_does_not_exist():
    layer = BatchNormalization(center=False, beta_regularizer="l2", gamma_regularizer="l2")
    layer.build((None, 3))
    assert len(layer.losses) == 1
    assert layer.regularization_gradients().beta is None


def test_constraints():
    layer = BatchNormalization(gamma_constraint=nbbn.constraints.MaxNorm(1.0), beta_constraint="non_neg")
    layer.build((None, 2))
    gamma = layer.gamma
    layer.gamma[...] = [3, 4]
    layer.beta[...] = [-1, 1]
    layer(np.ones((4, 2), np.float32), training=True)
    np.testing.assert_array_equal(layer.gamma, [3, 4])  # not in the forward pass
    layer.apply_constraints()
    np.testing.assert_allclose(gamma, [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(layer.beta, [0, 1])


def test_constraints_before_build_do_nothing():
    BatchNormalization(gamma_constraint="non_neg").apply_constraints()


def test_no_updates_wait():
    layer = trained()
    assert layer.updates == []
    assert layer.get_updates_for(X) == []


# --- momentum None -----------------------------------------------------------------------------------------------


def test_momentum_none_is_the_average_of_all_training_calls():
    layer = BatchNormalization(momentum=None)
    data = batches(5)
    for x in data:
        layer(x, training=True)
        layer(x)  # counts for nothing
        layer(x, training=True, update_statistics=False)
        layer(x[:0], training=True)
    np.testing.assert_allclose(layer.moving_mean, np.mean([x.mean(0, np.float64) for x in data], 0), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, np.mean([x.var(0, np.float64) for x in data], 0), rtol=1e-5)


def test_momentum_none_averages_what_each_statistic_has_seen():
    """A statistic that a batch's mask leaves out has one batch less, whether that is the first or not."""
    layer = BatchNormalization(momentum=None)
    data = batches(4)
    masks = np.ones((4, 8, 3), bool)
    masks[0, :, 0] = masks[2, :, 1] = False
    for x, mask in zip(data, masks, strict=True):
        layer(x, training=True, mask=mask)
    for channel in range(3):
        seen = [x[:, channel].mean(dtype=np.float64) for x, mask in zip(data, masks, strict=True) if mask[0, channel]]
        np.testing.assert_allclose(layer.moving_mean[channel], np.mean(seen), rtol=1e-5, err_msg=f"channel {channel}")


# --- trainable --------------------------------------------------------------------------------------------------


def test_trainable_can_be_switched():
    layer = trained()
    frozen = layer(X)
    layer.trainable = False
    before = layer.get_weights()
    np.testing.assert_array_equal(layer(X, training=True), frozen)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    layer.trainable = True
    assert not np.array_equal(layer(X, training=True), frozen)
