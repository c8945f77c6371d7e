"""The updates that the TensorFlow 1 layers record, their losses, and several threads on one graph."""

import copy
import os
import pickle
from functools import partial

import numpy as np
import pytest

import nbbn
import nbbn.compat.v1 as tf1
from nbbn.compat.v1 import AUTO_REUSE, GraphKeys, get_collection, variable_scope
from tests.helpers.concurrency import in_threads
from tests.helpers.processes import check
from tests.helpers.v1_examples import X2, X, bn, names, scopes, values

# --- updates ------------------------------------------------------------------------------------


def test_two_updates_for_a_training_call_and_none_otherwise():
    bn(X, name="bn")
    bn(X, name="bn", reuse=True, training=False)
    assert names(GraphKeys.UPDATE_OPS) == []
    bn(X, name="bn", reuse=True, training=True)
    assert len(names(GraphKeys.UPDATE_OPS)) == 2
    bn(X, name="bn", reuse=True, training=True)
    assert len(names(GraphKeys.UPDATE_OPS)) == 4


def test_nothing_changes_before_updates_run():
    bn(X, name="bn")
    before = values()
    bn(X, name="bn", reuse=True, training=True)
    for name, value in values().items():
        np.testing.assert_array_equal(value, before[name])


def test_an_update_runs_once_and_leaves_the_collections():
    layer = tf1.layers.BatchNormalization(momentum=0.5)
    layer(X, training=True)
    first, second = layer.updates
    assert get_collection(GraphKeys.UPDATE_OPS) == [first, second]
    first.run()
    once = layer.moving_mean.copy()
    np.testing.assert_allclose(once, 0.5 * X.mean(0, np.float64), rtol=1e-6)
    first.run()
    first()
    np.testing.assert_array_equal(layer.moving_mean, once)
    assert layer.updates == [second]
    assert get_collection(GraphKeys.UPDATE_OPS) == [second]
    second()
    assert layer.updates == []
    assert get_collection(GraphKeys.UPDATE_OPS) == []


def test_each_update_has_its_own_part():
    layer = tf1.layers.BatchNormalization(momentum=0.0)
    layer(X, training=True)
    mean, variance = layer.updates
    variance.run()
    np.testing.assert_array_equal(layer.moving_mean, 0)
    np.testing.assert_allclose(layer.moving_variance, X.var(0, np.float64), rtol=1e-6)
    mean.run()
    np.testing.assert_allclose(layer.moving_mean, X.mean(0, np.float64), rtol=1e-6)


def test_updates_are_listed_by_the_scope_of_their_layer():
    """get_collection(UPDATE_OPS, scope): how training with several towers picks the updates of one."""
    for tower in ("tower_0", "tower_1"):
        with variable_scope(tower):
            bn(X, training=True)
            bn(X, training=True, name="bn")
    assert len(get_collection(GraphKeys.UPDATE_OPS, "tower_0")) == 4
    assert len(get_collection(GraphKeys.UPDATE_OPS, "tower_1/bn")) == 2
    assert get_collection(GraphKeys.UPDATE_OPS, "bn") == []
    assert len(get_collection(GraphKeys.GLOBAL_VARIABLES, "tower_0")) == 8


@pytest.mark.parametrize("face", [tf1.layers.BatchNormalization, tf1.keras.layers.BatchNormalization])
def test_get_updates_for(face):
    layer = face()
    layer(X, training=True)
    layer(X2, training=True)
    layer(X, training=True)
    assert len(layer.updates) == 6
    assert layer.get_updates_for(X) == [*layer.updates[:2], *layer.updates[4:]]
    assert layer.get_updates_for(X2) == layer.updates[2:4]
    assert layer.get_updates_for(X.copy()) == []
    assert layer.get_updates_for(None) == []


def test_get_updates_for_an_input_that_is_gone():
    layer = tf1.keras.layers.BatchNormalization()
    layer(X.copy(), training=True)
    layer(X.tolist() and np.array(X), training=True)
    assert layer.get_updates_for(X) == []
    assert len(layer.updates) == 4


MODES = {
    "plain": {},
    "bessel": {"bessel_correction": True},
    "momentum 0": {"momentum": 0.0},
    "momentum 1": {"momentum": 1.0},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 1.5, "rmin": 0.5, "dmax": 0.5}, "renorm_momentum": 0.7},
    "virtual": {"virtual_batch_size": 4},
    "virtual renorm": {"virtual_batch_size": 4, "renorm": True, "renorm_momentum": 0.0},
    "numpy numbers": {"momentum": np.float32(0.5), "renorm": True, "renorm_momentum": np.array(0.5)},
    "momentum None": {"momentum": None},
    "debias": {"debias": True, "momentum": 0.5},
    "momentum None renorm": {"momentum": None, "renorm": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_updates_do_what_the_v2_layer_does_at_once(mode, masked):
    """The batch's statistics are stored in float32 until the update: one rounding more."""
    options = {"momentum": 0.75, **MODES[mode]}
    v1, v2 = tf1.keras.layers.BatchNormalization(**options), nbbn.BatchNormalization(**options)
    mask = np.array([1, 0, 1, 1, 1, 0, 1, 1], bool) if masked else None
    for x in (X, X2, X):
        y1, y2 = v1(x, training=True, mask=mask), v2(x, training=True, mask=mask)
        np.testing.assert_allclose(y1, y2, rtol=1e-5, atol=1e-6)
        for update in v1.updates:
            update.run()
        for one, two in zip(v1.get_weights(), v2.get_weights(), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(v1(X2), v2(X2), rtol=1e-5, atol=1e-6)


ORDERS = {
    "as recorded": (0, 1, 2, 3),
    "means first": (0, 2, 1, 3),
    "variance before mean": (1, 0, 3, 2),
    "last call first": (2, 3, 0, 1),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_cumulative_average_does_not_depend_on_the_order_of_the_updates(order):
    """Two recorded calls, their four updates in any order: the average of both."""
    layer = tf1.keras.layers.BatchNormalization(momentum=None)
    layer(X, training=True)
    layer(X2, training=True)
    updates = layer.updates
    for i in order:
        updates[i].run()
    np.testing.assert_allclose(layer.moving_mean, (X.mean(0) + X2.mean(0)) / 2, rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, (X.var(0) + X2.var(0)) / 2, rtol=1e-5)


def test_updates_use_the_state_when_they_run():
    layer = tf1.keras.layers.BatchNormalization(momentum=0.5)
    layer(X, training=True)
    layer(X2, training=True)
    for update in layer.updates:
        update.run()
    expected = 0.5 * (0.5 * X.mean(0, np.float64)) + 0.5 * X2.mean(0, np.float64)
    np.testing.assert_allclose(layer.moving_mean, expected, rtol=1e-6)


def test_a_masked_statistic_keeps_its_state():
    layer = tf1.keras.layers.BatchNormalization(momentum=0.5, renorm=True)
    mask = np.ones((8, 3), bool)
    mask[:, 1] = False
    layer(X)
    before = layer.get_weights()
    layer(X, training=True, mask=mask)
    for update in layer.updates:
        update.run()
    for old, new in zip(before[2:], layer.get_weights()[2:], strict=True):
        np.testing.assert_array_equal(new[1], old[1])
        assert (new != old)[[0, 2]].all()


@pytest.mark.parametrize("face", [tf1.layers.BatchNormalization, tf1.keras.layers.BatchNormalization])
def test_a_layer_that_is_not_trainable_normalizes_with_the_batch_and_records_nothing(face):
    layer = face(trainable=False)
    y = layer(X, training=True)
    np.testing.assert_allclose(y, (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-3), rtol=1e-5, atol=1e-6)
    assert layer.updates == []
    assert get_collection(GraphKeys.UPDATE_OPS) == []
    assert get_collection(GraphKeys.TRAINABLE_VARIABLES) == []
    np.testing.assert_array_equal(layer.moving_mean, 0)


def test_no_updates_where_none_are_wanted():
    layer = tf1.keras.layers.BatchNormalization()
    layer(X, training=True, update_statistics=False)
    layer(np.zeros((0, 3), np.float32), training=True)
    assert layer.updates == []


def test_a_failed_call_records_nothing():
    layer = tf1.layers.BatchNormalization()
    layer(X)
    with pytest.raises(ValueError, match="mask"):
        layer(X, training=True, mask=np.ones(5, bool))
    assert layer.updates == []
    assert get_collection(GraphKeys.UPDATE_OPS) == []


def test_vjp_records_updates_too():
    layer = tf1.keras.layers.BatchNormalization()
    _, pullback = layer.vjp(X, training=True)
    assert len(layer.updates) == 2
    assert pullback(X).inputs.shape == X.shape


@pytest.mark.parametrize("built", [np.float32, np.float64])
@pytest.mark.parametrize("called", [np.float32, np.float64])
def test_the_dtype_of_the_input_decides_about_bessel(built, called):
    """As in version 2, also where the state has another one."""
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 5))
    one, two = tf1.keras.layers.BatchNormalization(momentum=0.0), nbbn.BatchNormalization(momentum=0.0)
    for layer in (one, two):
        layer(x.astype(built))
        layer(x.astype(called), training=True)
    for update in one.updates:
        update.run()
    np.testing.assert_allclose(one.moving_variance, two.moving_variance, rtol=1e-6)


def test_fused_is_a_wish():
    layer = tf1.keras.layers.BatchNormalization(fused=True, momentum=0.0)
    layer(X, training=True)
    for update in layer.updates:
        update.run()
    np.testing.assert_allclose(layer.moving_variance, X.var(0, np.float64), rtol=1e-6)


@pytest.mark.parametrize("face", [tf1.layers.BatchNormalization, tf1.keras.layers.BatchNormalization])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["copy", "pickle"])
def test_a_layer_with_recorded_updates_is_copied(face, duplicate):
    """A checkpoint between the call and its updates; the copy's updates, if it has any, are its own."""
    layer = face(momentum=0.5)
    layer(X, training=True)
    before = layer.get_weights()
    twin = duplicate(layer)
    for update in twin.updates:
        update.run()
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


# --- losses ------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_weights_now():
    layer = tf1.layers.BatchNormalization(gamma_regularizer=nbbn.regularizers.L2(0.5), beta_regularizer="l1")
    layer(X)
    assert get_collection(GraphKeys.REGULARIZATION_LOSSES) == layer.losses == [1.5, 0.0]
    layer.gamma[...] = 2
    assert get_collection(GraphKeys.REGULARIZATION_LOSSES) == layer.get_losses_for(None) == [6.0, 0.0]
    assert layer.get_losses_for(X) == []


def test_reuse_does_not_repeat_losses():
    for _ in range(3):
        bn(X, name="bn", gamma_regularizer="l2", reuse=AUTO_REUSE)
    assert len(get_collection(GraphKeys.REGULARIZATION_LOSSES)) == 1


def test_losses_are_listed_by_scope():
    for scope in "ab":
        with variable_scope(scope):
            bn(X, gamma_regularizer="l2")
    assert len(get_collection(GraphKeys.REGULARIZATION_LOSSES, "a")) == 1


# --- the layer's own face ---------------------------------------------------------------------------------


@pytest.mark.parametrize("face", [tf1.layers.BatchNormalization, tf1.keras.layers.BatchNormalization])
def test_config_round_trip(face):
    layer = face(axis=1, momentum=0.5, renorm=True, fused=True, name="bn")
    assert face.from_config(layer.get_config()).get_config() == layer.get_config()


def test_the_functional_form_takes_every_option():
    y = bn(
        X,
        axis=-1,
        momentum=0.5,
        epsilon=0.1,
        center=True,
        scale=True,
        beta_initializer="ones",
        gamma_initializer="zeros",
        moving_mean_initializer="zeros",
        moving_variance_initializer="ones",
        beta_regularizer="l1",
        gamma_regularizer="l2",
        beta_constraint="non_neg",
        gamma_constraint="unit_norm",
        training=True,
        trainable=True,
        name="bn",
        reuse=None,
        renorm=True,
        renorm_clipping={"rmax": 2.0},
        renorm_momentum=0.5,
        fused=False,
        virtual_batch_size=None,
        adjustment=None,
    )
    np.testing.assert_array_equal(y, 1)


# --- threads ------------------------------------------------------------------------------------------------


def test_open_scopes_belong_to_the_thread():
    def work(i):
        for _ in range(20):
            with variable_scope(f"thread_{i}", reuse=AUTO_REUSE):
                bn(X, name="bn")

    in_threads([partial(work, i) for i in range(8)])
    assert sorted(scopes()) == [f"thread_{i}/bn" for i in range(8)]


def test_threads_that_create_the_same_variables():
    def work(i):
        bn(X, name="bn", reuse=AUTO_REUSE, training=True)

    in_threads([partial(work, i) for i in range(8)])
    assert scopes() == ["bn"]
    assert len(get_collection(GraphKeys.UPDATE_OPS)) == 16


def test_default_names_are_unique_across_threads():
    layers = []

    def work(i):
        for _ in range(25):
            layer = tf1.layers.BatchNormalization()
            layer.build((None, 3))
            layers.append(layer)

    in_threads([partial(work, i) for i in range(8)])
    assert len({layer.name for layer in layers}) == 200
    assert len({layer.scope_name for layer in layers}) == 200


ONES = np.ones((4, 3), np.float32)


def check_count(layer, count):
    """Every batch's mean is 1 and the momentum 0.99: the moving mean says how many updates there were."""
    np.testing.assert_allclose(layer.moving_mean, 1 - 0.99**count, rtol=1e-5)


def test_updates_recorded_in_threads_are_all_kept():
    """While other threads read and run them."""
    layer = tf1.keras.layers.BatchNormalization(momentum=0.99)
    layer(ONES)

    def work(i):
        for _ in range(50):
            if i < 4:
                layer(ONES, training=True)
            for update in layer.updates:
                update.run()

    in_threads([partial(work, i) for i in range(8)])
    for update in layer.updates:
        update.run()
    check_count(layer, 4 * 50)


def test_an_update_that_several_threads_run_is_applied_once():
    layer = tf1.keras.layers.BatchNormalization(momentum=0.99)
    for _ in range(200):
        layer(ONES, training=True)
    updates = layer.updates
    in_threads([lambda: [update.run() for update in updates]] * 4)
    check_count(layer, 200)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_lock_held_at_the_fork_is_open_in_the_child():
    """A child of a server must not wait for a thread that it does not have."""
    assert check(FORK_WITH_LOCK_HELD) == "m/bn\n"


FORK_WITH_LOCK_HELD = """
import os, signal, threading
import numpy as np
import nbbn.compat.v1 as tf1
from nbbn.compat.v1.graph import default_graph
held, finish = threading.Event(), threading.Event()
def hold():
    with default_graph().lock:
        held.set(); finish.wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    layer = tf1.layers.BatchNormalization(name="bn")
    with tf1.variable_scope("m"):
        layer.build((None, 3))
    print(layer.scope_name, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
finish.set()
"""
