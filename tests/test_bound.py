"""Calls like an earlier one take a bound step, the short way; it must be the same in all but time.

test_bound_calls.py tries every option and operand, test_bound_hooks.py what a class can override.
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
from nbbn.runtime import PLAIN
from tests.helpers.concurrency import in_threads
from tests.helpers.engines import CountingEngine, forgetful, watch
from tests.oracle.strategies import arrange, odd

RNG = np.random.default_rng(5)
X = RNG.standard_normal((12, 6)).astype(np.float32)
X2 = RNG.standard_normal((12, 6)).astype(np.float32)


def twin_of(layer):
    """A copy that never takes the short way."""
    return forgetful(pickle.loads(pickle.dumps(layer)))


def assert_same_bits(one, two):
    for y, z in zip(one, two, strict=True):
        assert (y.dtype, y.shape) == (z.dtype, z.shape)
        assert y.tobytes() == z.tobytes()


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


def check_gradients(layer, twin, xs, added, general, twins):
    def pull(one, x, dy, **more):
        y, pullback = one.vjp(x, training=True, **added)
        return y, *(g for g in pullback(dy, **more) if g is not None)

    pull(layer, xs[0], xs[2])
    general.clear(), twins.clear()
    out = np.empty_like(xs[0])
    for more in ({}, {"out": out}):
        twin._variables.state = layer._variables.state.copy()
        found, expected = pull(layer, xs[1], xs[2], **more), pull(twin, xs[1], xs[2])
        assert_same_bits(found, expected)
    assert found[1] is out
    assert (general, twins) == ([], ["train", "backward"] * 2)
    assert_same_bits(layer.get_weights(), twin.get_weights())


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


MASKS = {
    "bools": lambda n: np.arange(n) % 3 > 0,
    "whole numbers": lambda n: np.arange(n) % 3,
    "weights": lambda n: np.linspace(0, 1, n),
    "columns": lambda n: np.ones((n, 6)) / 4,
    "elements": lambda n: np.arange(n * 6).reshape(n, 6) % 5 > 1,
    "in a column": lambda n: np.arange(n)[:, None] > 4,
    "of channels": lambda n: np.arange(6)[None] > 1,
}


def of_weights(mask, columns, residual=X2 * 0):
    """What a masked call gives for some columns of X."""
    x, weights = X[:, columns], np.float64(np.broadcast_to(mask.reshape(len(mask), -1), X.shape)[:, columns])
    mean = np.average(x, 0, weights)
    stddev = np.sqrt(np.average((x - mean) ** 2, 0, weights) + 1e-3)
    return np.maximum((x - mean) / stddev + residual[:, columns], 0)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("residual", [False, True])
def test_masks_of_the_shape_of_an_earlier_one(kind, residual):
    """Their values are those of each call."""
    layer, mask = BatchNormalization(activation="relu"), MASKS[kind](12)
    general, operands = watch(layer), {"residual": X2} if residual else {}
    for _ in range(2):
        layer.vjp(X, training=True, mask=mask, **operands)[1](X2)
    twin = forgetful(twin_of(layer))
    for changed in (mask, mask[::-1], mask.astype(np.float16), np.asfortranarray(mask)):
        general.clear()
        found, expected = (one.vjp(X, training=True, mask=changed, **operands) for one in (layer, twin))
        np.testing.assert_array_equal(found[0], expected[0])
        columns = np.broadcast_to(changed.reshape(len(changed), -1), X.shape).any(0)  # the others' statistics are empty
        exact = of_weights(changed, columns, **operands)
        np.testing.assert_allclose(found[0][:, columns], exact, rtol=1e-5, atol=1e-5)
        for a, b in zip(found[1](X2), expected[1](X2), strict=True):
            np.testing.assert_array_equal(a, b)
        assert general == []
        assert_same_bits(layer.get_weights(), twin.get_weights())
    layer(X, training=True, mask=np.ones((1, 1), bool))
    assert general == ["train"], "a mask of another shape"


@pytest.mark.parametrize(("axis", "shape"), [(-1, (8, 6)), (1, (8, 1, 4))], ids=["steps", "broadcast"])
def test_a_mask_in_another_order_than_an_earlier_one(axis, shape):
    x, mask = RNG.standard_normal((8, 6, 4)).astype(np.float32), RNG.random(shape) < 0.5
    layer = BatchNormalization(axis=axis)
    general = watch(layer)
    earlier = layer(x, training=True, mask=mask)
    np.testing.assert_array_equal(layer(x, training=True, mask=np.asfortranarray(mask)), earlier)
    assert general == ["train"]


@pytest.mark.parametrize("wrong", [np.full(12, -1.0), np.full(12, np.nan), np.full(12, 1j)], ids=["-1", "nan", "1j"])
def test_a_wrong_mask_of_the_shape_of_an_earlier_one(wrong):
    layer = BatchNormalization()
    layer(X, training=True, mask=np.ones(12))
    before = layer.get_weights()
    with pytest.raises((TypeError, ValueError), match="mask"):
        layer(X, training=True, mask=wrong)
    assert_same_bits(layer.get_weights(), before)


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


def lie(values, form):
    return np.repeat(values, 2, -1)[..., ::2] if form == "columns of a wider array" else arrange(values, form)


@pytest.mark.skipif(PLAIN, reason="plain Python needs arrays, which the general way makes")
@pytest.mark.parametrize("form", ["Fortran", "channels last in memory", "reversed", "columns of a wider array"])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [({"axis": 1}, "float32"), ({"axis": 2}, "bfloat16"), ({"axis": -1, "activation": "relu"}, "float32")],
    ids=str,
)
@pytest.mark.parametrize("size", [5, 70])
def test_inputs_that_are_not_c_contiguous(form, options, dtype, size):
    """They take the short way beside arrays that lie as results do, with the bits of the general one."""
    shape, kind = (4, 6, size, 90), dtypes.resolve(dtype)
    xs = [lie(RNG.standard_normal(shape).astype(np.float32).astype(kind), form) for _ in range(2)]
    beside, out = xs[1][::-1].copy(order="K"), np.empty_like(xs[0])
    layer = BatchNormalization(**options)
    general = watch(layer)
    layer(xs[0], training=True), layer(xs[0])
    twin, infer = twin_of(layer), {"training": False}
    twins = watch(twin)
    general.clear()
    calls = [{"training": True}, infer, *[{"residual": beside, **infer}] * 2, {"out": out, **infer}]
    found, expected = ([one(xs[1], **call) for call in calls] for one in (layer, twin))
    assert (general, twins) == (["infer"], ["train", *["infer"] * 4])
    assert found[4] is out
    assert_same_bits(found, expected)
    assert {y.strides for y in found} == {out.strides}
    check_gradients(layer, twin, [*xs, beside], {}, general, twins)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        layer(xs[1], out=out)


@pytest.mark.skipif(PLAIN, reason="plain Python needs arrays, which the general way makes")
@pytest.mark.parametrize("axis", [1, [1, 3]], ids=str)
def test_where_there_is_no_step_it_is_looked_for_once(axis, monkeypatch):
    """Neither for rows of every kind that alternate, nor for arrays that lie in another way than results."""
    x, found = np.ones((2, 3, 4, 5, 6), np.float32), []
    layer = BatchNormalization(axis=axis)
    new_bound = Dispatcher._new_bound
    monkeypatch.setattr(Dispatcher, "_new_bound", lambda *given: found.append(new_bound(*given)) or found[-1])
    layer.vjp(x, training=True, out=np.ones_like(x, order="F"))[1](np.asfortranarray(x))
    assert found == []
    for _ in range(3):
        layer.vjp(x, training=True)[1](x)
    assert len(found) == 2
    assert all(step is None for step in found) == (axis == [1, 3])


def test_binding_needs_no_memory():
    """The state has moved by then: a call that fails there could not be made again."""
    x = np.broadcast_to(np.float32(0), (1 << 24, 1 << 24))
    assert "float32" in str(nbbn.explain(BatchNormalization(), x))


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_step_on_memory(order):
    """Large arrays by their addresses, as another library tells them."""
    run = nbbn.Dispatcher(nbbn.Options(axis=1, momentum=0.9))
    rng = np.random.default_rng(0)
    x, dy = (np.array(rng.normal(size=(6, 3, 4)), np.float32, order=order) for _ in range(2))
    params, state = np.array([[1, 2, 3], [0, 1, 2]], np.float32), np.array([[0, 0, 0], [1, 1, 1]], np.float32)
    forward, backward = (run.on_memory(name, x, False) for name in ("train", "backward"))
    expected, new_state, expected_saved = run.train(x, params, state)
    if PLAIN:  # its kernels need arrays
        assert forward is None
        return
    y, dx, saved, dparams = np.empty_like(x), np.empty_like(x), np.empty_like(expected_saved), np.empty_like(params)
    address = [a.__array_interface__["data"][0] for a in (x, y, dy, dx)]
    forward(None, address[0], address[1], params, state, state, saved)
    backward(None, None, address[0], address[2], address[3], saved, dparams)
    expected_dx, expected_dparams, _ = run.backward(dy, x, expected_saved, training=True)
    for found, value in ((y, expected), (state, new_state), (dx, expected_dx), (dparams, expected_dparams)):
        np.testing.assert_array_equal(found, value)
