"""Every option of a layer and every operand of a call: the short way gives the results, the state and the errors that
the general one gives. Random calls of random layers, with kernels that cost nothing."""

import contextlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nbbn
from nbbn import BatchNormalization
from nbbn.compat import v1
from nbbn.core import dtypes
from tests.helpers.engines import ImaginedEngine, forgetful, watch
from tests.oracle.strategies import (
    FORMS,
    MASK_FORMS,
    ODD_FORMS,
    OUTS,
    Call,
    Case,
    arrange,
    calls,
    cases,
    layer_options,
    odd,
)


class KeepsMore(BatchNormalization):
    """Overrides what V1 overrides, in another way."""

    def _update(self, variables, new_state, saved, inputs, numbers):
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
        mask = replace(self.case, dtype=self.dtype.type).batch(0)[2]
        for residual in (None, z):
            self.layer(x, residual=residual)
            with contextlib.suppress(ValueError):  # clips that contradict each other
                for weights in (None, mask, mask):  # only the gradient of a bound step with a mask leaves one behind
                    self.layer.vjp(x, training=True, residual=residual, mask=weights)[1](dy)
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
        given = {"x": odd(x, call.form), "mask": None}
        if mask is not None and call.mask is not None:
            given["mask"] = mask if call.mask == "C" else arrange(np.asarray(mask), call.mask)
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
CALL = Call(True, None, True, "C", None, None, 1, "C", None)
PROFILE = settings(
    deadline=None,
    derandomize=True,
    max_examples=500,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def test_every_option_and_every_operand():
    """The first call, one like it, and one after whatever can prepare the short way: each has the results, the state
    and the errors of a layer that never takes it. With kernels that cost nothing, see ImaginedEngine."""
    short = Counter()

    @settings(PROFILE)
    @given(data=st.data())
    def check(data):
        case, kind = data.draw(cases(every=True)), data.draw(st.sampled_from(KINDS))
        options, several = data.draw(layer_options(case)), data.draw(st.lists(calls(), min_size=1, max_size=3))
        check_calls(kind, case, options, data.draw(st.sampled_from([None, None, None, True])), several, short)

    check()
    for residual in (False, True):
        for out in (False, True):
            for step in ("train", "infer", "backward"):
                assert short[step, residual, out] >= 10, f"{step}, residual: {residual}, out: {out}; {short}"
    assert min(short["masked", step] for step in ("train", "backward")) >= 10, short
    assert min(short["transposed", step] for step in ("train", "infer", "backward")) >= 5, short


PLAIN_CALLS = {
    "inference": replace(CALL, training=False, gradients=None),
    "training": replace(CALL, gradients=None),
    "gradients": CALL,
    "residual": replace(CALL, residual="C"),
    "mask": replace(CALL, mask="C"),
    "transposed": replace(CALL, form="Fortran", dy="Fortran"),
    "transposed residual": replace(CALL, form="Fortran", dy="Fortran", residual="Fortran"),
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
    for form in (None, *MASK_FORMS):
        yield replace(call, mask=form)
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
        assert short[batch, "residual" in name, out]
        assert name in ("inference", "training") or short["backward", "residual" in name, out]


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
    residual, masked = call.residual is not None, call.mask is not None and batch == "train"
    transposed = call.form in ("Fortran", "channels last in memory", "channels first in memory")

    def count(step, out):
        short[step, residual, out is not None] += 1
        short["masked", step] += masked
        short["transposed", step] += transposed

    if not general or general[0].endswith("backward"):
        count(batch, call.out)
    if call.gradients and not any(s.endswith("backward") for s in general):
        count("backward", call.gradient_out)
