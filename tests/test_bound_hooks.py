"""Whoever overrides a method of a layer, or adds an option, need not know that calls like an earlier one are short."""

import inspect
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from nbbn import BatchNormalization, Dispatcher, Options
from tests.helpers.engines import forgetful, watch

RNG = np.random.default_rng(5)
X = RNG.standard_normal((12, 6)).astype(np.float32)
X2 = RNG.standard_normal((12, 6)).astype(np.float32)

# -- for whoever overrides a method ---------------------------------------------------------------------------------


class Asked(BatchNormalization):
    """Notes what it is asked."""

    def __init__(self, *args, **kwargs):
        self.asked = []
        super().__init__(*args, **kwargs)


class Updates(Asked):
    """The statistics are kept as usual; `saved` and `inputs` are what they are in the first call."""

    def _update(self, variables, new_state, saved, inputs, numbers):
        self.asked.append((new_state.tobytes(), saved.tobytes(), inputs is self.given))
        super()._update(variables, new_state, saved, inputs, numbers)


class KeepsNothing(Updates):
    def _update(self, variables, new_state, saved, inputs, numbers):
        self.asked.append(saved.tobytes())


class KeepsHalf(Updates):
    def _update(self, variables, new_state, saved, inputs, numbers):
        variables.keep((variables.state + new_state) / 2)


class KeepsInAnotherOrder(Updates):
    """Of memory: the values are those of the new state."""

    def _update(self, variables, new_state, saved, inputs, numbers):
        variables.keep(np.asfortranarray(new_state))


class KeepsInAnotherDtype(Updates):
    def _update(self, variables, new_state, saved, inputs, numbers):
        variables.keep(new_state.astype(np.float64) + 1e-3)


class KeepsAPart(Updates):
    def _update(self, variables, new_state, saved, inputs, numbers):
        variables.keep_part(new_state, "mean")


class KeepsAView(Updates):
    """Of a larger array, with gaps."""

    def _update(self, variables, new_state, saved, inputs, numbers):
        variables.keep(np.repeat(new_state, 2, axis=1)[:, ::2])


class FailsToUpdate(Updates):
    def _update(self, variables, new_state, saved, inputs, numbers):
        raise ArithmeticError(f"{len(self.asked)}")


class UpdatesEverySecondTime(Updates):
    calls = 0

    def _update(self, variables, new_state, saved, inputs, numbers):
        self.calls += 1
        if self.calls % 2:
            super()._update(variables, new_state, saved, inputs, numbers)


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
        arena = np.arange(60, dtype=np.float32).reshape(2, 30)
        arena[:, 12:18] = variables.params
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
