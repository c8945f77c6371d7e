"""momentum and renorm_momentum may be set: from the next call on they count, and not in part of one. They may be
callables, which each training call asks once."""

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


# -- callables -------------------------------------------------------------------------------------------------------


class Schedule:
    """Gives the values one after the other, the last one for ever, and counts how often it was asked."""

    def __init__(self, *values):
        self.values, self.calls = values, 0

    def __call__(self):
        self.calls += 1
        return self.values[min(self.calls, len(self.values)) - 1]


def average(old, new, momentum):
    return momentum * old + (1 - momentum) * new


@pytest.mark.parametrize("kind", [BatchNormalization, v1.keras.layers.BatchNormalization], ids=["v2", "v1"])
def test_a_schedule_is_asked_once_at_each_training_call(kind):
    """Whatever kind of call it is, and when the updates of TensorFlow 1 are run; inference does not ask."""
    momenta, renorm_momenta = (0.5, np.float32(0.75), 0, 1, np.array(0.25)), (0.25, 0.5, 1, 0.0, 0.75)
    momentum, renorm_momentum = Schedule(*momenta), Schedule(*renorm_momenta)
    layer = kind(momentum=momentum, renorm_momentum=renorm_momentum, renorm=True)
    assert layer.momentum is momentum
    mean = renorm_mean = np.zeros(3)

    def in_halves(x):
        step = layer.start(x)
        return step.finish([step.message])

    ways = [
        lambda x: layer(x, training=True),
        lambda x: layer.vjp(x, training=True)[1](x),
        in_halves,
        lambda x: layer(x, training=True, out=np.empty_like(x)),
        lambda x: layer(x, training=True),
    ]
    for i, (way, *now) in enumerate(zip(ways, momenta, renorm_momenta, strict=True)):
        x = X + F32(i)
        way(x), layer(x), layer.vjp(x)[1](x)
        assert (momentum.calls, renorm_momentum.calls) == (i + 1, i + 1)
        for update in layer.updates:
            update.run()
        new = x.mean(0, np.float64)
        mean, renorm_mean = (
            average(*of, float(m)) for of, m in zip(((mean, new), (renorm_mean, new)), now, strict=True)
        )
        np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-6)
        np.testing.assert_allclose(layer.renorm_mean, renorm_mean, rtol=1e-6)
    assert (momentum.calls, renorm_momentum.calls) == (5, 5)


@pytest.mark.parametrize(
    ("value", "error"),
    [(1.5, ValueError), (-0.1, ValueError), (np.nan, ValueError), *((v, TypeError) for v in ("0.9", True, None))],
    ids=str,
)
@pytest.mark.parametrize("name", ["momentum", "renorm_momentum"])
def test_a_schedule_that_gives_what_is_not_possible(name, value, error):
    """It is asked before anything changes, also the weights that the first call makes."""
    layer = BatchNormalization(**{name: Schedule(value, 0.5, 0.5, value)}, renorm=True)
    message = f"{name} must be a callable that gives a number from 0 to 1 .*; received {value!r}"
    with pytest.raises(error, match=message):
        layer(X, training=True)
    assert not layer.built
    for _ in range(2):
        layer(X, training=True)
    before = layer.get_weights()
    with pytest.raises(error, match=message):
        layer.vjp(X, training=True)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_schedule_that_raises():
    layer = BatchNormalization(momentum=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer(X, training=True)
    assert not layer.built


def test_a_schedule_may_be_set_and_replaced():
    layer, right = BatchNormalization(momentum=0.5), BatchNormalization(momentum=0.5)
    for momentum in (0.5, Schedule(0.25), Schedule(0.75), 0.125):
        layer.momentum = momentum
        right.momentum = momentum() if callable(momentum) else momentum
        for _ in range(3):
            layer(X, training=True), right(X, training=True)
            np.testing.assert_array_equal(layer.moving_mean, right.moving_mean)
    with pytest.raises(ValueError, match="momentum must stay a number once the layer is built"):
        layer.momentum = None


def test_a_schedule_keeps_the_plans():
    layer = BatchNormalization(momentum=Schedule(*np.linspace(0, 1, 5)))
    layer(X, training=True)
    plans = dict(layer._dispatcher.engine(X).plans)
    for _ in range(4):
        layer(X, training=True)
    assert layer._dispatcher.engine(X).plans == plans


def test_several_calls_that_count_as_one_take_the_numbers_of_the_first():
    schedule = Schedule(0.25, 0.5, 0.75)
    layer, whole = BatchNormalization(momentum=schedule), BatchNormalization(momentum=0.25)
    with nbbn.accumulate(layer):
        for part in np.split(X, 2):
            layer(part, training=True)
    whole(X, training=True)
    assert schedule.calls == 2
    np.testing.assert_allclose(layer.moving_mean, whole.moving_mean, rtol=1e-6)


@pytest.mark.parametrize("name", ["momentum", "renorm_momentum"])
def test_a_config_leaves_a_schedule_out(name, tmp_path):
    layer = BatchNormalization(**{name: lambda: 0.5}, renorm=True)
    layer(X, training=True)
    with pytest.warns(UserWarning, match=f"leaves out the {name}, which cannot be serialized"):
        config = layer.get_config()
    assert name not in config
    assert getattr(BatchNormalization.from_config(config), name) == 0.99
    with pytest.warns(UserWarning, match=name):
        layer.save(tmp_path / "layer.npz")
    loaded = nbbn.load(tmp_path / "layer.npz", **{name: lambda: 0.5})
    for one in (layer, loaded):
        one(X, training=True)
    for one, other in zip(layer.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
