"""momentum and renorm_momentum may be set: from the next call on they count, and not in part of one."""

import numpy as np
import pytest

import nbbn
from nbbn import BatchNormalization
from nbbn.compat import v1
from tests.helpers.concurrency import in_threads

F32 = np.float32
SHAPE = (4, 3)
X = np.random.default_rng(0).uniform(0.5, 2, SHAPE).astype(F32)


@pytest.mark.parametrize("kind", [BatchNormalization, v1.keras.layers.BatchNormalization], ids=["v2", "v1"])
@pytest.mark.parametrize(
    ("name", "options"), [("momentum", {}), ("momentum", {"renorm": True}), ("renorm_momentum", {"renorm": True})]
)
@pytest.mark.parametrize("before", [0, 1, 3], ids=lambda n: f"after {n} calls")
def test_a_momentum_that_is_set_counts_from_the_next_call_on(kind, name, options, before):
    """Also where earlier calls have left a bound step behind, which knows the numbers of before."""
    layer, right = kind(**options), kind(**{name: 0.25}, **options)

    def step(one):
        y = one(X, training=True)
        for update in one.updates:
            update.run()
        return y

    for _ in range(before):
        step(layer)
    layer.build(SHAPE)
    right.build(SHAPE)
    setattr(layer, name, np.float32(0.25))
    assert (getattr(layer, name), layer.get_config().get(name)) == (0.25, 0.25)
    right.set_weights(layer.get_weights())
    for _ in range(3):
        np.testing.assert_array_equal(step(layer), step(right))
        for one, other in zip(layer.get_weights(), right.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(layer(X), right(X))


def test_a_schedule_of_momenta_keeps_the_plans():
    layer = BatchNormalization()
    layer(X, training=True)
    engine = layer._dispatcher.engine(X)
    plans = dict(engine.plans)
    for step in range(3):
        layer.momentum = 1 - 1 / (step + 2)
        layer(X, training=True)
    assert layer._dispatcher.engine(X) is engine
    assert engine.plans == plans
    assert nbbn.explain(layer, X, training=True) is not None


def test_the_momentum_that_a_layer_has_costs_nothing_when_it_is_set():
    layer = BatchNormalization(momentum=0.5)
    for _ in range(2):
        layer(X, training=True)
    bound = layer._dispatcher.bound
    assert bound
    layer.momentum = 0.5
    assert layer._dispatcher.bound is bound


def test_a_momentum_that_is_set_while_others_train():
    """Each step counts whole or not at all."""
    layer, ones = BatchNormalization(momentum=1.0, moving_variance_initializer="zeros"), np.ones((12, 6), F32)
    layer(ones)

    def change():
        for step in range(200):
            layer.momentum = float(step % 2)

    def train():
        for _ in range(200):
            layer(ones, training=True)
            assert set(layer.moving_mean.tolist()) in ({0.0}, {1.0})

    in_threads([change, train, train])


@pytest.mark.parametrize(
    ("value", "error"), [(1.5, ValueError), (-0.1, ValueError), ("0.9", TypeError), (True, TypeError)]
)
@pytest.mark.parametrize("name", ["momentum", "renorm_momentum"])
def test_a_momentum_that_is_not_possible(name, value, error):
    layer = BatchNormalization(**{name: 0.5})
    with pytest.raises(error, match=f"{name} must be .*received {value!r}"):
        setattr(layer, name, value)
    assert getattr(layer, name) == 0.5


@pytest.mark.parametrize(("old", "new"), [(None, 0.5), (0.5, None)])
def test_counting_averages_begin_before_the_layer_is_built(old, new):
    """They count in the state, which has no room for it otherwise."""
    layer, right = BatchNormalization(momentum=old), BatchNormalization(momentum=new)
    layer.momentum = new
    for i in range(3):
        layer(X + i, training=True), right(X + i, training=True)
    np.testing.assert_array_equal(layer.moving_mean, right.moving_mean)
    with pytest.raises(ValueError, match=f"momentum must stay .*; received {old}"):
        layer.momentum = old
    assert layer.momentum == new
