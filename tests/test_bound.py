"""Calls like an earlier one take a bound step, the short way; it must be the same in all but time.

test_bound_arrays.py is about memory and masks, test_bound_calls.py tries every option and operand, test_bound_hooks.py
what a class can override.
"""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest

import nbbn
from nbbn import BatchNormalization, Dispatcher
from nbbn.compat import v1
from nbbn.core import dtypes
from tests.helpers.concurrency import in_threads
from tests.helpers.engines import CountingEngine, forgetful, watch
from tests.helpers.twins import assert_same_bits, check_gradients, twin_of
from tests.oracle.strategies import odd

RNG = np.random.default_rng(5)
X = RNG.standard_normal((12, 6)).astype(np.float32)
X2 = RNG.standard_normal((12, 6)).astype(np.float32)


CASES = {
    "dense": ((12, 6), {}),
    "image": ((4, 5, 5, 3), {}),
    "planes": ((4, 3, 5, 5), {"axis": 1}),
    "several axes": ((4, 3, 5, 2), {"axis": [1, 3]}),
    "ghost": ((12, 6), {"virtual_batch_size": 4}),
    "renorm": ((12, 6), {"renorm": True, "renorm_clipping": {"rmax": 2.0}}),
    "relu": ((12, 6), {"activation": "relu"}),
    "cumulative": ((12, 6), {"momentum": None}),
    "debias": ((12, 6), {"debias": True}),
    "skip": ((12, 6), {"skip_nonfinite": True}),
    "large": ((600, 512), {}),
}


# With a residual where it meets another geometry or what follows the normalization: the middle stage's options do not
# know of it, and every kind of call is three kernels to compile.
SAME_BITS = [
    *((name, "float32", False) for name in CASES),
    *((name, "float32", True) for name in ("dense", "image", "planes", "several axes", "ghost", "relu")),
    ("dense", "float16", False),
    ("relu", "bfloat16", True),
    ("dense", "float64", False),
]


@pytest.mark.parametrize(
    ("name", "dtype", "residual"), SAME_BITS, ids=lambda v: v if isinstance(v, str) else ["", "residual"][v]
)
def test_the_same_bits_and_the_same_state(name, dtype, residual):
    shape, options = CASES[name]
    xs = [RNG.standard_normal(shape).astype(np.float32).astype(dtypes.resolve(dtype)) for _ in range(3)]
    added = {"residual": xs[1][::-1].copy()} if residual else {}
    layer = BatchNormalization(**options)
    general = watch(layer)
    layer(xs[0], training=True, **added), layer(xs[0], **added)
    twin = twin_of(layer)
    twins = watch(twin)
    general.clear()
    found = [layer(x, training=training, **added) for x in xs for training in (True, False)]
    assert general == []
    expected = [twin(x, training=training, **added) for x in xs for training in (True, False)]
    assert twins == ["train", "infer"] * 3
    assert_same_bits(found, expected)
    assert all(y.dtype == xs[0].dtype and y.flags.c_contiguous for y in found)
    assert_same_bits(layer.get_weights(), twin.get_weights())
    check_gradients(layer, twin, xs, added, general, twins)


DY = {  # gradients that the short way leaves to the general one
    "strided": np.asfortranarray,
    "another dtype": lambda dy: dy.astype(np.float64),
    "a list": list,
}


@pytest.mark.parametrize("name", DY)
def test_gradients_that_are_not_like_the_input(name):
    layer = BatchNormalization()
    general = watch(layer)
    _, pullback = layer.vjp(X, training=True)
    expected = pullback(X2)
    general.clear()
    found = pullback(DY[name](X2))
    assert general == ["backward"]
    for y, z in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_allclose(y, z, rtol=1e-6, atol=1e-6)


def test_gradient_in_the_place_of_dy():
    layer = BatchNormalization()
    general = watch(layer)
    _, pullback = layer.vjp(X, training=True)
    expected, dy = pullback(X2), X2.copy()
    general.clear()
    assert pullback(dy, out=dy).inputs is dy
    assert general == ["backward"]
    np.testing.assert_array_equal(dy, expected.inputs)
    with pytest.raises(ValueError, match="out must not share memory with the input"):
        pullback(X2, out=X)


def test_gradients_of_inference_of_a_first_mask_and_of_a_first_residual_are_general():
    layer = BatchNormalization()
    general = watch(layer)
    layer.vjp(X, training=True)[1](X2)
    general.clear()
    layer.vjp(X)[1](X2)
    layer.vjp(X)[1](X2)
    assert general == ["infer", "frozen_backward", "frozen_backward"]
    general.clear()
    for _ in range(3):
        layer.vjp(X, training=True, mask=np.ones(12))[1](X2)
    assert general == ["train", "backward", "backward"]  # the second gradient is the first of a bound step
    general.clear()
    for _ in range(2):
        layer.vjp(X, training=True, residual=X2)[1](X2)
    assert general == ["train", "backward"]  # the second time finds what the first has left


def test_the_gradient_of_a_residual_is_the_callers():
    """It is not dy, nor that of an earlier call."""
    for activation in (None, "relu"):
        layer, dy = BatchNormalization(activation=activation), X2.copy()
        _, pullback = layer.vjp(X, training=True, residual=X2)
        found = [pullback(dy).residual for _ in range(3)]
        assert not any(np.shares_memory(a, b) for a, b in [(dy, r) for r in found] + [(found[1], found[2])])
        found[2][...] = 77
        assert_same_bits(found[:1], found[1:2])
        np.testing.assert_array_equal(dy, X2)


@pytest.mark.parametrize("training", [True, False])
def test_out(training):
    layer, out = BatchNormalization(), np.empty_like(X)
    general = watch(layer)
    expected = layer(X, training=training)
    layer.moving_mean, layer.moving_variance = np.zeros(6), np.ones(6)
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
    "unaligned": lambda layer, x: layer(odd(x, "unaligned")),
    "a list": lambda layer, x: layer(list(x)),
    "a first residual": lambda layer, x: layer(x, residual=x.copy()),
    "mask": lambda layer, x: layer(x, training=True, mask=np.ones(12)),
}
SHORT = {  # what differs from the earlier call in nothing that the step depends on
    "no update": lambda layer, x: layer(x, training=True, update_statistics=False),
    "other values": lambda layer, x: layer(x + 1, training=True),
    "read-only": lambda layer, x: layer(odd(x, "read-only")),
    "another word for True": lambda layer, x: layer(x, training=np.True_),
    "another way to call": lambda layer, x: layer.apply(x, training=True),
    "the forward pass of vjp()": lambda layer, x: layer.vjp(x, training=True)[0],
    "out": lambda layer, x: layer(x, out=np.empty_like(x)),
}


@pytest.mark.parametrize("name", [*OTHERWISE, *SHORT])
def test_what_is_not_like_the_earlier_call(name):
    layer, call = BatchNormalization(), {**OTHERWISE, **SHORT}[name]
    general = watch(layer)
    layer(X, training=True), layer(X)
    twin = twin_of(layer)
    general.clear()
    found = call(layer, X.copy())
    assert len(general) == (name in OTHERWISE)
    np.testing.assert_array_equal(found, call(twin, X.copy()))
    assert_same_bits(layer.get_weights(), twin.get_weights())


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
    layer = BatchNormalization()
    layer(X)
    with pytest.raises((TypeError, ValueError), match=message):
        layer(X, out=out)


def test_bad_training_after_a_good_call():
    layer = BatchNormalization()
    layer(X)
    with pytest.raises(TypeError, match="training must be True, False or None"):
        layer(X, training="yes")


def test_trainable_decides_at_each_call():
    layer = BatchNormalization()
    layer(X, training=True), layer(X)
    frozen = layer(X)
    layer.trainable = False
    before = layer.moving_mean.copy()
    np.testing.assert_array_equal(layer(X, training=True), frozen)
    np.testing.assert_array_equal(layer.moving_mean, before)
    layer.trainable = True
    assert not np.array_equal(layer(X, training=True), frozen)


def test_parameters_and_statistics_are_those_of_the_call():
    layer = BatchNormalization()
    layer(X), layer(X)
    layer.gamma[...] = 3
    layer.moving_mean = np.full(6, 2.0)
    np.testing.assert_array_equal(layer(X), twin_of(layer)(X))
    layer.set_weights([w + 1 for w in layer.get_weights()])
    np.testing.assert_array_equal(layer(X), twin_of(layer)(X))
    layer.moving_variance *= 4
    np.testing.assert_array_equal(layer(X), twin_of(layer)(X))


def test_clip_functions_are_asked_at_each_step():
    values, asked = iter([1.5, 2.5, 3.5, 4.5]), []

    def rmax():
        asked.append(next(values))
        return asked[-1]

    layer = BatchNormalization(renorm=True, renorm_clipping={"rmax": rmax})
    for count in (1, 2, 3):
        layer(X, training=True)
        assert len(asked) == count


def test_an_adjustment_is_asked_at_each_step():
    asked = []

    def adjustment(shape):
        asked.append(shape)
        return np.ones(6), np.zeros(6)

    layer = BatchNormalization(adjustment=adjustment)
    layer(X, training=True), layer(X, training=True)
    assert len(asked) == 2


def test_cumulative_averages():
    layer = BatchNormalization(momentum=None)
    for x in (X, X2, X):
        layer(x, training=True)
    np.testing.assert_allclose(layer.moving_mean, np.mean([X, X2, X], axis=(0, 1)), rtol=1e-5, atol=1e-6)


def test_recorded_updates_of_version_1():
    layer = v1.keras.layers.BatchNormalization()
    general = watch(layer)
    layer(X, training=True), layer(X, training=True)
    assert general == ["train"]
    assert len(layer.updates) == 4
    np.testing.assert_array_equal(layer.moving_mean, 0)


def test_inputs_that_are_cast():
    layer = BatchNormalization(dtype="float32")
    general, wide = watch(layer), X.astype(np.float64)
    for _ in range(3):
        y = layer(wide)
        assert y.dtype == np.float32
        np.testing.assert_array_equal(y, layer(X))
    assert general.count("infer") == 3  # the first float32 input finds what the cast one has left


def test_gradients_of_a_call_do_not_change_with_later_ones():
    layer = BatchNormalization()
    layer(X, training=True)
    y, pullback = layer.vjp(X, training=True)
    expected = pullback(X2)
    kept = y.copy()
    layer(X2, training=True), layer(X2)
    layer.gamma[...] = 9
    assert_same_bits(pullback(X2)[:3], expected[:3])
    np.testing.assert_array_equal(y, kept)


def test_no_update_is_lost():
    """Each begins with the state that another one has left: momentum 0.999 of ones, 800 times. All take the short
    way; one update less would be 4e-4 of the moving mean, and the rounding of them all is 800 half units."""
    layer, ones = BatchNormalization(momentum=0.999), np.ones((12, 6), np.float32)
    general = watch(layer)
    layer(ones, training=True)
    layer.moving_mean = np.zeros(6)
    in_threads([lambda: [layer(ones, training=True) for _ in range(200)]] * 4)
    assert general == ["train"]
    np.testing.assert_allclose(layer.moving_mean, 1 - 0.999**800, rtol=800 * 2**-24)


def test_the_number_of_bound_steps_is_bounded():
    layer = BatchNormalization()
    nbbn.force(layer, max_plans=5)
    for n in range(1, 20):
        layer(np.ones((n, 3), np.float32))
        assert 1 <= len(layer._dispatcher.bound) <= 5


# -- what happens to a layer between two calls -----------------------------------------------------------------------


def with_clips(layer):
    """Another dispatcher, with other options and an own memory."""
    layer._dispatcher = Dispatcher(replace(layer.options, epsilon=0.5, activation="relu"))


def step_in_halves(layer):
    """With statistics that are those of this batch and of another one."""
    step = layer.start(X)
    step.finish([step.message, step.message * 2])


def other_variables(layer):
    """As two layers that share theirs, or one that is built anew."""
    layer._variables = copy.deepcopy(layer._variables)
    layer._variables.params += 1


def failing_call(layer):
    with pytest.raises(ValueError, match="built for"):
        layer(X[:, :5], training=True)


def rebuilt(layer):
    layer._variables = None


BETWEEN = {
    "nothing": lambda layer: None,
    "to the same place": lambda layer: layer.to("cpu"),
    "not trainable": lambda layer: setattr(layer, "trainable", False),
    "weights": lambda layer: layer.set_weights([w * 3 for w in layer.get_weights()]),
    "gamma in place": lambda layer: layer.gamma.fill(7),
    "moving_mean": lambda layer: setattr(layer, "moving_mean", np.arange(6)),
    "constraints": lambda layer: layer.apply_constraints(),
    "another choice": lambda layer: nbbn.force(layer, schedule="rows"),
    "a step in halves": step_in_halves,
    "other variables": other_variables,
    "not built": rebuilt,
    "a call that fails": failing_call,
    "another shape": lambda layer: layer(X[:4], training=True),
}


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("options", [{}, {"activation": "relu", "gamma_constraint": "unit_norm"}], ids=["", "relu"])
def test_what_happens_between_two_calls(name, options):
    layer = BatchNormalization(name="bn", **options)
    twin = forgetful(BatchNormalization(name="bn", **options))
    for one in (layer, twin):
        for _ in range(2):
            one.vjp(X, training=True, residual=X2)[1](X2), one.vjp(X, training=True)[1](X2), one(X)
        BETWEEN[name](one)
    for _ in range(3):
        found, expected = ([one(X), one(X2, training=True), one.vjp(X, training=True)] for one in (layer, twin))
        assert_same_bits([*found[:2], found[2][0]], [*expected[:2], expected[2][0]])
        assert_same_bits(found[2][1](X2)[:3], expected[2][1](X2)[:3])
        assert_same_bits(layer.get_weights(), twin.get_weights())


def test_another_dispatcher_takes_effect():
    layer = BatchNormalization()
    before = [layer(X) for _ in range(2)][1]
    with_clips(layer)
    found = layer(X)
    assert (found >= 0).all()
    assert not np.array_equal(found, np.maximum(before, 0))
    np.testing.assert_array_equal(found, twin_of(layer)(X))


def test_another_engine_takes_effect():
    layer = BatchNormalization()
    layer(X), layer(X)

    class Nothing(CountingEngine):
        def infer(self, batch, *args):
            return np.zeros_like(batch.x)

        def bind(self, *args):
            return None

    layer._dispatcher.use(Nothing(layer.options, layer._dispatcher.force))
    np.testing.assert_array_equal(layer(X), 0)


def test_forced_choices_take_effect():
    layer = BatchNormalization()
    layer(X)
    nbbn.force(layer, parallel=True)
    general = watch(layer)
    layer(X)
    assert general == ["infer"]


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("first", [0, 1], ids=["the original first", "the copy first"])
def test_copies_do_not_take_each_others_steps(name, first):
    layer = BatchNormalization()
    layer(X, training=True), layer(X)
    pair = layer, COPIES[name](layer)
    pair[1]._variables = copy.deepcopy(pair[1]._variables)  # a shallow copy shares them, as it shares the dispatcher
    twins = [twin_of(one) for one in pair]
    for i in (first, 1 - first, first, first, 1 - first):
        pair[i].gamma += i + 1
        twins[i].gamma += i + 1
        assert_same_bits([pair[i](X2, training=True), pair[i](X)], [twins[i](X2, training=True), twins[i](X)])
    for one, two in zip(pair, twins, strict=True):
        assert_same_bits(one.get_weights(), two.get_weights())


def test_a_copy_built_otherwise_is_not_taken_for_the_original():
    """They share a dispatcher, and 5 channels of one are not those of the other."""
    layer = BatchNormalization()
    twin = copy.copy(layer)
    layer(X)
    twin(X[:, :5].copy())
    with pytest.raises(ValueError, match="built for"):
        twin(X)
