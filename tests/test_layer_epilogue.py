"""relu(bn(x) + residual): what follows the normalization, forward and backward, in every mode of the layer."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from ml_dtypes import bfloat16

import nbbn
from nbbn.compat import v1
from tests.oracle import compiled
from tests.oracle.agreement import check_step
from tests.oracle.compiled import interpreted, interpreted_unless
from tests.oracle.reference import Reference
from tests.oracle.strategies import Case, cases

DTYPES = [np.float16, bfloat16, np.float32, np.float64]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
BOTH_MODES = pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
SHAPE = (8, 5, 4, 3)


def arrays(count: int, shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(dtype) for _ in range(count)]


def layer_of(shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32, **options: Any) -> nbbn.BatchNormalization:
    """A layer with parameters of its own, of both signs."""
    layer = nbbn.BatchNormalization(**options)
    layer(np.zeros(shape, dtype))
    rng = np.random.default_rng(7)
    for name in ("gamma", "beta"):
        setattr(layer, name, rng.normal(size=getattr(layer, name).shape))
    return layer


# --- against the oracle ---------------------------------------------------------------------------

PAIR = np.linspace(0.5, 1.5, 8, dtype=np.float32).reshape(8, 1, 1, 1), np.array([0.25, -0.5, 0.0], np.float32)
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "planes": {"axis": 1},
    "axes": {"axis": [1, 3]},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 1.5, "rmin": 0.7, "dmax": 0.5}},
    "virtual": {"virtual_batch_size": 4},
    "adjustment": {"adjustment": lambda shape: PAIR},
    "frozen": {"trainable": False},
    "no parameters": {"center": False, "scale": False},
    "cumulative": {"momentum": None},
}
EPILOGUES = {"relu and residual": (True, "relu"), "relu": (False, "relu"), "residual": (True, None)}


def oracle_of(layer: nbbn.BatchNormalization, mode: str, activation: str | None) -> Reference:
    oracle = Reference(**MODES[mode], activation=activation).build(SHAPE)
    oracle.set_weights([getattr(layer, name) for name in oracle.weight_names])
    return oracle


def check_mode(mode: str, epilogue: str, mask: np.ndarray | None = None) -> None:
    with_residual, activation = EPILOGUES[epilogue]
    layer = nbbn.BatchNormalization(**MODES[mode], activation=activation)
    layer(np.zeros(SHAPE, np.float32))
    oracle = oracle_of(layer, mode, activation)
    for seed, training in enumerate([True, True, False]):
        x, dy, residual = arrays(3, seed=seed)
        check_step(layer, oracle, x, dy, mask, training, residual=residual if with_residual else None)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode):
    check_mode(mode, "relu and residual")


@pytest.mark.parametrize(
    ("epilogue", "mode"),
    [
        *((e, m) for e in ("relu", "residual") for m in ("plain", "planes", "frozen")),
        *interpreted(("relu", "adjustment")),
    ],
)
def test_relu_or_residual_alone(epilogue, mode):
    check_mode(mode, epilogue)


@pytest.mark.parametrize("mode", ["plain", "virtual", *interpreted("renorm")])
def test_with_a_mask(mode):
    mask = np.random.default_rng(3).random(SHAPE[:3]) < 0.75
    check_mode(mode, "relu and residual", mask)


@given(case=cases(compiled.DTYPES, epilogue=True))
@settings(
    deadline=None, derandomize=True, database=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow]
)
def test_random_layouts_options_and_strides(case: Case):
    layer = nbbn.BatchNormalization(**case.options, adjustment=case.adjustment())
    layer(np.zeros(case.shape, case.dtype))
    oracle = case.reference()
    weights = case.weights(oracle)
    layer.set_weights(weights)
    oracle.set_weights(weights)
    for step, training in enumerate([True, True, None]):
        x, dy, mask = case.batch(step)
        residual = case.residual(step)
        inputs = [a for a in (x, dy, mask, residual) if a is not None]
        before = [np.ascontiguousarray(a).tobytes() for a in inputs]
        check_step(layer, oracle, x, dy, mask, training, residual=residual)
        assert [np.ascontiguousarray(a).tobytes() for a in inputs] == before, "an input was modified"


# --- relu ------------------------------------------------------------------------------------------


@EVERY_DTYPE
def test_relu_of_what_is_not_finite_and_of_zeros(dtype):
    """At inference with mean 0 and variance 1 the output is x: NaN stays NaN, no zero has a sign."""
    x = np.array([[np.nan, np.inf, -np.inf, -0.0, 0.0, -2.0, 2.0]], dtype).T.repeat(3, 1)
    layer = nbbn.BatchNormalization(epsilon=0.0, activation="relu")
    y = layer(x, residual=np.zeros_like(x))
    expected = np.array([np.nan, np.inf, 0, 0, 0, 0, 2])
    np.testing.assert_array_equal(y.astype(np.float64), np.stack([expected] * 3, 1))
    assert not np.signbit(y[1:]).any()


@pytest.mark.parametrize(
    ("axis", "dtype"),
    [(0, np.float32), (1, np.float32), *interpreted((1, np.float16), (1, bfloat16), (1, np.float64))],
    ids=lambda v: {0: "planes", 1: "rows"}[v] if isinstance(v, int) else np.dtype(v).name,
)
def test_the_gradient_of_inference_where_the_input_is_infinite(dtype, axis):
    """It is dy times a constant, wherever the relu lets dy through."""
    x = np.array([[np.inf, -np.inf, 2.0, -2.0]], dtype).repeat(3, 0)
    layer = nbbn.BatchNormalization(axis=axis, epsilon=0.0, activation="relu")
    _, pullback = layer.vjp(x)
    expected = np.array([[2, 0, 2, 0]], dtype).repeat(3, 0)
    np.testing.assert_array_equal(pullback(np.full_like(x, 2)).inputs, expected)


@pytest.mark.parametrize("training", [False, True])
def test_nan_of_the_residual_stays_where_it_is(training):
    x, residual, dy = arrays(3, (9, 3))
    layer = layer_of((9, 3), activation="relu")
    clean = layer(x, training=training, residual=residual, update_statistics=False)
    residual[4, 1] = np.nan
    y, pullback = layer.vjp(x, training=training, residual=residual, update_statistics=False)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(residual))
    np.testing.assert_array_equal(np.delete(y, 4, 0), np.delete(clean, 4, 0))
    assert pullback(dy).residual[4, 1] == dy[4, 1]


def gate_of(pullback: Any, like: np.ndarray) -> np.ndarray:
    """Where a gradient of ones comes through, of all the loops that decide about it."""
    ones = np.ones_like(like)
    gradients = pullback(ones)
    gate = gradients.residual.astype(np.float64)
    assert set(np.unique(gate)) <= {0.0, 1.0}
    counts = gate.reshape(-1, gate.shape[-1]).sum(0)
    np.testing.assert_array_equal(gradients.beta, counts, err_msg="the sums had another gate")
    return gate == 1


@pytest.mark.parametrize(
    ("dtype", "training"),
    [
        *((np.float32, training) for training in (False, True)),
        *((np.float64, False), (np.float16, True), (bfloat16, False)),
        *interpreted((np.float64, True), (np.float16, False), (bfloat16, True)),
    ],
    ids=lambda v: ["infer", "train"][v] if isinstance(v, bool) else np.dtype(v).name,
)
def test_the_gate_is_that_of_the_forward_pass(dtype, training):
    """To the last bit: x and beta have few digits, so that many sums are 0 or nearly so."""
    rng = np.random.default_rng(0)
    x = (rng.integers(-4, 5, (512, 16)) / 4).astype(dtype)
    layer = nbbn.BatchNormalization(activation="relu")
    layer(x, training=True, residual=np.zeros_like(x))
    layer.gamma = rng.choice([-1.0, 1.0, 0.3], 16)
    plain = nbbn.BatchNormalization()
    plain(x)
    plain.set_weights([layer.gamma, np.zeros(16), *layer.get_weights()[2:]])
    for row in range(9):
        # A beta that takes one row's values to 0, or to the next number beside it.
        layer.beta = np.nextafter(
            -plain(x, training=training, update_statistics=False)[row].astype(layer.gamma.dtype), row % 3 - 1.0
        )
        y, pullback = layer.vjp(x, training=training, residual=np.zeros_like(x), update_statistics=False)
        found = gate_of(pullback, x)
        if np.dtype(dtype).itemsize > 2:
            np.testing.assert_array_equal(found, y > 0)
        else:  # a positive output may be rounded to 0
            assert found[y.astype(np.float32) > 0].all()
        assert 0 < found.sum() < found.size


@BOTH_MODES
def test_an_output_of_exactly_zero_lets_nothing_through(training):
    """A fused multiplication and addition would not find a zero where two roundings find one, nor the other way."""
    x = arrays(1, (64, 16))[0]
    layer = nbbn.BatchNormalization(activation="relu")
    layer(x, training=True)
    layer.gamma = np.linspace(0.1, 3.0, 16)
    plain = nbbn.BatchNormalization(center=False)
    plain(x)
    plain.set_weights([layer.gamma, *layer.get_weights()[2:]])
    values = plain(x, training=training, update_statistics=False)
    zeros = 0
    for row in range(64):
        layer.beta = -values[row]
        y, pullback = layer.vjp(x, training=training, residual=np.zeros_like(x), update_statistics=False)
        found = gate_of(pullback, x)
        np.testing.assert_array_equal(found, y > 0)
        zeros += (y[row] == 0).sum()
    assert zeros == values.size if not training else zeros > values.size / 4


@pytest.mark.parametrize("dtype", [np.float16, bfloat16], ids=["float16", "bfloat16"])
@BOTH_MODES
def test_the_gate_is_taken_before_the_rounding_to_16_bits(dtype, training):
    """Outputs far below the dtype's smallest number: all are 0, and half of them let the gradient through."""
    x = arrays(1, (64, 3), dtype)[0]
    layer = nbbn.BatchNormalization(activation="relu", gamma_initializer=nbbn.initializers.Constant(1e-44))
    y, pullback = layer.vjp(x, training=training, residual=np.zeros_like(x))
    np.testing.assert_array_equal(y.astype(np.float32), np.zeros(x.shape))
    wide = nbbn.BatchNormalization(activation="relu", gamma_initializer=nbbn.initializers.Constant(1e-44))
    exact = wide(x.astype(np.float32), training=training)
    found = gate_of(pullback, x)
    np.testing.assert_array_equal(found, exact > 0)
    assert 0 < found.sum() < found.size


# --- the gradient of the residual -----------------------------------------------------------------------


@BOTH_MODES
@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_gradient_of_the_residual_is_an_array_of_its_own(activation, training):
    x, dy, residual = arrays(3)
    layer = layer_of(activation=activation)
    y, pullback = layer.vjp(x, training=training, residual=residual)
    found = pullback(dy)
    expected = dy if activation is None else np.where(y > 0, dy, np.float32(0))
    np.testing.assert_array_equal(found.residual, expected, strict=True)
    assert not any(np.may_share_memory(found.residual, a) for a in (dy, x, residual, y, found.inputs))
    again = pullback(dy)
    found.residual[...] = 77
    np.testing.assert_array_equal(again.residual, expected)


@BOTH_MODES
def test_without_a_residual_there_is_no_gradient_of_it(training):
    x, dy = arrays(2)
    for options in ({}, {"activation": "relu"}, {"adjustment": lambda shape: PAIR}):
        _, pullback = layer_of(**options).vjp(x, training=training)
        assert pullback(dy).residual is None


def test_a_pullback_is_that_of_its_call():
    """The gate, too: parameters that change afterwards open nothing."""
    x, dy, residual = arrays(3)
    layer = layer_of(activation="relu")
    for training in (False, True):
        _, pullback = layer.vjp(x, training=training, residual=residual)
        expected = pullback(dy)
        layer.gamma *= -1
        layer.beta += 5
        layer(x + 3, training=True)
        for one, two in zip(pullback(dy), expected, strict=True):
            np.testing.assert_array_equal(one, two) if one is not None else None


# --- memory ---------------------------------------------------------------------------------------------

OUT_OPTIONS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "adjustment": {"adjustment": lambda shape: PAIR},
    "relu and adjustment": {"activation": "relu", "adjustment": lambda shape: PAIR},
}


def flat(gradients: nbbn.Gradients) -> list[np.ndarray]:
    found = [*gradients[:3], *(gradients.adjustment or ()), gradients.residual]
    return [a for a in found if a is not None]


@BOTH_MODES
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("options", OUT_OPTIONS.values(), ids=OUT_OPTIONS)
@pytest.mark.parametrize("where", ["elsewhere", "dy", "beside dy", "dy reversed"])
def test_out_of_a_pullback(options, with_residual, training, where):
    """It takes the gradient of the input; all others are what they are without it."""
    interpreted_unless(with_residual == ("activation" in options) and ("adjustment" not in options or where == "dy"))
    x, dy, residual = arrays(3)
    layer = layer_of(**options)
    _, pullback = layer.vjp(x, training=training, residual=residual if with_residual else None)
    expected = flat(pullback(dy))
    block = np.zeros(2 * dy.size, np.float32)
    given = block[: dy.size].reshape(SHAPE)
    given[...] = dy
    out = {
        "elsewhere": np.empty_like(dy),
        "dy": given,
        "beside dy": block[7 : dy.size + 7].reshape(SHAPE),
        "dy reversed": given[::-1],
    }[where]
    found = pullback(given, out=out)
    assert found.inputs is out
    for one, two in zip(flat(found), expected, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("which", ["x", "residual"])
def test_out_of_a_pullback_must_not_be_what_the_next_call_reads(which):
    x, dy, residual = arrays(3)
    _, pullback = layer_of().vjp(x, training=True, residual=residual)
    expected = pullback(dy)
    for out in ({"x": x, "residual": residual}[which], {"x": x, "residual": residual}[which][::-1]):
        with pytest.raises(ValueError, match="out must not share memory with the input or the residual"):
            pullback(dy, out=out)
    np.testing.assert_array_equal(pullback(dy).inputs, expected.inputs)


BAD_OUTS = [
    (np.zeros((8, 5, 4, 2), np.float32), ValueError, ("(8, 5, 4, 2)", str(SHAPE))),
    (np.zeros(SHAPE, np.float64), ValueError, ("float64", "float32")),
    (np.broadcast_to(np.float32(0), SHAPE), ValueError, ("read-only",)),
    ([0.0], TypeError, ("list", "array")),
]


@pytest.mark.parametrize(("out", "error", "fragments"), BAD_OUTS, ids=range(len(BAD_OUTS)))
def test_out_of_a_pullback_that_cannot_be(out, error, fragments):
    x, dy = arrays(2)
    _, pullback = layer_of().vjp(x, training=True)
    with pytest.raises(error, match="out") as caught:
        pullback(dy, out=out)
    for fragment in fragments:
        assert fragment in str(caught.value)


@BOTH_MODES
@pytest.mark.parametrize("axis", [1, -1], ids=["planes", "rows"])
def test_out_may_be_the_input_or_the_residual(axis, training):
    x, residual = arrays(2)
    layer = layer_of(axis=axis, activation="relu")

    def call(x, residual, out=None):
        return layer(x, training=training, residual=residual, out=out, update_statistics=False)

    expected = call(x, residual)
    for name in ("x", "residual"):
        given = {"x": x.copy(), "residual": residual.copy()}
        assert call(**given, out=given[name]) is given[name]
        np.testing.assert_array_equal(given[name], expected)
    # The residual's memory, but not its elements: as if it had been read before anything was written.
    block = np.concatenate([residual.ravel(), np.zeros(100, np.float32)])
    given, out = block[: x.size].reshape(SHAPE), block[33 : x.size + 33].reshape(SHAPE)
    np.testing.assert_array_equal(call(x, given, out), expected)
    reversed_residual = residual.copy()
    np.testing.assert_array_equal(call(x, reversed_residual, reversed_residual[::-1]), expected)


@BOTH_MODES
def test_the_input_may_be_the_residual(training):
    (x,) = arrays(1)
    layer = layer_of(activation="relu")
    expected, pullback = layer.vjp(x, training=training, residual=x.copy(), update_statistics=False)
    y, same = layer.vjp(x, training=training, residual=x, update_statistics=False)
    np.testing.assert_array_equal(y, expected)
    for one, two in zip(flat(same(y)), flat(pullback(y)), strict=True):
        np.testing.assert_array_equal(one, two)
    one = x.copy()
    layer(one, training=training, residual=one, out=one, update_statistics=False)
    np.testing.assert_array_equal(one, expected)


@pytest.mark.parametrize("given", ["out is the residual", "out overlaps the residual"])
def test_vjp_refuses_an_out_that_shares_memory_with_the_residual(given):
    x, residual = arrays(2)
    out = residual if given == "out is the residual" else residual[::-1]
    layer = layer_of()
    before = layer.get_weights()
    with pytest.raises(ValueError, match=r"out must not share memory with inputs or residual in vjp\(\)"):
        layer.vjp(x, training=True, residual=residual, out=out)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


# --- what a residual may be, and who takes one ---------------------------------------------------------------


@BOTH_MODES
def test_a_residual_of_another_dtype_is_cast(training):
    x, residual, dy = arrays(3)
    layer = layer_of(activation="relu")
    expected = layer(x, training=training, residual=residual, update_statistics=False)
    for other in (residual.astype(np.float64), residual.tolist(), residual.astype(">f4")):
        y, pullback = layer.vjp(x, training=training, residual=other, update_statistics=False)
        np.testing.assert_array_equal(y, expected, strict=True)
        np.testing.assert_array_equal(pullback(dy).residual, np.where(y > 0, dy, 0))


@BOTH_MODES
@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (8, 0, 4, 3)])
def test_an_empty_input(shape, training):
    layer = layer_of(activation="relu")
    empty = np.empty(shape, np.float32)
    y, pullback = layer.vjp(empty, training=training, residual=empty)
    gradients = pullback(empty)
    assert y.shape == gradients.inputs.shape == gradients.residual.shape == shape
    np.testing.assert_array_equal(gradients.beta, np.zeros(3))


@pytest.mark.parametrize("make", [v1.keras.layers.BatchNormalization, v1.layers.BatchNormalization])
def test_the_layers_of_tensorflow_1_take_both(make):
    """Batch statistics in training, whose updates wait; the same element-wise end."""
    x, residual, dy = arrays(3)
    layer, twin = make(activation="relu", momentum=0.5), nbbn.BatchNormalization(activation="relu", momentum=0.5)
    y, pullback = layer.vjp(x, training=True, residual=residual)
    expected, twin_pullback = twin.vjp(x, training=True, residual=residual)
    np.testing.assert_array_equal(y, expected)
    for one, two in zip(flat(pullback(dy)), flat(twin_pullback(dy)), strict=True):
        np.testing.assert_array_equal(one, two)
    assert len(layer.updates) == 2
    for update in layer.updates:
        update.run()
    np.testing.assert_allclose(layer.moving_mean, twin.moving_mean, rtol=1e-6)
    np.testing.assert_array_equal(layer(x, residual=residual) >= 0, True)


def test_copies_keep_the_activation():
    layer = layer_of(activation="relu")
    (x,) = arrays(1)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        nbbn.BatchNormalization.from_config(layer.get_config()),
    ):
        assert twin.activation == "relu"
        twin(x)
        twin.set_weights(layer.get_weights())
        np.testing.assert_array_equal(twin(x), layer(x))
        assert (twin(x) >= 0).all()


def test_the_activation_is_fixed():
    with pytest.raises(AttributeError):
        layer_of(activation="relu").activation = None
