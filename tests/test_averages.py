"""What is kept of the batches: debias, skip_nonfinite and reset_statistics()."""

import numpy as np
import pytest

import nbbn
from nbbn import BatchNormalization
from nbbn.compat import v1
from tests.helpers.concurrency import in_threads_beside
from tests.helpers.layer_examples import DY, X, assert_same, assert_same_weights, batches, gradients_of, trained
from tests.oracle.agreement import check_step
from tests.oracle.reference import Reference

AVERAGES = ["moving_mean", "moving_variance"]


# -- debias ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"renorm": True, "renorm_momentum": 0.5}, {"virtual_batch_size": 4}], ids=str)
def test_debiased_averages_agree_with_the_oracle(options):
    options = {"debias": True, "momentum": 0.9, **options}
    layer, oracle = BatchNormalization(**options), Reference(**options).build(X.shape)
    for x in batches(4):
        check_step(layer, oracle, x, DY)


def test_a_channel_without_a_valid_value_keeps_its_average_and_its_weight():
    options = {"debias": True, "momentum": 0.75}
    layer, oracle = BatchNormalization(**options), Reference(**options).build(X.shape)
    mask = np.ones(X.shape, bool)
    mask[:, 1] = False
    for x, given in zip(batches(3), (mask, None, mask), strict=True):
        check_step(layer, oracle, x, DY, given)
    np.testing.assert_allclose(layer.seen_mean, [1 - 0.75**3, 0.25, 1 - 0.75**3], rtol=1e-6)


@pytest.mark.parametrize("start", [0.0, 1e30, np.nan])
def test_the_first_batch_counts_fully(start):
    """To the bit, whatever the averages begin with."""
    first = BatchNormalization(momentum=0.0)
    layer = BatchNormalization(debias=True, moving_mean_initializer=lambda shape, dtype: np.full(shape, start, dtype))
    for one in (first, layer):
        one(X, training=True)
    for name in AVERAGES:
        np.testing.assert_array_equal(getattr(layer, name), getattr(first, name))


def test_the_momentum_of_debiased_averages_may_change():
    """Each batch has the weight that all momenta since then have left it; 1 adds nothing, also to nothing."""
    momenta, xs, weights = [1.0, 0.9, 0.5, 1.0, 0.99], batches(5), np.zeros(5)
    schedule = iter(momenta)
    layer = BatchNormalization(debias=True, momentum=lambda: next(schedule))
    for t, (x, momentum) in enumerate(zip(xs, momenta, strict=True)):
        layer(x, training=True)
        weights *= momentum
        weights[t] = 1 - momentum
        if not weights.any():
            np.testing.assert_array_equal([layer.moving_mean, layer.moving_variance], [[0] * 3, [1] * 3])
            continue
        for name, of in (("moving_mean", np.mean), ("moving_variance", np.var)):
            expected = np.average([of(x.astype(np.float64), axis=0) for x in xs], 0, weights)
            np.testing.assert_allclose(getattr(layer, name), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.seen_variance, np.full(3, weights.sum()), rtol=1e-6)


def test_no_output_of_training_depends_on_debias():
    """Not with renorm either, whose own averages are what they are without it."""
    one, other = (BatchNormalization(renorm=True, debias=debias) for debias in (False, True))
    for x in batches(3):
        np.testing.assert_array_equal(one(x, training=True), other(x, training=True))
    for name in ("renorm_mean", "renorm_stddev"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (one.moving_mean != other.moving_mean).all()


def test_averages_with_equal_weights_are_debiased_anyway():
    one, other = (BatchNormalization(momentum=None, debias=debias) for debias in (False, True))
    for x in batches(3):
        one(x, training=True), other(x, training=True)
    assert_same_weights(one, other)
    np.testing.assert_array_equal(other.seen_mean, [3, 3, 3])


def test_averages_of_another_library_count_as_complete():
    plain = trained()
    layer = nbbn.exchange.from_torch(nbbn.exchange.to_torch(plain), ndim=2, momentum=0.5, debias=True)
    np.testing.assert_array_equal([layer.seen_mean, layer.seen_variance], np.ones((2, 3)))
    assert nbbn.exchange.to_torch(layer)["num_batches_tracked"] == 0
    for one in (layer, plain):
        one(X, training=True)
    np.testing.assert_allclose(layer.moving_mean, plain.moving_mean, rtol=1e-6)


# -- skip_nonfinite --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_batch_that_is_not_finite_is_skipped_in_its_channel(value):
    """The averages are those of the other batches; outputs and gradients are those of a layer without the option."""
    layer, plain = BatchNormalization(momentum=0.75, skip_nonfinite=True), BatchNormalization(momentum=0.75)
    averages = np.array([np.zeros(3), np.ones(3)])
    for step, x in enumerate(batches(4)):
        if step in (0, 2):
            x[5, 1] = value
        counts, exact = np.isfinite(x).all(0), np.where(np.isfinite(x), x, 0).astype(np.float64)
        averages = np.where(counts, 0.75 * averages + 0.25 * np.array([exact.mean(0), exact.var(0)]), averages)
        (y, pullback), (y_plain, pullback_plain) = (one.vjp(x, training=True) for one in (layer, plain))
        np.testing.assert_array_equal(y, y_plain)
        assert_same(gradients_of(pullback), gradients_of(pullback_plain))
        np.testing.assert_allclose([layer.moving_mean, layer.moving_variance], averages, rtol=1e-5)
    assert np.isnan(plain.moving_mean[1])


def test_one_bad_group_is_enough():
    layer = BatchNormalization(virtual_batch_size=4, skip_nonfinite=True, debias=True)
    layer(X, training=True)
    before, x = layer.get_state(), 2 * X
    x[3, 1] = np.nan  # in the second of two groups
    y = layer(x, training=True)
    assert np.isfinite(y[::2]).all()
    for name, value in layer.get_state().items():
        changed = (value != before[name]).ravel()
        assert changed.tolist() == ([False] * 3 if name in ("gamma", "beta") else [True, False, True]), name


def test_recorded_updates_skip_too():
    layer = v1.keras.layers.BatchNormalization(skip_nonfinite=True)
    x = X.copy()
    x[0, 2] = np.nan
    layer(x, training=True)
    for update in layer.updates:
        update.run()
    assert (layer.moving_mean != 0).tolist() == [True, True, False]
    assert (layer.moving_variance != 1).tolist() == [True, True, False]


# -- reset_statistics() ----------------------------------------------------------------------------------------------


def step(layer, x):
    y = layer(x, training=True)
    for update in layer.updates:
        update.run()
    return y


@pytest.mark.parametrize("kind", [BatchNormalization, v1.keras.layers.BatchNormalization], ids=["v2", "v1"])
@pytest.mark.parametrize(
    "options", [{}, {"renorm": True}, {"momentum": None}, {"debias": True}, {"virtual_batch_size": 4}], ids=str
)
def test_reset_statistics_leaves_a_new_layer_with_old_parameters(kind, options):
    layer, new = kind(**options), kind(**options)
    new.build(X.shape)
    for x in batches(3):
        step(layer, x)
    for one in (layer, new):
        one.gamma, one.beta = (np.full(w.shape, 2) for w in (one.gamma, one.beta))
    layer.reset_statistics()
    assert_same_weights(layer, new)
    for x in batches(3):  # also by a bound step
        np.testing.assert_array_equal(step(layer, x), step(new, x))
        assert_same_weights(layer, new)


def test_reset_statistics_asks_the_initializers_again():
    means = [1.0, 2.0]
    layer = BatchNormalization(moving_mean_initializer=lambda shape, dtype: np.full(shape, means.pop(0), dtype))
    layer(X, training=True)
    layer.reset_statistics()
    np.testing.assert_array_equal(layer.moving_mean, [2, 2, 2])
    layer(X, training=True)
    before = layer.get_weights()
    with pytest.raises(IndexError):
        layer.reset_statistics()
    assert_same(layer.get_weights(), before)


def test_reset_statistics_needs_a_built_layer():
    with pytest.raises(ValueError, match=r"reset_statistics\(\) needs a built layer"):
        BatchNormalization().reset_statistics()


def test_reset_statistics_happens_at_once():
    """Another thread reads a mean and a variance of one moment: of the beginning, or of a training call."""
    layer = BatchNormalization(momentum=0.0)
    layer(X, training=True)

    def statistics():
        state = layer.get_state()
        return state["moving_mean"].tolist(), state["moving_variance"].tolist()

    possible = ([0] * 3, [1] * 3), statistics()

    def change():
        for _ in range(200):
            layer.reset_statistics()
            layer(X, training=True)

    def read():
        assert statistics() in possible

    in_threads_beside(change, read)
