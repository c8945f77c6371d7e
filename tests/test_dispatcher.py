"""Which kernel runs on which view of the arrays, how that is explained, and how it is forced."""

import copy
import math
import pickle
import weakref

import numpy as np
import pytest

import nbbn
from nbbn import Dispatcher, Force, Options
from nbbn.arrays.host import beside
from nbbn.engine.base import Operands, Step
from nbbn.runtime import thread_limit

F32 = np.dtype(np.float32)


def plan_of(x, step="infer", force=None, run=None, out=None, **options):
    run = run or Dispatcher(Options(**options), force)
    operands = Operands()._asdict() if step == "train" else {"residual": None}
    views = {"x": x, **operands, "y": np.empty_like(x) if out is None else out}
    return run.engine(x).plan(Step(step, run.layout(x.shape, training=step == "train"), views, {}))


def plans(run):
    """Those of the CPU, in the order in which they were made."""
    return list(run.engine(zeros(1)).plans.values())


# Of short planes, and of few channels.
LONG_ROWS = Force(thresholds={"short_plane": 20, "short_batch": 0, "repeated_columns": 60, "expanded_rows": 1})


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
        plan = plan_of(x, step, Force(thresholds={"short_plane": 0}), **options)
        assert (plan.view, plan.schedule.loops, plan.copied, plan.contiguous) == (view, schedule, None, True)


def test_virtual_batch_splits_training_only():
    x = zeros((8, 3))
    assert plan_of(x, "train", virtual_batch_size=4).view == (1, 1, 4, 6)
    assert plan_of(x, "infer", virtual_batch_size=4).view == (1, 1, 8, 3)


@pytest.mark.parametrize("axis", [0, -2, (0, 1)])
@pytest.mark.parametrize("step", ["train", "infer"])
def test_a_virtual_batch_needs_its_dimension(step, axis):
    with pytest.raises(ValueError, match=r"axis must not include the batch dimension 0 .* received axis="):
        plan_of(zeros((8, 3)), step, virtual_batch_size=4, axis=axis)


def test_gaps_are_read_in_place():
    plan = plan_of(zeros((16, 5, 4, 3))[::2], axis=-1)
    assert (plan.view, plan.contiguous, plan.copied) == ((8, 1, 20, 3), False, None)


def test_five_runs_are_copied():
    plan = plan_of(zeros((2, 3, 4, 5, 6)), axis=(1, 3))
    assert (plan.view, plan.copied.order, plan.contiguous) == ((8, 15, 6, 1), (0, 2, 1, 3, 4), True)


def test_copies_run_as_a_step_of_their_own():
    """On what the layout calls them."""
    run, x = Dispatcher(Options(axis=(1, 3))), zeros((2, 3, 4, 5, 6))
    run.infer(x, *np.ones((2, 2, 15), F32))
    original, copies = plans(run)
    assert original.copied.lay.sizes == (2, 4, 3, 5, 6)
    assert (copies.view, copies.copied, copies.contiguous) == (original.view, None, True)


def columns_and_rows(plan):
    """How many columns of a row belong to a statistic, and how many rows are taken as one."""
    grid = plan.schedule.grid
    return grid.span // grid.inner, grid.repeats


def test_rows_of_short_planes_and_of_few_channels_are_long():
    """Only where all arrays lie as the view says: rows of other strides have no longer runs."""
    short = plan_of(zeros((8, 3, 5, 4)), "train", LONG_ROWS, axis=1)
    assert (short.schedule.shape, *columns_and_rows(short)) == ((1, 1, 8, 60), 20, 1)
    few = plan_of(zeros((8, 5, 4, 3)), "train", LONG_ROWS, axis=-1)
    assert (few.schedule.shape, *columns_and_rows(few)) == ((1, 1, 160, 3), 1, 20)
    for x, axis, loops in [
        (zeros((16, 3, 5, 4))[::2], 1, "planes"),
        (zeros((8, 5, 4, 6))[..., :3], -1, "rows"),
        (np.asfortranarray(zeros((8, 3, 5, 4))), -1, "planes"),
    ]:
        plan = plan_of(x, "train", LONG_ROWS, axis=axis)
        assert (plan.schedule.loops, *columns_and_rows(plan)) == (loops, 1, 1), (x.strides, axis)
        assert max(columns_and_rows(plan_of(np.ascontiguousarray(x), "train", LONG_ROWS, axis=axis))) > 1
        mixed = plan_of(np.ascontiguousarray(x), "train", LONG_ROWS, axis=axis, out=x)
        assert mixed.copied is not None or max(columns_and_rows(mixed)) == 1


def test_operands_keep_rows_short():
    run, x = Dispatcher(Options(), LONG_ROWS), zeros((8, 5, 4, 3))
    for weights in (None, np.broadcast_to(zeros((8, 1, 1, 1)), x.shape)):
        run.train(x, *zeros((2, 2, 3)), Operands(weights=weights))
    assert [columns_and_rows(plan) for plan in plans(run)] == [(1, 20), (1, 1)]


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
    layer = forced({"short_plane": 0}, axis=1)
    text = lines(nbbn.explain(layer, zeros((8, 3, 5, 4), np.float16), training=True))
    assert text.pop("threads").startswith("1")
    assert text == {
        "step": "train",
        "dtype": "float16; statistics float32, sums in float64",
        "view": "R0=8 K0=3 R1=20 K1=1 (contiguous)",
        "schedule": "planes 8x3x20; passes: one, tile by tile; results written through the caches",
        "chunks": "1 of 160 of 160 values",
    }
    assert not layer.built, "explain() must not build the layer"


def test_explain_of_inference_and_of_memory():
    layer = nbbn.BatchNormalization(axis=1, dtype="float64")
    x = zeros((8, 3, 5, 4))
    assert lines(nbbn.explain(layer, x))["step"] == "infer"
    assert lines(nbbn.explain(layer, x))["dtype"].startswith("float64; statistics float64")
    assert "strided, read in place" in lines(nbbn.explain(nbbn.BatchNormalization(axis=1), x[::2]))["view"]
    of_channels = lines(nbbn.explain(nbbn.BatchNormalization(axis=[0, 2]), x))["view"]
    assert of_channels.startswith("R0=24 (8 slices) K0=5 R1=4 K1=1")
    copied = lines(nbbn.explain(nbbn.BatchNormalization(axis=[1, 3]), zeros((2, 3, 4, 5, 6))))["view"]
    assert "copied" in copied
    assert "(0, 2, 1, 3, 4)" in copied


def test_explain_of_a_frozen_layer_is_inference():
    layer = nbbn.BatchNormalization(trainable=False)
    assert lines(nbbn.explain(layer, zeros((8, 3)), training=True))["step"] == "infer"


def forced(thresholds, **options):
    layer = nbbn.BatchNormalization(**options)
    nbbn.force(layer, thresholds=thresholds)
    return layer


def test_explain_of_a_large_input():
    sizes = {"cache": 4 << 20, "chunk_elements": 1 << 16, "max_tasks": 32, "parallel_elements": 1 << 20}
    layer = forced({**sizes, "streamed_share": 1.0, "streamed_run": 0}, axis=1)
    text = lines(nbbn.explain(layer, zeros((64, 2, 64, 128)), training=True))
    assert text["schedule"].endswith("results written past the caches")
    assert text["chunks"] == "8 of 65536 of 524288 values"
    expected = f"up to {thread_limit()} (by " if thread_limit() > 1 else "1 (by "
    assert text["threads"].startswith(expected)
    small = lines(nbbn.explain(layer, zeros((4, 2, 4, 4)), training=True))["threads"]
    assert small.removeprefix("1; with more work ") == text["threads"]


def test_explain_of_long_rows():
    """160 values of each statistic, whatever the rows of the schedule."""
    for shape, axis, rows, chunks in [
        ((8, 3, 5, 4), 1, "1x1x8x60", "2 of 80 of 160 values"),
        ((8, 5, 4, 3), -1, "1x1x160x3", "2 of 80 of 160 values"),
    ]:
        cuts = {"chunk_elements": 1, "chunk_rows": 1, "max_tasks": 2}
        layer = forced({**LONG_ROWS.thresholds, **cuts}, axis=axis)
        text = lines(nbbn.explain(layer, zeros(shape), training=True))
        assert text["schedule"].startswith(f"rows {rows};")
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
    force = Force(loops, parallel, one_pass, {"threads": 2})
    found = plan_of(zeros((8, 3, 5, 4)), "train", force, axis=1).schedule
    assert (found.loops, found.parallel, found.one_pass) == (loops, parallel, one_pass)


def test_force_one_pass_where_there_is_none():
    """A tile of columns has channels of several groups: they stay two passes."""
    found = plan_of(zeros((8, 3)), "train", Force(one_pass=True), virtual_batch_size=4).schedule
    assert not found.one_pass


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


@pytest.mark.parametrize(
    "force", [Force(parallel=False), Force(parallel=True, one_pass=True)], ids=["serial", "parallel"]
)
@pytest.mark.parametrize("axis", [1, -1])
def test_rows_of_parameters_and_state_may_lie_apart(force, axis):
    rng = np.random.default_rng(5)
    run, x = Dispatcher(Options(axis=axis), force), rng.normal(size=(8, 6, 5, 6)).astype(np.float32)
    apart = [np.zeros(6 + gap, np.float32)[gap:] for gap in (1, 7, 3, 2)]
    for row in apart:
        row[:] = rng.random(6) + 0.5
    dense = np.array(apart[:2]), np.array(apart[2:])
    params, state = beside(*apart[:2]), beside(*apart[2:])
    expected = run.train(x, *dense)
    np.testing.assert_array_equal(run.infer(x, params, state), run.infer(x, *dense))
    np.testing.assert_array_equal(run.freeze(params, state), run.freeze(*dense))
    moments = run.reduce(x)
    found = run.finish(moments, params, state, rank=4, dtype=x.dtype)
    np.testing.assert_array_equal(found[0], expected[1])
    y, new_state, saved = run.train(x, params, state, in_place=True)
    assert new_state is state
    for a, b in zip((y, np.array([apart[2], apart[3]]), saved), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_stay_as_long_as_their_view():
    rows = [np.full(1000, i, np.float32) for i in range(2)]
    gone = [weakref.ref(row) for row in rows]
    view = beside(*rows)
    del rows
    np.testing.assert_array_equal([row.mean() for row in view], [0, 1])
    assert view.flags.writeable
    del view
    assert not any(row() is not None for row in gone)


def test_rows_that_lie_apart_are_cast():
    run, x, state = Dispatcher(Options(axis=1)), np.ones((4, 6)), np.array([np.zeros(6), np.ones(6)])
    dense = np.arange(12, dtype=np.float32).reshape(2, 6)
    params = beside(*(np.array(row) for row in dense))
    np.testing.assert_array_equal(run.infer(x, params, state), run.infer(x, dense, state))
    np.testing.assert_array_equal(run.freeze(params, state, x.dtype), run.freeze(dense, state, x.dtype))


def test_freeze_takes_a_state_of_the_parameters_channels():
    with pytest.raises(ValueError, match=r"state must have shape \(2, 3\); received \(2, 4\)"):
        Dispatcher(Options()).freeze(np.ones((2, 3), F32), np.ones((2, 4), F32))


def test_rows_that_are_not_alike():
    with pytest.raises(ValueError, match=r"one shape .* received \(3,\) float64"):
        beside(np.zeros(3, np.float32), np.zeros(3))
    with pytest.raises(ValueError, match="contiguous"):
        beside(np.zeros(3), np.zeros(6)[::2])
