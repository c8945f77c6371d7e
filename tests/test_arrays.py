"""Which arrays a call takes: memory that they share, the orders in which they lie, and shapes that do not fit."""

import itertools
import math
import re

import numpy as np
import pytest

import nbbn
from nbbn import Dispatcher, Options
from tests.oracle.agreement import check_step
from tests.oracle.reference import Reference

F32 = np.dtype(np.float32)


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
    "broadcast": lambda: np.lib.stride_tricks.as_strided(np.zeros(3, F32), SHAPE, (0, 0, 0, 4)),
    "unaligned": lambda: np.zeros(4 * math.prod(SHAPE) + 1, np.uint8)[1:].view(F32).reshape(SHAPE),
}


@pytest.mark.parametrize("kind", NOT_ITS_OWN)
def test_out_must_be_memory_of_its_own(kind):
    with pytest.raises(ValueError, match="out must be writable memory of its own"):
        nbbn.BatchNormalization()(np.zeros(SHAPE, F32), out=NOT_ITS_OWN[kind]())


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
    x = np.zeros(SHAPE, F32).transpose(0, 3, 1, 2)
    layer = nbbn.BatchNormalization(axis=1)
    y, pullback = layer.vjp(x, training=True)
    assert y.strides == x.strides
    assert pullback(np.zeros(x.shape, F32)).inputs.strides == x.strides


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
        moments = given.get("moments", np.ones((4, 3)))
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
