"""Which arrays take the short way, beside which masks: in whatever order they lie, with the bits of the general way."""

import numpy as np
import pytest

import nbbn
from nbbn import BatchNormalization, Dispatcher
from nbbn.core import dtypes
from nbbn.runtime import PLAIN
from tests.helpers.engines import forgetful, watch
from tests.helpers.twins import assert_same_bits, check_gradients, twin_of
from tests.oracle.strategies import arrange

RNG = np.random.default_rng(5)
X = RNG.standard_normal((12, 6)).astype(np.float32)
X2 = RNG.standard_normal((12, 6)).astype(np.float32)


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


def test_planning_needs_no_memory():
    """A step is bound when the state has moved: a call that fails there could not be made again."""
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
