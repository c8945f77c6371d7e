"""Calls like an earlier one take a bound step, the short way; it must be the same in all but time.

Also for whoever adds an option or overrides a method without knowing that there is a short way.
"""

import contextlib
import copy
import inspect
import pickle
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nbbn
from nbbn import BatchNormalization, Dispatcher, Options
from nbbn.compat import v1
from nbbn.core import dtypes
from tests.helpers.concurrency import in_threads
from tests.helpers.engines import CountingEngine, ImaginedEngine, forgetful, watch
from tests.oracle.strategies import FORMS, ODD_FORMS, OUTS, Call, Case, calls, cases, layer_options, odd

RNG = np.random.default_rng(5)
X = RNG.standard_normal((12, 6)).astype(np.float32)
X2 = RNG.standard_normal((12, 6)).astype(np.float32)


def twin_of(layer):
    """A copy that never takes the short way."""
    return forgetful(pickle.loads(pickle.dumps(layer)))


def assert_same_bits(one, two):
    for y, z in zip(one, two, strict=True):
        assert (y.dtype, y.shape) == (z.dtype, z.shape)
        np.testing.assert_array_equal(y.view(np.uint8), z.view(np.uint8))


CASES = {
    "dense": ((12, 6), {}),
    "image": ((4, 5, 5, 3), {}),
    "planes": ((4, 3, 5, 5), {"axis": 1}),
    "several axes": ((4, 3, 5, 2), {"axis": [1, 3]}),
    "ghost": ((12, 6), {"virtual_batch_size": 4}),
    "renorm": ((12, 6), {"renorm": True, "renorm_clipping": {"rmax": 2.0}}),
    "relu": ((12, 6), {"activation": "relu"}),
    "cumulative": ((12, 6), {"momentum": None}),
    "large": ((600, 512), {}),
}


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("dense", d) for d in ("float16", "bfloat16", "float64")] + [(name, "float32") for name in CASES],
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

    pull(layer, xs[0], xs[1])
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


def test_gradients_of_inference_of_a_mask_and_of_a_first_residual_are_general():
    layer = BatchNormalization()
    general = watch(layer)
    layer.vjp(X, training=True)[1](X2)
    general.clear()
    layer.vjp(X)[1](X2)
    layer.vjp(X)[1](X2)
    assert general == ["infer", "frozen_backward", "frozen_backward"]
    general.clear()
    for _ in range(2):
        layer.vjp(X, training=True, mask=np.ones(12))[1](X2)
    assert general == ["train", "backward"] * 2
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


def with_exchange(layer):
    """Statistics that are those of this batch and of another one."""

    class Exchange:
        def merge(self, moments):
            return moments * [[2], [1], [3]]

        def add(self, sums):
            return sums * 2

    layer._dispatcher = type(layer._dispatcher)(layer.options, layer._dispatcher.force, Exchange())


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
    "an exchange": with_exchange,
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


# -- for whoever overrides a method ---------------------------------------------------------------------------------


class Asked(BatchNormalization):
    """Notes what it is asked."""

    def __init__(self, *args, **kwargs):
        self.asked = []
        super().__init__(*args, **kwargs)


class Updates(Asked):
    """The statistics are kept as usual; `saved` and `inputs` are what they are in the first call."""

    def _update(self, variables, new_state, saved, inputs):
        self.asked.append((new_state.tobytes(), saved.tobytes(), inputs is self.given))
        super()._update(variables, new_state, saved, inputs)


class KeepsNothing(Updates):
    def _update(self, variables, new_state, saved, inputs):
        self.asked.append(saved.tobytes())


class KeepsHalf(Updates):
    def _update(self, variables, new_state, saved, inputs):
        variables.keep((variables.state + new_state) / 2)


class KeepsInAnotherOrder(Updates):
    """Of memory: the values are those of the new state."""

    def _update(self, variables, new_state, saved, inputs):
        variables.keep(np.asfortranarray(new_state))


class KeepsInAnotherDtype(Updates):
    def _update(self, variables, new_state, saved, inputs):
        variables.keep(new_state.astype(np.float64) + 1e-3)


class KeepsAPart(Updates):
    def _update(self, variables, new_state, saved, inputs):
        variables.keep_part(new_state, "mean")


class KeepsAView(Updates):
    """Of a larger array, with gaps."""

    def _update(self, variables, new_state, saved, inputs):
        variables.keep(np.repeat(new_state, 2, axis=1)[:, ::2])


class FailsToUpdate(Updates):
    def _update(self, variables, new_state, saved, inputs):
        raise ArithmeticError(f"{len(self.asked)}")


class UpdatesEverySecondTime(Updates):
    calls = 0

    def _update(self, variables, new_state, saved, inputs):
        self.calls += 1
        if self.calls % 2:
            super()._update(variables, new_state, saved, inputs)


class UsesBatch(Asked):
    def _uses_batch(self, training):
        self.asked.append(training)
        return super()._uses_batch(training)


class LearnsAtFirst(Asked):
    """Normalizes with the batch in the first training calls only."""

    def _uses_batch(self, training):
        self.asked.append(training)
        return super()._uses_batch(training) and self.asked.count(True) < 4


class LearnsByItself(Asked):
    """A mode, as PyTorch's modules have it: training=None asks for it."""

    mode = False

    def _uses_batch(self, training):
        if training is None:
            self.asked.append(training)
            training = self.mode = not self.mode
        return super()._uses_batch(training)


class RefusesToTrain(Asked):
    def _uses_batch(self, training):
        if training and len(self.asked) > 5:
            raise PermissionError("no more")
        self.asked.append(training)
        return super()._uses_batch(training)


class StartsOtherwise(Asked):
    def _make_variables(self, shapes):
        self.asked.append(shapes)
        variables = super()._make_variables(shapes)
        variables.params[...] = np.arange(12).reshape(2, 6)
        return variables


class WideVariables(Asked):
    """float64 parameters and statistics for float32 inputs."""

    def _make_variables(self, shapes):
        return super()._make_variables(replace(shapes, dtype=np.dtype(np.float64)))


class ParametersInOneArena(Asked):
    """As optimizers like them: the parameters of all layers are views of one array."""

    def _make_variables(self, shapes):
        variables = super()._make_variables(shapes)
        arena = np.ones((2, 30), np.float32)
        variables.params = arena[:, 12:18]
        return variables


class ChecksItsInputs(Asked):
    def __call__(self, inputs, *args, **kwargs):
        self.asked.append(np.shape(inputs))
        if not np.isfinite(inputs).all():
            raise FloatingPointError("not finite")
        return super().__call__(inputs, *args, **kwargs)


class NotFrozen(Asked):
    _FREEZES = False


def derived(kind):
    return [k for k in kind.__subclasses__() for k in (k, *derived(k))]


def outcome_of(layer, x, call):
    """The results' bits, or the error; and the weights."""
    layer.given = x
    try:
        found = [np.asarray(a).tobytes() for a in call(layer, x)]
    except Exception as error:
        found = type(error), str(error)
    return found, [(w.dtype, w.tobytes()) for w in layer.get_weights()]


def gradients_too(layer, x):
    y, pullback = layer.vjp(x, training=True)
    return y, *pullback(X2)[:3]


CALLS = {
    "training": lambda layer, x: [layer(x, training=True)],
    "inference": lambda layer, x: [layer(x)],
    "a residual": lambda layer, x: [layer(x, training=True, residual=X2)],
    "no update": lambda layer, x: [layer(x, training=True, update_statistics=False)],
    "gradients": gradients_too,
    "not finite": lambda layer, x: [layer(x * np.float32(np.inf))],
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf * 0
@pytest.mark.parametrize("kind", derived(Asked), ids=lambda kind: kind.__name__)
def test_overridden_methods_are_asked_in_every_call(kind):
    """Four rounds of calls: the same results, errors, weights, and the same questions to the layer."""
    layer, twin = kind(name="bn"), forgetful(kind(name="bn"))
    for x in (X, X, X2, X):
        for name, call in CALLS.items():
            assert outcome_of(layer, x, call) == outcome_of(twin, x, call), name
            assert layer.asked == twin.asked, name
    layer.trainable = twin.trainable = False
    for _ in range(3):
        assert outcome_of(layer, X, CALLS["training"]) == outcome_of(twin, X, CALLS["training"])


def test_the_choice_of_statistics_is_asked_for_whatever_training_is():
    """None, too, is a value that a class may give a meaning of its own."""
    layer = UsesBatch()
    for training in (None, False, True, np.True_) * 3:
        layer(X, training=training)
    asked = [t for t in layer.asked if type(t) is not np.bool_]  # np.True_ asks again, for True
    assert asked == [None, False, True, True] * 3
    layer, seen = LearnsByItself(), []
    for _ in range(4):
        layer(X)
        seen.append(layer.get_weights()[2])
    assert not np.array_equal(seen[0], [0] * 6)
    np.testing.assert_array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[1], seen[2])


def own_methods():
    """The methods of a layer that a class can override, as far as calls use them."""
    kinds = [k for k in BatchNormalization.__mro__ if k.__module__.startswith("nbbn.")]
    functions = {n: f for k in reversed(kinds) for n, f in vars(k).items() if inspect.isfunction(f)}
    return sorted(n for n in functions if n != "__init__")


def test_every_method_is_asked_in_every_call_as_in_the_first():
    """Whatever a built layer asks itself on the general way it asks itself on the short one: a class that overrides
    one of its methods need not know which calls are like earlier ones."""

    class Counts(BatchNormalization):
        count: Any = None

    def counting(name):
        def method(self, *args, **kwargs):
            if self.count is not None:
                self.count[name] += 1
            return getattr(super(Counts, self), name)(*args, **kwargs)

        return method

    for name in own_methods():
        setattr(Counts, name, counting(name))
    layer, twin, questions = Counts(), forgetful(Counts()), []
    for one in (layer, twin):
        general = watch(one)
        for _ in range(2):
            one(X, training=True), one(X)
        general.clear()
        one.count = Counter()
        one(X, training=True), one(X)
        questions.append(one.count)
        assert general == ([] if one is layer else ["train", "infer"])
    assert {"__call__", "_uses_batch", "_update"} <= set(questions[0])
    assert questions[0] == questions[1]


# -- for whoever adds an option -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoreOptions(Options):
    noise: Any = None


OPTIONS = {
    "a number": (0.5, True),
    "a name": ("a", True),
    "a mapping": ({"a": 0.5}, True),
    "a callable": (lambda: 0.5, False),
    "a mapping with a callable": ({"a": lambda: 0.5}, False),
    "a sequence with a callable": ((0.5, lambda: 0.5), False),
    "a mapping of mappings": ({"a": {"b": lambda: 0.5}}, False),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_may_change_prevents_the_short_way(name):
    """Whatever an option is called, and wherever in it a callable hides."""
    value, constant = OPTIONS[name]
    layer = BatchNormalization()
    layer._dispatcher = Dispatcher(MoreOptions(noise=value))
    general = watch(layer)
    layer(X, training=True), layer(X)
    general.clear()
    layer(X, training=True), layer(X)
    assert general == ([] if constant else ["train", "infer"])


# -- every option and operand -----------------------------------------------------------------------------------------


class KeepsMore(BatchNormalization):
    """Overrides what V1 overrides, in another way."""

    def _update(self, variables, new_state, saved, inputs):
        variables.keep(new_state + saved[1, :1].astype(new_state.dtype))


KINDS = [BatchNormalization, KeepsMore, v1.keras.layers.BatchNormalization]


class Subject:
    """A built layer with kernels that cost nothing, and the state that every call begins with."""

    def __init__(self, kind, case, options, parallel, forgets):
        self.case, self.layer = case, kind(name="bn", **options)
        nbbn.force(self.layer, parallel=parallel)
        if forgets:
            forgetful(self.layer)
        self.steps = watch(self.layer, ImaginedEngine)
        self.dtype = np.dtype(case.dtype) if self.layer.dtype is None else dtypes.resolve(self.layer.dtype)
        self.layer(np.zeros(case.shape, self.dtype))
        variables, rng = self.layer._variables, np.random.default_rng(case.seed)
        self.params = rng.uniform(0.25, 2, variables.params.shape)
        self.state = rng.uniform(0.25, 2, variables.state.shape)

    def prepare(self):
        """The calls that leave a bound step behind, as far as the options allow it."""
        x, dy, z = (np.full(self.case.shape, v, self.dtype) for v in (1, 2, 3))
        for residual in (None, z):
            self.layer(x, residual=residual)
            with contextlib.suppress(ValueError):  # clips that contradict each other
                self.layer.vjp(x, training=True, residual=residual)[1](dy)
        for update in self.layer.updates:  # those that version 1 has recorded
            update.run()

    def __call__(self, call):
        """All that can be seen of a call."""
        variables = self.layer._variables
        variables.params[...], variables.state = self.params, self.state.astype(variables.dtype)
        arrays = self._arrays(call)
        before = len(self.steps)
        try:
            found = self._results(call, arrays)
        except Exception as error:
            found = [type(error), str(error)]
        general = self.steps[before:]
        for update in self.layer.updates:
            found.append(update.name)
            update.run()
        seen = [look(a) for a in (*arrays.values(), variables.params, variables.state)]
        return (found, seen), general

    def _arrays(self, call):
        case = replace(self.case, dtype=self.dtype.type, form="C", dy_form="C")
        x, dy, mask = case.batch(0)
        z = replace(case, residual_form="C").residual(0)
        x, dy, z = map(with_room, (x, dy, z))
        given = {"x": odd(x, call.form), "mask": mask if call.masked else None}
        given["residual"] = given["x"] if call.residual == "the input" else call.residual and odd(z, call.residual)
        given["out"] = out_for(call.out, x, given["x"], given["residual"])
        given["dy"] = given["x"] if call.dy == "the input" else call.dy and odd(dy, call.dy)
        given["gradient_out"] = out_for(call.gradient_out, x, given["dy"], given["x"])
        return given

    def _results(self, call, arrays):
        operands = {n: arrays[n] for n in ("mask", "residual", "out")}
        operands |= {"training": call.training, "update_statistics": call.update}
        if call.gradients is None:
            y = self.layer(arrays["x"], **operands)
            return [look(y), y is arrays["out"]]
        y, pullback = self.layer.vjp(arrays["x"], **operands)
        found = [look(y), y is arrays["out"]]
        for _ in range(call.gradients):
            gradients = pullback(arrays["dy"], out=arrays["gradient_out"])
            found += [gradients.inputs is arrays["gradient_out"]]
            found += [look(a) for g in gradients for a in (g if type(g) is tuple else (g,))]
        return found


def look(value):
    """All of an array but where it is."""
    if isinstance(value, np.ndarray):
        return type(value), value.dtype, value.shape, value.strides, value.flags.writeable, value.tobytes()
    return value


def with_room(values):
    """A C-contiguous copy in memory that has room behind it, for what overlaps it."""
    memory = np.zeros(values.size + values.size // max(1, len(values)) + 1, values.dtype)
    array = memory[: values.size].reshape(values.shape)
    array[...] = values
    return array


def out_for(form, like, first, second):
    """An array for a result. first, second: C-contiguous arrays with room, or whatever else it shares memory with."""
    if form in (None, "in place", "the other"):
        return {None: None, "in place": first, "the other": second}[form]
    other = second if form == "overlapping the other" else first
    if not form.startswith("overlapping"):
        return odd(np.zeros(like.shape, like.dtype), "C" if form == "new" else form)
    if not isinstance(other, np.ndarray) or other.base is None or other.base.ndim != 1 or other.base.size <= other.size:
        return None
    return other.base[other.base.size - other.size :].reshape(other.shape)


PLAIN = Case((4, 3), np.float32, {"axis": -1, "fused": None}, None, ("weights", "plain"), "C", "C", 0)
CALL = Call(True, False, True, "C", None, None, 1, "C", None)
PROFILE = settings(
    deadline=None,
    derandomize=True,
    max_examples=400,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def test_every_option_and_every_operand():
    """The first call, one like it, and one after whatever can prepare the short way: each has the results, the state
    and the errors of a layer that never takes it. With kernels that cost nothing, see ImaginedEngine."""
    short = Counter()

    @settings(PROFILE)
    @given(data=st.data())
    def check(data):
        case, kind = data.draw(cases()), data.draw(st.sampled_from(KINDS))
        options, several = data.draw(layer_options(case)), data.draw(st.lists(calls(), min_size=1, max_size=3))
        check_calls(kind, case, options, data.draw(st.sampled_from([None, None, None, True])), several, short)

    check()
    for residual in (False, True):
        for out in (False, True):
            for step in ("train", "infer", "backward"):
                assert short[step, residual, out] >= 10, f"{step}, residual: {residual}, out: {out}; {short}"


PLAIN_CALLS = {
    "inference": replace(CALL, training=False, gradients=None),
    "training": replace(CALL, gradients=None),
    "gradients": CALL,
    "residual": replace(CALL, residual="C"),
}


def changed(call):
    """The call with one difference, for all differences."""
    for form in FORMS + ODD_FORMS:
        yield replace(call, form=form)
        yield replace(call, residual=form)
        yield replace(call, dy=form)
    for out in OUTS:
        yield replace(call, out=out)
        yield replace(call, gradient_out=out)
    for training in (None, True, False, 1, np.False_, "yes"):
        yield replace(call, training=training)
    yield replace(call, masked=True)
    yield replace(call, update=False)
    yield replace(call, gradients=3)
    yield replace(call, residual="the input")
    yield replace(call, dy="the input")


@pytest.mark.parametrize(
    ("kind", "name", "activation"),
    [
        *((BatchNormalization, n, a) for n in PLAIN_CALLS for a in (None, "relu")),
        *((k, "training", None) for k in KINDS[1:]),
    ],
    ids=lambda v: v.__module__ if isinstance(v, type) else str(v),
)
def test_the_calls_that_are_made_most_and_each_way_to_differ(kind, name, activation):
    """A call, another one that differs from it in one thing, and the same again."""
    short, options = Counter(), {**PLAIN.options, "activation": activation}
    for other in changed(PLAIN_CALLS[name]):
        check_calls(kind, PLAIN, options, None, [PLAIN_CALLS[name], other], short)
    for out in (False, True):
        batch = "infer" if name == "inference" else "train"
        assert short[batch, name == "residual", out]
        assert name in ("inference", "training") or short["backward", name == "residual", out]


def check_calls(kind, case, options, parallel, several, short):
    layer, twin = (Subject(kind, case, options, parallel, forgets) for forgets in (False, True))
    expected = [twin(call)[0] for call in several]
    for prepare in (None, None, layer.prepare, None):
        if prepare is not None:
            prepare()
        for call, right in zip(several, expected, strict=True):
            found, general = layer(call)
            assert found == right
            if 0 not in case.shape and not isinstance(found[0][0], type):
                note(short, call, "train" if layer.layer._uses_batch(call.training) else "infer", general)


def note(short, call, batch, general):
    """Count the steps that took the short way."""
    residual = call.residual is not None
    if not general or general[0].endswith("backward"):
        short[batch, residual, call.out is not None] += 1
    if call.gradients and not any(s.endswith("backward") for s in general):
        short["backward", residual, call.gradient_out is not None] += 1
