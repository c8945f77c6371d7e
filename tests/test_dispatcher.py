"""Which kernel runs on which view of the arrays, what the options are allowed to be, and what out= may share."""

import copy
import itertools
import math
import pickle
import re

import numpy as np
import pytest

import nbbn
from nbbn import Dispatcher, Force, Options
from nbbn.engine.base import Operands, Step
from nbbn.engine.cpu.engine import CpuEngine
from nbbn.kernels import channel
from nbbn.runtime import thread_limit
from tests.oracle.agreement import check_step
from tests.oracle.reference import Reference

F32 = np.dtype(np.float32)


def plan_of(x, step="infer", force=None, run=None, out=None, **options):
    run = run or Dispatcher(Options(**options), force)
    operands = Operands()._asdict() if step == "train" else {"residual": None}
    views = {"x": x, **operands, "y": np.empty_like(x) if out is None else out}
    return run.engine(x).plan(Step(step, run.layout(x.shape, training=step == "train"), views, {}))


def plans(run):
    """Those of the CPU, in the order in which they were made."""
    return list(run.engine(zeros(1)).plans.values())


FOLDED = Force(thresholds={"folded_elements": 0})


def zeros(shape, dtype=F32):
    return np.zeros(shape, dtype)


# --- the plan -------------------------------------------------------------------------

VIEWS = [
    ("NHWC", zeros((8, 5, 4, 3)), {"axis": -1}, (1, 1, 160, 3), "rows"),
    ("NCHW", zeros((8, 3, 5, 4)), {"axis": 1}, (8, 3, 20, 1), "planes"),
    ("dense", zeros((8, 3)), {"axis": -1}, (1, 1, 8, 3), "rows"),
    ("NCHW 1x1", zeros((8, 3, 1, 1)), {"axis": 1}, (1, 1, 8, 3), "rows"),
    ("several axes", zeros((8, 3, 5, 4)), {"axis": (1, 3)}, (8, 3, 5, 4), "rows"),
    ("Fortran", np.asfortranarray(zeros((8, 3))), {"axis": -1}, (1, 3, 8, 1), "planes"),
    ("NHWC memory, axis 1", zeros((8, 5, 4, 3)).transpose(0, 3, 1, 2), {"axis": 1}, (1, 1, 160, 3), "rows"),
    ("batch axis", zeros((8, 3)), {"axis": 0}, (1, 8, 3, 1), "planes"),
]


@pytest.mark.parametrize(("x", "options", "view", "schedule"), [v[1:] for v in VIEWS], ids=[v[0] for v in VIEWS])
def test_view_and_schedule(x, options, view, schedule):
    for step in ("train", "infer"):
        plan = plan_of(x, step, **options)
        expected = "flat" if (step, schedule) == ("infer", "planes") else schedule
        assert (plan.view, plan.schedule.loops, plan.copied, plan.contiguous) == (view, expected, None, True)


def test_virtual_batch_splits_training_only():
    x = zeros((8, 3))
    assert plan_of(x, "train", virtual_batch_size=4).view == (1, 1, 4, 6)
    assert plan_of(x, "infer", virtual_batch_size=4).view == (1, 1, 8, 3)


def test_gaps_are_read_in_place():
    plan = plan_of(zeros((16, 5, 4, 3))[::2], axis=-1)
    assert (plan.view, plan.contiguous, plan.copied) == ((8, 1, 20, 3), False, None)


def test_five_runs_are_copied():
    plan = plan_of(zeros((2, 3, 4, 5, 6)), axis=(1, 3))
    assert (plan.view, plan.copied.order, plan.contiguous) == ((1, 1, 48, 15), (0, 2, 4, 1, 3), True)


def test_copies_run_as_a_step_of_their_own():
    """On what the layout calls them."""
    run, x = Dispatcher(Options(axis=(1, 3))), zeros((2, 3, 4, 5, 6))
    run.infer(x, *np.ones((2, 2, 15), F32))
    original, copies = plans(run)
    assert original.copied.lay.sizes == (2, 4, 6, 3, 5)
    assert (copies.view, copies.copied, copies.contiguous) == (original.view, None, True)


def test_short_planes_and_few_channels_are_folded():
    """Only where all arrays lie as the view says: rows of other strides have no longer runs."""
    assert plan_of(zeros((8, 3, 5, 4)), "train", FOLDED, axis=1).schedule.shape == (1, 1, 8, 60)
    assert plan_of(zeros((8, 5, 4, 3)), "train", FOLDED, axis=-1).schedule.shape == (1, 1, 4, 120)
    for x, axis, loops in [
        (zeros((16, 3, 5, 4))[::2], 1, "planes"),
        (zeros((8, 5, 4, 6))[..., :3], -1, "rows"),
        (np.asfortranarray(zeros((8, 3, 5, 4))), -1, "planes"),
    ]:
        assert plan_of(x, "train", FOLDED, axis=axis).schedule.loops == loops, (x.strides, axis)
        assert plan_of(np.ascontiguousarray(x), "train", FOLDED, axis=axis).schedule.loops == "folded"
        mixed = plan_of(np.ascontiguousarray(x), "train", FOLDED, axis=axis, out=x)
        assert mixed.copied is not None or mixed.schedule.loops != "folded"


def test_operands_keep_rows_from_being_folded():
    run, x = Dispatcher(Options(), FOLDED), zeros((8, 5, 4, 3))
    for weights in (None, np.broadcast_to(zeros((8, 1, 1, 1)), x.shape)):
        run.train(x, *zeros((2, 2, 3)), Operands(weights=weights))
    assert [plan.schedule.loops for plan in plans(run)] == ["folded", "rows"]


def test_plans_are_kept():
    run, x = Dispatcher(Options()), zeros((8, 3))
    first = plan_of(x, run=run)
    assert plan_of(x + 1, run=run) is first
    assert plan_of(x, run=run, out=np.asfortranarray(x)) is not first
    assert plan_of(x.astype(np.float64), run=run) is not first
    assert plan_of(x, "train", run=run) is not first


def test_plans_of_calls_that_differ_in_what_is_none():
    """Each of these is a kernel of its own, on arrays of the same strides."""
    run = Dispatcher(Options(activation="relu"))
    x, ones = np.full((8, 3), 2.0, F32), np.ones((2, 3), F32)
    plain = run.infer(x, ones, ones)
    residual = run.infer(x, ones, ones, residual=-3 * x)
    assert (run.infer(x, ones, ones) == plain).all()
    assert (plain > 1).all()
    assert (residual == 0).all()
    saved, dy = run.freeze(ones, ones), np.full((8, 3), 5.0, F32)
    for operands, gate in ((Operands(), 1), (Operands(-3 * x), 0)):
        for wants_dz in (False, True, False):
            dx, _, dz = run.backward(dy, x, saved, operands, training=False, wants_dz=wants_dz)
            assert ((dx > 0) == gate).all()
            assert dz is None if not wants_dz else (dz == gate * dy).all()
    assert [plan.step for plan in plans(run)] == ["infer"] * 2 + ["backward"] * 4


@pytest.mark.parametrize("most", [1, 20])
def test_plans_of_endless_shapes_do_not_pile_up(most):
    layer = nbbn.BatchNormalization()
    nbbn.force(layer, max_plans=most)
    run, kept = layer._dispatcher, set()
    for n in range(1, 100):
        layer(np.full((n, 3), 2.0, F32))
        kept.add((len(plans(run)), len(run.bound)))
    assert {max(numbers) for numbers in zip(*kept, strict=True)} == {most}
    np.testing.assert_allclose(layer(np.full((5, 3), 2.0, F32)), 2 / math.sqrt(1.001), rtol=1e-6)


# --- explain ----------------------------------------------------------------------------


def lines(text):
    return dict(line.split(None, 1) for line in str(text).splitlines())


def test_explain_of_training():
    layer = nbbn.BatchNormalization(axis=1)
    text = lines(nbbn.explain(layer, zeros((8, 3, 5, 4), np.float16), training=True))
    assert text == {
        "step": "train",
        "dtype": "float16; statistics float32, sums in float64",
        "view": "R0=8 K0=3 R1=20 K1=1 (contiguous)",
        "schedule": "planes 8x3x20; passes: one, tile by tile; results written through the caches",
        "chunks": "1 of 160 of 160 values",
        "threads": "1",
    }
    assert not layer.built, "explain() must not build the layer"


def test_explain_of_inference_and_of_memory():
    layer = nbbn.BatchNormalization(axis=1, dtype="float64")
    x = zeros((8, 3, 5, 4))
    assert lines(nbbn.explain(layer, x))["step"] == "infer"
    assert lines(nbbn.explain(layer, x))["dtype"].startswith("float64; statistics float64")
    assert "strided, read in place" in lines(nbbn.explain(nbbn.BatchNormalization(axis=1), x[::2]))["view"]
    copied = lines(nbbn.explain(nbbn.BatchNormalization(axis=[1, 3]), zeros((2, 3, 4, 5, 6))))["view"]
    assert "copied" in copied
    assert "(0, 2, 4, 1, 3)" in copied


def test_explain_of_a_frozen_layer_is_inference():
    layer = nbbn.BatchNormalization(trainable=False)
    assert lines(nbbn.explain(layer, zeros((8, 3)), training=True))["step"] == "infer"


def forced(thresholds, **options):
    layer = nbbn.BatchNormalization(**options)
    nbbn.force(layer, thresholds=thresholds)
    return layer


def test_explain_of_a_large_input():
    layer = forced({"cache": 4 << 20}, axis=1)
    text = lines(nbbn.explain(layer, zeros((64, 2, 64, 128)), training=True))
    assert text["schedule"].endswith("results written past the caches")
    assert text["chunks"] == "8 of 65536 of 524288 values"
    expected = f"up to {thread_limit()}" if thread_limit() > 1 else "1"
    assert text["threads"].startswith(expected)


def test_explain_of_folded_rows():
    """160 values of each statistic, whatever the rows of the schedule."""
    for shape, axis, chunks in [
        ((8, 3, 5, 4), 1, "2 of 80 of 160 values"),
        ((8, 5, 4, 3), -1, "1 of 160 of 160 values"),
    ]:
        layer = forced({"folded_elements": 0, "chunk_elements": 1}, axis=axis)
        text = lines(nbbn.explain(layer, zeros(shape), training=True))
        assert text["schedule"].startswith("folded")
        assert text["chunks"] == chunks


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"renorm": True}], ids=str)
def test_explain_is_what_runs(options, training):
    """The plan that explain() shows is the one that the call takes."""
    layer, x = nbbn.BatchNormalization(axis=1, **options), zeros((8, 3, 5, 4))
    shown = nbbn.explain(layer, x, training=training)
    layer(x, training=training)
    assert plans(layer._dispatcher) == [shown]


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (4, 0, 3)])
@pytest.mark.parametrize("training", [False, True])
def test_explain_of_an_empty_input(shape, training):
    """Such a call is legal, so is the question."""
    for options in ({}, {"virtual_batch_size": 2}):
        assert str(nbbn.explain(nbbn.BatchNormalization(**options), zeros(shape), training=training))


def test_explain_refuses_what_the_call_refuses():
    with pytest.raises(ValueError, match="virtual_batch_size=4"):
        nbbn.explain(nbbn.BatchNormalization(virtual_batch_size=4), zeros((6, 3)), training=True)
    with pytest.raises(TypeError, match="int64"):
        nbbn.explain(nbbn.BatchNormalization(), np.zeros((6, 3), np.int64))


# --- Force --------------------------------------------------------------------------------


@pytest.mark.parametrize("loops", ["planes", "rows"])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("one_pass", [False, True])
def test_force(loops, parallel, one_pass):
    """Rows have no tiles of whole statistics of one group: they stay two passes."""
    force = Force(loops, parallel, one_pass, {"threads": 2})
    plan = plan_of(zeros((8, 3, 5, 4)), "train", force, axis=1)
    found = plan.schedule
    assert (found.loops, found.parallel, found.one_pass) == (loops, parallel, one_pass and loops == "planes")


def test_force_planes_where_there_are_none():
    x = zeros((8, 3))
    with pytest.raises(ValueError, match=r"'planes' needs K1 = 1.*\[1, 1, 8, 3\]"):
        Dispatcher(Options(), Force("planes")).infer(x, *zeros((2, 2, 3)))


def test_force_rejects_other_schedules():
    with pytest.raises(ValueError, match="schedule must be 'planes', 'rows' or None; received 'columns'"):
        Force("columns")


def test_choices_that_there_are_not():
    """Of a Force at once, of an engine's thresholds in the next call."""
    layer = nbbn.BatchNormalization()
    with pytest.raises(TypeError, match="columns"):
        nbbn.force(layer, columns=3)
    nbbn.force(layer, thresholds={"columns": 3})  # of a GPU
    with pytest.raises(TypeError, match="columns"):
        layer(zeros((4, 3)))
    assert not layer.built


def test_force_and_options_are_copied_with_the_dispatcher():
    run = Dispatcher(Options(axis=1, epsilon=0.5), Force("rows", thresholds={"chunk_rows": 2}, max_plans=3))
    run.infer(zeros((4, 3)), *np.ones((2, 2, 3), F32))
    for twin in (pickle.loads(pickle.dumps(run)), copy.deepcopy(run)):
        assert (twin.options, twin.force) == (run.options, run.force)


# --- memory shared between arrays -------------------------------------------------------------

SHAPE = (6, 4, 5, 3)


def normalized(x):
    x = x.astype(np.float64)
    return (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-3)


def windows(x_start, out_start, dtype=F32):
    """An input of SHAPE, and an out, that start at these elements of one block of memory."""
    size = math.prod(SHAPE)
    block = np.random.default_rng(0).normal(size=2 * size).astype(dtype)
    return (block[start : start + size].reshape(SHAPE) for start in (x_start, out_start))


@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize(("x_start", "out_start"), [(0, 0), (0, 1), (7, 0), (0, 60), (100, 97), (0, 360)])
def test_out_that_overlaps_the_input(x_start, out_start, training):
    """As if the input had been read before anything was written."""
    x, out = windows(x_start, out_start)
    layer = nbbn.BatchNormalization(momentum=0.5)
    expected = nbbn.BatchNormalization(momentum=0.5)(x.copy(), training=training)
    assert layer(x, training=training, out=out) is out
    np.testing.assert_array_equal(out, expected)


def test_out_is_the_input_reversed():
    x, _ = windows(0, 0)
    expected = normalized(x)
    out = x[::-1]
    nbbn.BatchNormalization()(x, training=True, out=out)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_out_is_the_input_transposed():
    """The same memory from the same first element, in another order."""
    x = np.random.default_rng(0).normal(size=(6, 6)).astype(F32)
    expected = nbbn.BatchNormalization()(x.copy(), training=True)
    out = x.T
    nbbn.BatchNormalization()(x, training=True, out=out)
    np.testing.assert_array_equal(out, expected)


def test_out_is_the_mask():
    x, _ = windows(0, 0)
    mask = (np.random.default_rng(1).random(SHAPE) < 0.5).astype(F32)
    expected = nbbn.BatchNormalization()(x, training=True, mask=mask.copy())
    nbbn.BatchNormalization()(x, training=True, mask=mask, out=mask)
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("which", [0, 1])
def test_out_is_the_adjustment(which):
    x, _ = windows(0, 0)
    pair = [np.random.default_rng(i).normal(size=SHAPE).astype(F32) for i in (1, 2)]
    expected = nbbn.BatchNormalization(adjustment=lambda s: [p.copy() for p in pair])(x, training=True)
    nbbn.BatchNormalization(adjustment=lambda s: pair)(x, training=True, out=pair[which])
    np.testing.assert_array_equal(pair[which], expected)


def test_out_of_a_layer_that_casts_may_be_the_input_of_its_dtype_only():
    x = np.random.default_rng(0).normal(size=(6, 3))
    layer = nbbn.BatchNormalization(dtype="float32")
    with pytest.raises(ValueError, match=r"float32.*received.*float64"):
        layer(x, out=x)
    out = np.empty((6, 3), F32)
    assert layer(x, out=out) is out


NOT_ITS_OWN = {
    "read-only": lambda: np.broadcast_to(np.zeros(SHAPE, F32), SHAPE),
    "broadcast": lambda: np.lib.stride_tricks.as_strided(zeros(3), SHAPE, (0, 0, 0, 4)),
    "unaligned": lambda: np.zeros(4 * math.prod(SHAPE) + 1, np.uint8)[1:].view(F32).reshape(SHAPE),
}


@pytest.mark.parametrize("kind", NOT_ITS_OWN)
def test_out_must_be_memory_of_its_own(kind):
    with pytest.raises(ValueError, match="out must be writable memory of its own"):
        nbbn.BatchNormalization()(zeros(SHAPE), out=NOT_ITS_OWN[kind]())


def test_out_may_have_dimensions_of_size_one_of_any_stride():
    """np.newaxis makes them with stride 0."""
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(F32)
    layer = nbbn.BatchNormalization()
    out = np.empty_like(x)[np.newaxis]
    assert layer(x[np.newaxis], out=out) is out
    np.testing.assert_array_equal(out, layer(x[np.newaxis]))


def test_vjp_refuses_an_out_that_shares_memory_with_its_input():
    x, out = windows(0, 60)
    with pytest.raises(ValueError, match=r"out must not share memory with inputs or residual in vjp\(\)"):
        nbbn.BatchNormalization().vjp(x, training=True, out=out)


# --- memory orders of the arrays of one call ------------------------------------------------------

ORDERS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "channels last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1),
    "reversed": lambda a: np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
}


@pytest.mark.parametrize(("one", "two"), list(itertools.permutations(ORDERS, 2)))
@pytest.mark.parametrize("axis", [1, -1])
def test_arrays_in_different_memory_orders(one, two, axis):
    """x in one order; dy and out in another."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(2, 1, size=(2, *SHAPE)).astype(F32)
    layer = nbbn.BatchNormalization(axis=axis, momentum=0.5)
    layer(x)
    oracle = Reference(axis=axis, momentum=0.5).build(SHAPE)
    out = ORDERS[two](np.empty(SHAPE, F32))
    check_step(layer, oracle, ORDERS[one](x), ORDERS[two](dy))
    y = layer(ORDERS[one](x), training=True, out=out)
    assert y is out
    np.testing.assert_allclose(out, layer(x, training=True), rtol=1e-6, atol=1e-6)


def test_broadcast_inputs_are_only_read():
    """NumPy warns when the result of broadcast_arrays() is written to."""
    x = np.random.default_rng(0).normal(size=(1, 3)).astype(F32)
    expected = nbbn.BatchNormalization()(np.repeat(x, 4, 0), training=True)
    for wide in (np.broadcast_to(x, (4, 3)), np.broadcast_arrays(x, np.empty((4, 3)))[0]):
        np.testing.assert_allclose(nbbn.BatchNormalization()(wide, training=True), expected, atol=1e-6)


def test_the_output_keeps_the_order_of_the_input():
    x = zeros(SHAPE).transpose(0, 3, 1, 2)
    layer = nbbn.BatchNormalization(axis=1)
    y, pullback = layer.vjp(x, training=True)
    assert y.strides == x.strides
    assert pullback(np.zeros(x.shape, F32)).inputs.strides == x.strides


# --- what the channel stage is told -------------------------------------------------------------------


class Listener(CpuEngine):
    """Is told to run steps, and runs none."""

    def train(self, batch, params, state, hyper, new_state):
        self.hyper = hyper
        return batch.result(), state, None

    def infer(self, batch, params, state, hyper):
        self.hyper = hyper
        return batch.result()

    def freeze(self, params, state, hyper):
        self.hyper = hyper


def listening(**options):
    """A Dispatcher, and what its steps of these ranks and dtypes are told."""
    run = Dispatcher(Options(**options))
    listener = Listener(run.options, run.force)
    run.use(listener)

    def told(rank=2, dtype=F32, step="train", **choices):
        x, channels = np.zeros((4,) * rank, dtype), 4 ** len(run.axis(rank))
        params, state = np.zeros((2, channels), F32), np.zeros((5 if run.options.renorm else 2, channels), F32)
        if step == "freeze":
            run.freeze(params, state)
        else:
            getattr(run, step)(x, params, state, **choices)
        return listener.hyper

    return told


CLIPS = [channel.RMIN, channel.RMAX, channel.DMAX]


def test_hyper():
    hyper = listening(momentum=0.25, epsilon=0.5, renorm=True, renorm_momentum=0.75)()
    assert hyper.dtype == np.float64
    assert hyper[[channel.EPSILON, channel.MOMENTUM, channel.RENORM_MOMENTUM]].tolist() == [0.5, 0.25, 0.75]
    assert hyper[CLIPS].tolist() == [0, math.inf, math.inf]


@pytest.mark.parametrize("step", ["infer", "freeze"])
def test_what_inference_is_told_asks_for_no_clips(step):
    """Callables need not have an answer outside training; nor is one of training told another's."""
    told = listening(epsilon=0.5, renorm=True, renorm_clipping={"rmax": lambda: pytest.fail("was asked")})
    assert told(step=step)[channel.EPSILON] == 0.5


@pytest.mark.parametrize("rmax", [2.0, lambda: 2.0], ids=["constant", "callable"])
def test_clips_of_a_step(rmax):
    """Given by the caller, who may have asked the options already; they do not stay."""
    told = listening(renorm=True, renorm_clipping={"rmax": rmax})
    for _ in range(2):
        assert told(clips={"rmin": 0.25, "rmax": 8.0, "dmax": 1.0})[CLIPS].tolist() == [0.25, 8, 1]
        assert told()[CLIPS].tolist() == [0, 2, math.inf]


def test_each_rank_and_dtype_is_told_its_own():
    """Bessel's correction depends on them."""
    told = listening()
    ranks = [(4, F32), (2, F32), (4, np.dtype(np.float64)), (4, F32)]
    assert [told(*rank)[channel.BESSEL] for rank in ranks] == [1, 0, 0, 1]


def test_clip_values_are_read_at_each_step():
    now = {"rmax": 1.0, "rmin": 1.0, "dmax": 0.0}
    told = listening(renorm=True, renorm_clipping={k: (lambda k=k: now[k]) for k in now})
    assert told()[CLIPS].tolist() == [1, 1, 0]
    now.update(rmax=3.0, rmin=0.5, dmax=5.0)
    assert told()[CLIPS].tolist() == [0.5, 3, 5]


def test_a_schedule_of_clip_values_changes_the_steps():
    """At 1, 1, 0 renorm is plain batch normalization; one reading per step."""
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, size=(16, 3)).astype(F32)
    readings = iter([1.0, 4.0, 4.0])
    layer = nbbn.BatchNormalization(
        renorm=True, renorm_clipping={"rmax": lambda: next(readings), "rmin": 1.0, "dmax": 0.0}
    )
    plain = nbbn.BatchNormalization()(x, training=True)
    np.testing.assert_allclose(layer(x, training=True), plain, rtol=1e-6, atol=1e-6)
    assert np.abs(layer(x, training=True) - plain).max() > 0.5
    layer(x)  # inference does not read them
    layer(x, training=True)
    with pytest.raises(StopIteration):
        next(readings)


@pytest.mark.parametrize("value", [np.float32(2.5), np.array(2.5), np.int64(2), 2])
def test_clip_values_of_other_number_types(value):
    hyper = listening(renorm=True, renorm_clipping={"rmax": value, "dmax": lambda: value})()
    assert hyper[channel.RMAX] == hyper[channel.DMAX] == float(value)


BESSEL = [
    ({}, (8, 5, 4, 3), F32, True),
    ({"axis": 1}, (8, 3, 5, 4), F32, True),
    ({"axis": 2}, (8, 3, 5, 4), F32, False),
    ({}, (8, 5, 4, 2, 3), F32, True),
    ({}, (8, 3), F32, False),
    ({}, (8, 5, 3), F32, False),
    ({}, (8, 5, 4, 3), np.dtype(np.float64), False),
    ({}, (8, 5, 4, 3), np.dtype(np.float16), True),
    ({"axis": (3,)}, (8, 5, 4, 3), F32, True),
    ({"axis": (1, 3)}, (8, 5, 4, 3), F32, False),
    ({"renorm": True}, (8, 5, 4, 3), F32, False),
    ({"virtual_batch_size": 2}, (8, 5, 4, 3), F32, False),
    ({"fused": False}, (8, 5, 4, 3), F32, False),
    ({"fused": np.False_}, (8, 5, 4, 3), F32, False),
    ({"bessel_correction": False}, (8, 5, 4, 3), F32, False),
    ({"bessel_correction": True}, (8, 3), F32, True),
    ({"bessel_correction": np.True_, "fused": False}, (8, 3), F32, True),
]


@pytest.mark.parametrize(("options", "shape", "dtype", "expected"), BESSEL)
def test_bessel(options, shape, dtype, expected):
    assert bool(listening(**options)(len(shape), dtype)[channel.BESSEL]) == expected


NUMBERS = [0, 1, 0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), np.int64(1)]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
def test_epsilon_of_every_number_type(value, training):
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(F32)
    y, pullback = nbbn.BatchNormalization(epsilon=value).vjp(x, training=training)
    mean, variance = (x.mean(0), x.var(0)) if training else (0, 1)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + float(value)), rtol=1e-5, atol=1e-6)
    assert np.isfinite(pullback(y).inputs).all()


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_momentum_of_every_number_type(value):
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(F32)
    layer = nbbn.BatchNormalization(momentum=value, renorm=True, renorm_momentum=value)
    layer(x, training=True)
    for found in (layer.moving_mean, layer.renorm_mean):
        np.testing.assert_allclose(found, x.mean(0, np.float64) * (1 - float(value)), rtol=1e-6)


# --- options that are not possible ----------------------------------------------------------------------

ERRORS = [
    ({"axis": 1.5}, TypeError, ("axis", "1.5")),
    ({"axis": "channels"}, TypeError, ("axis", "channels")),
    ({"axis": True}, TypeError, ("axis", "True")),
    ({"axis": None}, TypeError, ("axis", "None")),
    ({"axis": (0, 1.0)}, TypeError, ("axis", "1.0")),
    ({"axis": {1}}, TypeError, ("axis", "{1}")),
    ({"axis": []}, ValueError, ("axis", "[]")),
    ({"momentum": "high"}, TypeError, ("momentum", "high")),
    ({"momentum": True}, TypeError, ("momentum", "True")),
    ({"momentum": 1j}, TypeError, ("momentum", "1j")),
    ({"momentum": [0.9]}, TypeError, ("momentum", "[0.9]")),
    ({"momentum": np.array([0.9])}, TypeError, ("momentum", "[0.9]")),
    ({"momentum": -0.1}, ValueError, ("momentum", "-0.1")),
    ({"momentum": 1.1}, ValueError, ("momentum", "1.1")),
    ({"momentum": math.nan}, ValueError, ("momentum", "nan")),
    ({"renorm_momentum": None}, TypeError, ("renorm_momentum", "None")),
    ({"renorm_momentum": 2}, ValueError, ("renorm_momentum", "2")),
    ({"epsilon": None}, TypeError, ("epsilon", "None")),
    ({"epsilon": "small"}, TypeError, ("epsilon", "small")),
    ({"epsilon": -1e-3}, ValueError, ("epsilon", "-0.001")),
    ({"epsilon": math.inf}, ValueError, ("epsilon", "inf")),
    ({"epsilon": math.nan}, ValueError, ("epsilon", "nan")),
    ({"fused": "yes"}, TypeError, ("fused", "yes")),
    ({"fused": 2}, TypeError, ("fused", "2")),
    ({"bessel_correction": "yes"}, TypeError, ("bessel_correction", "yes")),
    ({"renorm": True, "bessel_correction": True}, ValueError, ("bessel_correction", "True", "renorm")),
    ({"virtual_batch_size": 2.0}, TypeError, ("virtual_batch_size", "2.0")),
    ({"virtual_batch_size": True}, TypeError, ("virtual_batch_size", "True")),
    ({"virtual_batch_size": 0}, ValueError, ("virtual_batch_size", "0")),
    ({"virtual_batch_size": -2}, ValueError, ("virtual_batch_size", "-2")),
    ({"adjustment": 3}, TypeError, ("adjustment", "3")),
    ({"adjustment": abs, "virtual_batch_size": 2}, ValueError, ("adjustment", "virtual_batch_size", "2")),
    ({"renorm": True, "renorm_clipping": [3]}, TypeError, ("renorm_clipping", "[3]")),
    ({"renorm": True, "renorm_clipping": {"r_max": 3}}, ValueError, ("renorm_clipping", "r_max", "rmax")),
    ({"renorm": True, "renorm_clipping": {1: 3}}, ValueError, ("renorm_clipping", "1", "rmax")),
    ({"renorm": True, "renorm_clipping": {"rmax": "3"}}, TypeError, ("renorm_clipping", "rmax", "'3'")),
    ({"renorm": True, "renorm_clipping": {"rmax": True}}, TypeError, ("renorm_clipping", "rmax", "True")),
    ({"renorm": True, "renorm_clipping": {"rmax": 0.5, "rmin": 2}}, ValueError, ("rmin", "rmax", "0.5", "2")),
    ({"renorm": True, "renorm_clipping": {"dmax": -1}}, ValueError, ("dmax", "-1")),
    ({"renorm": True, "renorm_clipping": {"dmax": math.nan}}, ValueError, ("dmax", "nan")),
    ({"renorm": True, "renorm_clipping": {"rmax": math.nan}}, ValueError, ("rmax", "nan")),
    ({"fused": True, "renorm": True}, ValueError, ("fused", "renorm")),
    ({"fused": True, "virtual_batch_size": 2}, ValueError, ("fused", "virtual_batch_size=2")),
    ({"fused": True, "adjustment": abs}, ValueError, ("fused", "adjustment")),
    ({"fused": True, "axis": (1, 2)}, ValueError, ("fused", "axis", "[1, 2]")),
    ({"fused": True, "axis": 0}, ValueError, ("fused", "axis", "0")),
    ({"fused": True, "dtype": np.dtype(np.float64)}, ValueError, ("fused", "float64")),
]


@pytest.mark.parametrize(("options", "error", "fragments"), ERRORS, ids=[str(e[0])[:60] for e in ERRORS])
def test_options_errors(options, error, fragments):
    with pytest.raises(error) as caught:
        Options(**options)
    for fragment in fragments:
        assert fragment in str(caught.value), f"{fragment!r} is not in the message: {caught.value}"


def test_version_1_takes_fused_for_a_wish():
    Options(fused=True, renorm=True, strict_fused=False)


def test_options_cannot_change():
    options = Options()
    with pytest.raises(AttributeError):
        options.axis = 3


DTYPES = ["float8", "f4,f4", "f4,(", {}, [], 5, object(), np.array([1, 2]), np.int32, "complex64", "S4", ("f4", 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
def test_dtypes_that_are_not_possible(dtype):
    with pytest.raises(TypeError, match="dtype must be one of float16, bfloat16, float32, float64; received"):
        nbbn.BatchNormalization(dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("float32", "float32"), (np.float64, "float64"), (float, "float64"), (">f4", "float32"), ("bfloat16", "bfloat16")],
)
def test_dtypes_that_are_possible(dtype, name):
    layer = nbbn.BatchNormalization(dtype=dtype)
    assert layer.dtype == name
    y = layer(np.ones((4, 3), np.float64))
    assert y.dtype.name == name
    assert y.dtype.isnative


# --- arrays that do not fit -----------------------------------------------------------------------


def call(step, **changed):
    """A step of a Dispatcher with renorm, on (4, 3) arrays, of which some are changed."""
    run, x = Dispatcher(Options(renorm=True)), np.random.default_rng(0).normal(size=(4, 3))
    given = {"x": x, "params": np.ones((2, 3)), "state": np.ones((5, 3)), "out": None, "dy": x} | changed
    saved = given.get("saved", run.freeze(np.ones((2, 3)), np.ones((5, 3))))
    if step == "train":
        return run.train(given["x"], given["params"], given["state"], out=given["out"])
    if step == "infer":
        return run.infer(given["x"], given["params"], given["state"], residual=given.get("residual"), out=given["out"])
    if step == "finish":
        moments = given.get("moments", np.ones((3, 3)))
        return run.finish(moments, given["params"], given["state"], rank=2, dtype=x.dtype)
    return run.backward(given["dy"], given["x"], saved, training=True, out=given["out"])


@pytest.mark.parametrize(
    ("step", "name", "shape"),
    [
        *((step, "params", (2, 4)) for step in ("train", "infer")),
        ("finish", "params", (3, 3)),
        *((step, "state", (2, 3)) for step in ("train", "finish")),
        ("infer", "state", (5, 4)),
        ("finish", "moments", (2, 3)),
        ("infer", "residual", (4, 4)),
        ("backward", "saved", (7, 3)),
        ("backward", "dy", (3, 4)),
        *((step, "out", (5, 3)) for step in ("train", "infer", "backward")),
    ],
)
def test_arrays_that_do_not_fit_are_refused(step, name, shape):
    """Kernels would read and write beside them."""
    call(step)
    with pytest.raises(ValueError, match=rf"{name} must have shape .*received {re.escape(str(shape))}"):
        call(step, **{name: np.ones(shape)})


def test_parameters_and_state_may_lie_in_any_order():
    expected = call("train")
    found = call("train", params=np.asfortranarray(np.ones((2, 3))), state=np.ones((5, 6))[:, ::2])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
