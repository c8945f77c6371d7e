"""Calls like an earlier one take a shorter way; it must be the same in all but time."""

import copy
import pickle
import sys
import threading

import numpy as np
import pytest

import nbbn
from nbbn.dispatcher import Dispatcher
from nbbn.repeats import Repeat

RNG = np.random.default_rng(5)
X = RNG.standard_normal((12, 6)).astype(np.float32)
X2 = RNG.standard_normal((12, 6)).astype(np.float32)


@pytest.fixture
def general(monkeypatch):
    """How often a step was found and run in the general way."""
    calls = []
    run = Dispatcher._run

    def count(self, step, *args):
        calls.append(step)
        return run(self, step, *args)

    monkeypatch.setattr(Dispatcher, "_run", count)
    return calls


def without_repeats(layer):
    """A copy that never takes the short way."""
    twin = pickle.loads(pickle.dumps(layer))
    twin._dispatcher.known = lambda *args: None
    return twin


CASES = {
    "dense": ((12, 6), {}),
    "image": ((4, 5, 5, 3), {}),
    "planes": ((4, 3, 5, 5), {"axis": 1}),
    "several axes": ((4, 3, 5, 2), {"axis": [1, 3]}),
    "ghost": ((12, 6), {"virtual_batch_size": 4}),
    "renorm": ((12, 6), {"renorm": True, "renorm_clipping": {"rmax": 2.0}}),
    "relu": ((12, 6), {"activation": "relu"}),
    "large": ((600, 512), {}),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("dense", d) for d in ("float16", "bfloat16", "float64")] + [(name, "float32") for name in CASES],
)
def test_the_same_bits_and_the_same_state(general, name, dtype):
    shape, options = CASES[name]
    xs = [RNG.standard_normal(shape).astype(np.float32).astype(nbbn.dtypes.resolve(dtype)) for _ in range(3)]
    layer = nbbn.BatchNormalization(**options)
    layer(xs[0], training=True), layer(xs[0])
    twin = without_repeats(layer)
    general.clear()
    found = [layer(x, training=training) for x in xs for training in (True, False)]
    assert general == []
    expected = [twin(x, training=training) for x in xs for training in (True, False)]
    assert general == ["train", "infer"] * 3
    for y, z in zip(found, expected, strict=True):
        assert y.dtype == xs[0].dtype
        assert y.flags.c_contiguous
        np.testing.assert_array_equal(y.view(np.uint8), z.view(np.uint8))
    for y, z in zip(layer.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(y, z)
    check_gradients(general, layer, twin, xs)


def check_gradients(general, layer, twin, xs):
    def pull(nbbn_layer, x, dy, **more):
        return nbbn_layer.vjp(x, training=True)[1](dy, **more)

    pull(layer, xs[0], xs[1])
    out = np.empty_like(xs[0])
    general.clear()
    for more in ({}, {"out": out}):
        twin.set_weights(layer.get_weights())
        found, expected = pull(layer, xs[1], xs[2], **more), pull(twin, xs[1], xs[2])
        for y, z in zip(found[:3], expected[:3], strict=True):
            assert y.dtype == z.dtype
            np.testing.assert_array_equal(y.view(np.uint8), z.view(np.uint8))
    assert found.inputs is out
    assert general == ["train", "train", "backward"] * 2


DY = {  # gradients that the short way leaves to the general one
    "strided": np.asfortranarray,
    "another dtype": lambda dy: dy.astype(np.float64),
    "a list": list,
}


@pytest.mark.parametrize("name", DY)
def test_gradients_that_are_not_like_the_input(general, name):
    layer = nbbn.BatchNormalization()
    _, pullback = layer.vjp(X, training=True)
    expected = pullback(X2)
    general.clear()
    found = pullback(DY[name](X2))
    assert general == ["backward"]
    for y, z in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_allclose(y, z, rtol=1e-6, atol=1e-6)


def test_gradient_in_the_place_of_dy(general):
    layer = nbbn.BatchNormalization()
    _, pullback = layer.vjp(X, training=True)
    expected, dy = pullback(X2), X2.copy()
    general.clear()
    assert pullback(dy, out=dy).inputs is dy
    assert general == ["backward"]
    np.testing.assert_array_equal(dy, expected.inputs)
    with pytest.raises(ValueError, match="out must not share memory with the input"):
        pullback(X2, out=X)


def test_gradients_of_inference_and_of_a_residual_are_general(general):
    layer = nbbn.BatchNormalization()
    layer.vjp(X, training=True)[1](X2)
    general.clear()
    layer.vjp(X)[1](X2)
    layer.vjp(X, training=True, residual=X2)[1](X2)
    layer.vjp(X, training=True, mask=np.ones(12))[1](X2)
    assert general == ["infer", "frozen_backward", "train", "backward", "train", "backward"]


@pytest.mark.parametrize("training", [True, False])
def test_out(general, training):
    layer = nbbn.BatchNormalization()
    expected = layer(X, training=training)
    layer.moving_mean, layer.moving_variance = np.zeros(6), np.ones(6)
    out = np.empty_like(X)
    general.clear()
    assert layer(X, training=training, out=out) is out
    assert general == []
    np.testing.assert_array_equal(out, expected)


def overlapping(layer, x):
    memory = np.concatenate([x.ravel(), np.zeros(6, np.float32)])
    return layer(memory[:72].reshape(12, 6), out=memory[6:].reshape(12, 6))


OTHERWISE = {  # what the short way leaves to the general one
    "in place": lambda layer, x: layer(x, out=x),
    "overlapping": lambda layer, x: overlapping(layer, x),
    "strided out": lambda layer, x: layer(x, out=np.empty((12, 12), np.float32)[:, ::2]),
    "another shape": lambda layer, x: layer(x[:5]),
    "another dtype": lambda layer, x: layer(x.astype(np.float16)),
    "strided": lambda layer, x: layer(np.asfortranarray(x)),
    "unaligned": lambda layer, x: layer(
        np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)
    ),
    "a list": lambda layer, x: layer(list(x)),
    "residual": lambda layer, x: layer(x, residual=x.copy()),
    "mask": lambda layer, x: layer(x, training=True, mask=np.ones(12)),
    "no update": lambda layer, x: layer(x, training=True, update_statistics=False),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_not_like_the_earlier_call(general, name):
    layer = nbbn.BatchNormalization()
    layer(X, training=True), layer(X)
    twin = without_repeats(layer)
    general.clear()
    found = OTHERWISE[name](layer, X.copy())
    assert len(general) == 1
    np.testing.assert_array_equal(found, OTHERWISE[name](twin, X.copy()))
    np.testing.assert_array_equal(layer.moving_mean, twin.moving_mean)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.empty((5, 6), np.float32), "shape"),
        (np.empty((12, 6)), "float64"),
        (np.broadcast_to(np.float32(0), (12, 6)), "read-only"),
        ([0.0], "NumPy array"),
    ],
)
def test_errors_are_those_of_the_general_way(out, message):
    layer = nbbn.BatchNormalization()
    layer(X)
    with pytest.raises((TypeError, ValueError), match=message):
        layer(X, out=out)


def test_bad_training_after_a_good_call():
    layer = nbbn.BatchNormalization()
    layer(X)
    with pytest.raises(TypeError, match="training must be True, False or None"):
        layer(X, training="yes")


def test_trainable_decides_at_each_call(general):
    layer = nbbn.BatchNormalization()
    layer(X, training=True), layer(X)
    frozen = layer(X)
    layer.trainable = False
    before = layer.moving_mean.copy()
    np.testing.assert_array_equal(layer(X, training=True), frozen)
    np.testing.assert_array_equal(layer.moving_mean, before)
    layer.trainable = True
    assert not np.array_equal(layer(X, training=True), frozen)


def test_parameters_and_statistics_are_those_of_the_call():
    layer = nbbn.BatchNormalization()
    layer(X), layer(X)
    layer.gamma[...] = 3
    layer.moving_mean = np.full(6, 2.0)
    np.testing.assert_array_equal(layer(X), without_repeats(layer)(X))
    layer.set_weights([w + 1 for w in layer.get_weights()])
    np.testing.assert_array_equal(layer(X), without_repeats(layer)(X))


def test_a_copy_built_otherwise_is_not_taken_for_the_original():
    """They share a dispatcher, and 5 channels of one are not those of the other."""
    layer = nbbn.BatchNormalization()
    twin = copy.copy(layer)
    layer(X)
    twin(X[:, :5].copy())
    with pytest.raises(ValueError, match="built for"):
        twin(X)


def test_forced_choices_take_effect(general):
    layer = nbbn.BatchNormalization()
    layer(X)
    nbbn.force(layer, parallel=True)
    general.clear()
    layer(X)
    assert general == ["infer"]


def test_clip_functions_are_asked_at_each_step():
    values = iter([1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5])
    asked = []

    def rmax():
        asked.append(next(values))
        return asked[-1]

    layer = nbbn.BatchNormalization(renorm=True, renorm_clipping={"rmax": rmax})
    layer(X, training=True)
    count = len(asked)
    layer(X, training=True)
    assert len(asked) > count


def test_an_adjustment_is_asked_at_each_step():
    asked = []

    def adjustment(shape):
        asked.append(shape)
        return np.ones(6), np.zeros(6)

    layer = nbbn.BatchNormalization(adjustment=adjustment)
    layer(X, training=True), layer(X, training=True)
    assert len(asked) == 2


def test_cumulative_averages():
    layer = nbbn.BatchNormalization(momentum=None)
    for x in (X, X2, X):
        layer(x, training=True)
    np.testing.assert_allclose(layer.moving_mean, np.mean([X, X2, X], axis=(0, 1)), rtol=1e-5, atol=1e-6)


def test_recorded_updates_of_version_1():
    layer = nbbn.compat.v1.keras.layers.BatchNormalization()
    layer(X, training=True), layer(X, training=True)
    assert len(layer.updates) == 4
    np.testing.assert_array_equal(layer.moving_mean, 0)


def test_inputs_that_are_cast(general):
    layer = nbbn.BatchNormalization(dtype="float32")
    wide = X.astype(np.float64)
    for _ in range(3):
        y = layer(wide)
        assert y.dtype == np.float32
        np.testing.assert_array_equal(y, layer(X))
    assert general.count("infer") == 3  # the first float32 input finds what the cast one has left


def test_gradients_of_a_call_do_not_change_with_later_ones():
    layer = nbbn.BatchNormalization()
    layer(X, training=True)
    y, pullback = layer.vjp(X, training=True)
    expected = pullback(X2)
    kept = y.copy()
    layer(X2, training=True), layer(X2)
    np.testing.assert_array_equal(pullback(X2).inputs, expected.inputs)
    np.testing.assert_array_equal(y, kept)


def test_no_update_is_lost(monkeypatch):
    layer = nbbn.BatchNormalization(momentum=0.5)
    layer(X, training=True)
    steps = []
    new = Repeat.train

    def train(self, x, out, params, state):
        steps.append(state)
        return new(self, x, out, params, state)

    monkeypatch.setattr(Repeat, "train", train)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=lambda: [layer(X, training=True) for _ in range(200)]) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert len({id(s) for s in steps}) == len(steps) == 800  # each began with the state that another one had left


def test_the_number_of_remembered_calls_is_bounded(monkeypatch):
    monkeypatch.setattr("nbbn.dispatcher._MAX_PLANS", 5)
    layer = nbbn.BatchNormalization()
    for n in range(1, 20):
        layer(np.ones((n, 3), np.float32))
        assert len(layer._dispatcher.repeats) <= 5
