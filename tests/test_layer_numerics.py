"""Data that breaks careless arithmetic: large means, NaN, overflow, single values, nothing at all."""

from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16, finfo

import nbbn
from tests.oracle.agreement import check_step
from tests.oracle.compiled import interpreted, interpreted_unless
from tests.oracle.reference import Reference

PLANES = ((8, 3, 5, 4), 1)
ROWS = ((8, 5, 4, 3), -1)
DENSE = ((96, 3), -1)
LAYOUTS = pytest.mark.parametrize(("shape", "axis"), [PLANES, ROWS, DENSE], ids=["planes", "rows", "dense"])

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {},
    "virtual": {"virtual_batch_size": 4},
    "adjusted": {"adjustment": lambda shape: (np.float32(0.75), np.float32(-0.5))},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0}},
    "virtual renorm": {"virtual_batch_size": 4, "renorm": True},
}
ALL_MODES = pytest.mark.parametrize("mode", MODES)


def pair(x: np.ndarray, axis: int | list[int], **options: Any) -> tuple[nbbn.BatchNormalization, Reference]:
    """A built layer and the oracle, both at their initial state."""
    layer = nbbn.BatchNormalization(axis=axis, **options)
    layer(np.zeros_like(x))
    return layer, Reference(axis=axis, **options, dtype=x.dtype.name).build(x.shape)


def mask_for(mode: str, shape: tuple[int, ...], axis: int, rng: np.random.Generator) -> np.ndarray | None:
    """Seven of eight elements in the "masked" mode, for the dimensions that are not features."""
    plain = tuple(np.delete(shape, axis))
    return rng.random(plain) < 7 / 8 if mode == "masked" else None


def channel(axis: int, index: int) -> tuple[Any, ...]:
    """The index expression of one channel."""
    return (..., index) if axis == -1 else (slice(None), index)


# --- large means ------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4, 1e5, 1e6])
@ALL_MODES
@LAYOUTS
def test_large_mean(shape, axis, mode, ratio):
    """The same float32 data for both sides: at |mean| / std = 1e6 a deviation is 11 steps of float32.

    y is bounded by roundings of what x - mean leaves, not of x: `agreement` allows no more at 1e6 than at 1.
    """
    rng = np.random.default_rng(1)
    mean = np.expand_dims(0.7 * ratio * np.array([1, -1, 1]), [i for i in range(len(shape)) if shape[i] != 3])
    x = (mean + 0.7 * rng.normal(size=shape)).astype(np.float32)
    dy = rng.normal(size=shape).astype(np.float32)
    mask = mask_for(mode, shape, axis, rng)
    options = {"momentum": 0, "renorm_momentum": 0, "bessel_correction": False, **MODES[mode]}
    layer, oracle = pair(x, axis, **options)
    step = check_step(layer, oracle, x, dy, mask, training=True)
    variance = oracle._group_average(step.W, step.var).reshape(oracle.parameter_shape)
    assert np.all(np.abs(step.mean / np.sqrt(step.var)) > 0.5 * ratio)
    # Renorm stores the variance through its square root and epsilon: a few roundings of float32.
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-5)
    check_step(layer, oracle, x, dy, training=False)


@LAYOUTS
def test_large_mean_of_opposite_first_value(shape, axis):
    """An outlier as the very first value of each statistic must not set the scale of the sums for good."""
    rng = np.random.default_rng(2)
    x = (1000 + rng.normal(size=shape)).astype(np.float32)
    np.moveaxis(x, axis, -1).reshape(-1, 3)[0] = -1e4
    x[tuple([0] * len(shape))] = 3e4
    layer, oracle = pair(x, axis, momentum=0)
    check_step(layer, oracle, x, rng.normal(size=shape).astype(np.float32), training=True)


# --- NaN and infinity -------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["first", "last"])
@ALL_MODES
@LAYOUTS
def test_what_is_not_finite_stays_in_its_channel(shape, axis, mode, where, poison):
    """Every other channel has the same bits as without it, forward, state and backward."""
    rng = np.random.default_rng(3)
    clean, dy = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    mask = mask_for(mode, shape, axis, rng)
    if mask is not None:
        mask.flat[[0, -1]] = True
    poisoned = clean.copy()
    view = np.moveaxis(poisoned, axis, -1)
    view[tuple([0 if where == "first" else -1] * (len(shape) - 1))][1] = poison
    results = []
    for x in (clean, poisoned):
        layer, _ = pair(x, axis, **MODES[mode])
        with np.errstate(all="ignore"):
            y, pullback = layer.vjp(x, training=True, mask=mask)
            grads = pullback(dy)
        parameters = [np.ravel(v) for v in (*layer.get_weights(), grads.gamma, grads.beta)]
        results.append(([y, grads.inputs], parameters))
    (elements, parameters), (elements_poisoned, parameters_poisoned) = results
    for one, two in zip(elements, elements_poisoned, strict=True):
        for index in (0, 2):
            np.testing.assert_array_equal(one[channel(axis, index)], two[channel(axis, index)])
        assert not np.isfinite(two[channel(axis, 1)]).all()
    for one, two in zip(parameters, parameters_poisoned, strict=True):
        np.testing.assert_array_equal(one[[0, 2]], two[[0, 2]])
    assert not any(np.isfinite(state[1]) for state in parameters_poisoned[2:-2])
    assert not np.isfinite(parameters_poisoned[-2][1])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("training", [True, False])
@LAYOUTS
def test_a_gradient_that_is_not_finite_stays_in_its_channel(shape, axis, training, poison):
    rng = np.random.default_rng(4)
    x, dy = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    _, pullback = pair(x, axis)[0].vjp(x, training=training)
    clean = pullback(dy)
    np.moveaxis(dy, axis, -1)[tuple([1] * (len(shape) - 1))][1] = poison
    poisoned = pullback(dy)
    for index in (0, 2):
        one, two = clean.inputs[channel(axis, index)], poisoned.inputs[channel(axis, index)]
        np.testing.assert_array_equal(one, two)
    assert not np.isfinite(poisoned.inputs[channel(axis, 1)]).all()
    for one, two in [(clean.gamma, poisoned.gamma), (clean.beta, poisoned.beta)]:
        np.testing.assert_array_equal(one[[0, 2]], two[[0, 2]])
        assert not np.isfinite(two[1])


def test_nan_in_one_virtual_batch_leaves_the_outputs_of_the_others():
    x = np.random.default_rng(5).normal(size=(6, 3)).astype(np.float32)
    clean = nbbn.BatchNormalization(virtual_batch_size=2)(x, training=True)
    x[1, 0] = np.nan  # group 1 of 3: samples 1 and 4
    y = nbbn.BatchNormalization(virtual_batch_size=2)(x, training=True)
    others = [0, 2, 3, 5]
    np.testing.assert_array_equal(y[others], clean[others])
    assert np.isnan(y[[1, 4], 0]).all()


@LAYOUTS
def test_masked_elements_may_be_nan(shape, axis):
    """What does not count reaches no statistic, and no other element's output."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=shape).astype(np.float32)
    mask = rng.random(tuple(np.delete(shape, axis))) < 0.75
    results = []
    for fill in (0.0, np.nan):
        np.moveaxis(x, axis, -1)[~mask] = fill
        layer, _ = pair(x, axis)
        y = layer(x, training=True, mask=mask)
        results.append([np.moveaxis(y, axis, -1)[mask], *layer.get_weights()])
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)
        assert np.isfinite(one).all()


@LAYOUTS
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"trainable": False}], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_masked_elements_may_be_nan_where_statistics_are_constants(shape, axis, options, bad):
    """The gradients of gamma and beta are those of the others, where no gradient comes from what does not count."""
    rng = np.random.default_rng(6)
    x, dy = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    mask = rng.random(tuple(np.delete(shape, axis))) < 0.75
    np.moveaxis(dy, axis, -1)[~mask] = 0
    results = []
    for fill in (0.0, bad):
        np.moveaxis(x, axis, -1)[~mask] = fill
        layer = nbbn.BatchNormalization(axis=axis, **options)
        y, pullback = layer.vjp(x, training=layer.trainable is False, mask=mask)
        np.testing.assert_array_equal(y, layer(x, mask=mask))
        found = pullback(dy)
        results.append([np.moveaxis(found.inputs, axis, -1), found.gamma, found.beta])
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)
        assert np.isfinite(one).all()


# --- one value per statistic ------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 3), {}),
        ((1, 3, 1, 1), {"axis": 1}),
        ((1, 1, 1, 3), {"axis": -1}),
        ((1, 3), {"bessel_correction": True}),
        ((1, 3), {"momentum": None}),
        ((4, 3), {"virtual_batch_size": 1}),
        ((4, 3), {"virtual_batch_size": 1, "bessel_correction": True}),
        ((2, 3), {"axis": [0, 1]}),
    ],
    ids=str,
)
def test_one_value(shape, options):
    """Variance 0, y = beta exactly, and a finite state."""
    rng = np.random.default_rng(7)
    x, dy = (rng.normal(5, 2, shape).astype(np.float32) for _ in range(2))
    layer, oracle = pair(x, **{"axis": -1, "momentum": 0, **options})
    layer.beta[...] = 0.3
    oracle.beta[...] = np.float32(0.3)
    y = layer(x, training=True, update_statistics=False)
    np.testing.assert_array_equal(y, np.full(shape, 0.3, np.float32))
    check_step(layer, oracle, x, dy, training=True)
    np.testing.assert_array_equal(layer.moving_variance, np.zeros_like(layer.moving_variance))
    assert all(np.isfinite(w).all() for w in layer.get_weights())


def test_one_value_with_renorm():
    x = np.array([[3.0, -2.0]], np.float32)
    layer, oracle = pair(x, -1, renorm=True)
    for _ in range(3):
        check_step(layer, oracle, x, np.ones_like(x), training=True)
    assert all(np.isfinite(w).all() for w in layer.get_weights())


@pytest.mark.parametrize("total", [0.25, 0.75, 1.0, 1.5, 2.0, 2.5])
def test_unbiased_variance_of_few_weights(total):
    """W / (W - sum w^2 / W), whatever the sum W of the weights is: 1.6 for a quarter and three quarters of it."""
    rng = np.random.default_rng(16)
    x, dy = (rng.normal(size=(2, 3)).astype(np.float32) for _ in range(2))
    layer, oracle = pair(x, -1, momentum=0, bessel_correction=True)
    check_step(layer, oracle, x, dy, np.array([total / 4, 3 * total / 4], np.float32), training=True)


# --- momentum ---------------------------------------------------------------


def test_momentum_zero_copies_the_batch_whatever_the_state_was():
    x = np.random.default_rng(17).normal(size=(8, 3)).astype(np.float32)
    fresh, spoilt = (pair(x, -1, momentum=0)[0] for _ in range(2))
    spoilt.moving_mean = np.array([np.nan, np.inf, 1e30], np.float32)
    for layer in (fresh, spoilt):
        layer(x, training=True)
    np.testing.assert_array_equal(spoilt.moving_mean, fresh.moving_mean)


@pytest.mark.parametrize("renorm", [False, True])
def test_momentum_one_keeps_the_state_whatever_the_batch_is(renorm):
    """With renorm moving_variance is none of the averages: it is made of moving_stddev at each step."""
    x = np.array([[np.nan, np.inf, 1e30]] * 2, np.float32)
    layer, _ = pair(x, -1, momentum=1, renorm=renorm, renorm_momentum=1)
    names = ["moving_stddev", "renorm_mean", "renorm_stddev"] if renorm else ["moving_variance"]
    before = {name: getattr(layer, name).copy() for name in ["moving_mean", *names]}
    layer(x, training=True)
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(layer, name), value)


# --- range ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, bfloat16], ids=["float16", "bfloat16"])
@LAYOUTS
def test_variance_beyond_float16(shape, axis, dtype):
    """A deviation of 1000 squares to 1e6, and 96 values near 3e4 sum to 3e6: float16 ends at 65504."""
    rng = np.random.default_rng(8)
    x, dy = (3e4 + 1e3 * rng.normal(size=shape)).astype(dtype), rng.normal(size=shape).astype(dtype)
    layer, oracle = pair(x, axis, momentum=0)
    check_step(layer, oracle, x, dy, training=True)
    assert np.all(layer.moving_variance > 65504)
    assert np.isfinite(layer.moving_variance).all()
    check_step(layer, oracle, x, dy, training=False)


@pytest.mark.parametrize("size", [1e30, 1e18, 1e-18, 1e-30])
@ALL_MODES
@LAYOUTS
def test_huge_and_tiny_values(shape, axis, mode, size):
    """y and the gradients are ordinary numbers; a variance beyond float32 is stored as its largest number, from which
    ordinary batches bring it back."""
    rng = np.random.default_rng(9)
    x, dy = (size * rng.normal(size=shape)).astype(np.float32), rng.normal(size=shape).astype(np.float32)
    mask = mask_for(mode, shape, axis, rng)
    layer, oracle = pair(x, axis, momentum=0.25, renorm_momentum=0.25, **MODES[mode])
    check_step(layer, oracle, x, dy, mask, training=True)
    for _ in range(120):  # 0.25 ** 120 is 6e-73
        layer(dy, training=True, mask=mask)
    for name in layer._variables.rows:
        assert (np.abs(getattr(layer, name)) < 3).all(), name


@LAYOUTS
def test_differences_beyond_float32(shape, axis):
    """x - mean would be infinite: 3e38 - (-1.8e38).

    The slope of the gradient is subnormal, near 1e-40, where float32 has 16 bits and not 24.
    """
    rng = np.random.default_rng(20)
    x = np.where(rng.random(shape) < 0.2, 3e38, -3e38).astype(np.float32)
    dy = rng.normal(size=shape).astype(np.float32)
    layer, oracle = pair(x, axis)
    layer.gamma *= np.float32(1e30)  # or the gradient of x would be too small for float32
    oracle.set_weights(layer.get_weights())
    step = oracle(x, training=True)
    y, pullback = layer.vjp(x, training=True)
    found, expected = pullback(dy), step.gradients(dy)
    for one, two, rtol in (
        (y, step.y, 1e-6),
        (found.gamma, expected.gamma, 1e-6),
        (found.inputs, expected.inputs, 1e-4),
    ):
        np.testing.assert_allclose(one, two, rtol=0, atol=rtol * np.abs(two).max())


@pytest.mark.parametrize("size", [1e30, 1e-30])
@LAYOUTS
def test_huge_and_tiny_gradients(shape, axis, size):
    rng = np.random.default_rng(10)
    x, dy = rng.normal(size=shape).astype(np.float32), (size * rng.normal(size=shape)).astype(np.float32)
    layer, oracle = pair(x, axis)
    check_step(layer, oracle, x, dy, training=True)
    check_step(layer, oracle, x, dy, training=False)


@LAYOUTS
def test_subnormal_float16_is_kept(shape, axis):
    """Inputs below 6.1e-5 are subnormal in float16; a variance floor of 1e-12 makes them ordinary outputs."""
    rng = np.random.default_rng(11)
    x, dy = ((1e-5 * rng.normal(size=shape)).astype(np.float16) for _ in range(2))
    layer, oracle = pair(x, axis, epsilon=1e-12, momentum=0)
    check_step(layer, oracle, x, dy, training=True)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("axis", [0, -1], ids=["planes", "rows"])
def test_sixteen_bit_results_are_rounded_to_the_nearest_even(axis, dtype):
    """x + beta is exact in float32, and half of the sums lie between two neighbours of the dtype."""
    ulp = float(finfo(dtype).eps)
    x = (1 + ulp * np.arange(64)).astype(dtype)[None].repeat(2, 0)
    layer = nbbn.BatchNormalization(axis=axis, epsilon=0.0, beta_initializer="ones")
    layer(x)
    layer.beta *= ulp / 2
    y = layer(x)
    expected = (x.astype(np.float32) + np.float32(ulp / 2)).astype(dtype)
    np.testing.assert_array_equal(y.view(np.uint16), expected.view(np.uint16))


# --- nothing to reduce ------------------------------------------------------


# No kernel sees an empty batch: the state depends on mode and momentum alone, the results' dtype on the input's.
EMPTY = [
    *((mode, momentum, np.float32) for mode in MODES for momentum in (0.5, None)),
    *(("plain", 0.5, dtype) for dtype in (np.float16, bfloat16, np.float64)),
]


@pytest.mark.parametrize(("mode", "momentum", "dtype"), EMPTY, ids=lambda v: v if isinstance(v, str) else None)
@pytest.mark.parametrize("shape", [(0, 5, 3), (8, 0, 3)])
def test_empty_batch_leaves_the_state_alone(shape, mode, momentum, dtype):
    options = {**MODES[mode], "momentum": momentum}
    x = np.random.default_rng(12).normal(2, 3, (8, 5, 3)).astype(dtype)
    layer = nbbn.BatchNormalization(**options)
    twin = nbbn.BatchNormalization(**options)
    for one in (layer, twin):
        one(x, training=True)
    before = layer.get_weights()
    empty = np.empty(shape, dtype)
    mask = np.empty(shape[:2], bool) if mode == "masked" else None
    y, pullback = layer.vjp(empty, training=True, mask=mask)
    assert (y.shape, y.dtype) == (shape, dtype)
    grads = pullback(empty)
    assert (grads.inputs.shape, grads.inputs.dtype) == (shape, dtype)
    np.testing.assert_array_equal(grads.gamma, np.zeros_like(layer.gamma))
    np.testing.assert_array_equal(grads.beta, np.zeros_like(layer.beta))
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert layer(empty).shape == shape
    # It does not count as a step of a cumulative average either.
    again = x[::-1].copy()
    layer(again, training=True)
    twin(again, training=True)
    for one, two in zip(layer.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("mode", ["plain", "virtual", "renorm", "virtual renorm", "adjusted"])
@LAYOUTS
def test_statistic_without_a_valid_element_keeps_its_state(shape, axis, mode):
    interpreted_unless(mode in ("plain", "virtual") or (mode == "renorm") == (axis == 1))
    rng = np.random.default_rng(13)
    x = rng.normal(2, 3, shape).astype(np.float32)
    layer, _ = pair(x, axis, **MODES[mode])
    layer(x, training=True)
    before = [np.ravel(w) for w in layer.get_weights()]
    mask = np.ones(shape, bool)
    mask[channel(axis, 1)] = False
    y, pullback = layer.vjp(x * 2, training=True, mask=mask)
    after = [np.ravel(w) for w in layer.get_weights()]
    for old, new in zip(before[2:], after[2:], strict=True):
        assert (old != new).tolist() == [True, False, True]
    assert np.isfinite(y).all()
    assert np.isfinite(pullback(np.ones_like(x)).inputs).all()
    layer(x, training=True, mask=np.zeros(tuple(np.delete(shape, axis)), bool))
    for old, new in zip(after, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, np.ravel(new))


def test_virtual_batch_without_a_valid_element_is_left_out_of_the_average():
    x = np.random.default_rng(14).normal(2, 3, (6, 3)).astype(np.float32)
    mask = np.array([True, False, True, True, False, True])  # group 1 of 3 has nothing
    layer = nbbn.BatchNormalization(virtual_batch_size=2, momentum=0)
    layer(x, training=True, mask=mask)
    means = [x[[0, 3]].mean(0), x[[2, 5]].mean(0)]
    # Two float32 means and their average: a few roundings of numbers up to 8.
    np.testing.assert_allclose(layer.moving_mean.ravel(), np.mean(means, axis=0), rtol=1e-6, atol=1e-6)


# --- weights, masks and the state ---------------------------------------------


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e6])
def test_the_scale_of_weights_means_nothing(scale):
    """Also to Bessel's factor: frequencies are counted, reliabilities are not."""
    rng = np.random.default_rng(21)
    x, mask = rng.normal(size=(40, 3)), rng.integers(0, 4, (40, 1)).astype(float)
    layers = [nbbn.BatchNormalization(momentum=0, bessel_correction=True) for _ in range(2)]
    for layer, weights in zip(layers, (mask, mask * scale), strict=True):
        layer(x, training=True, mask=weights)
    np.testing.assert_allclose(layers[1].moving_variance, layers[0].moving_variance, rtol=1e-13)
    equal = nbbn.BatchNormalization(momentum=0, bessel_correction=True)
    equal(x, training=True, mask=np.full((40, 1), scale))
    np.testing.assert_allclose(equal.moving_variance, x.var(0, ddof=1), rtol=1e-13)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
def test_gradients_of_an_adjustment_beside_what_a_mask_excludes(spoilt):
    rng = np.random.default_rng(22)
    x, dy = rng.normal(size=(2, 6, 3))
    mask = np.array([True, True, False, True, True, True])
    layer = nbbn.BatchNormalization(adjustment=lambda shape: (np.full(shape, 1.5), np.full((1, 3), 0.5)))
    dy[~mask] = 0
    expected = layer.vjp(x, training=True, mask=mask)[1](dy)
    x[~mask] = spoilt
    found = layer.vjp(x, training=True, mask=mask)[1](dy)
    for one, two in zip(found.adjustment, expected.adjustment, strict=True):
        np.testing.assert_array_equal(one, two)


def test_an_input_of_another_dtype_rounds_no_state():
    layer = nbbn.BatchNormalization(momentum=1.0)
    layer(np.zeros((2, 3)))
    values = [np.ones(3), np.zeros(3), np.array([0.1, -1e-300, 1e200]), np.array([1e300, 1 / 3, 0.0])]
    layer.set_weights(values)
    for dtype in (np.float16, *interpreted(np.float32, bfloat16)):
        x = np.ones((4, 3), dtype)
        for _ in range(3):  # the third takes a bound step, where there is one
            layer(x, training=True)
            layer(x)
        for found, value in zip(layer.get_weights(), values, strict=True):
            np.testing.assert_array_equal(found, value, strict=True)


def test_statistics_beyond_the_dtype_of_an_input():
    """A float64 layer normalizes float32 values with means and variances that float32 does not have."""
    layer = nbbn.BatchNormalization(epsilon=0.0, activation="relu", beta_initializer="ones")
    layer.build((None, 2), np.float64)
    layer.moving_mean, layer.moving_variance = [1e39, -1e150], [1e78, 1e300]
    x = np.array([[0.0, 0.0], [1e38, 0.0]], np.float32)
    y, pullback = layer.vjp(x)
    np.testing.assert_allclose(y, layer(x.astype(np.float64)).astype(np.float32), rtol=1e-6)
    assert np.isfinite(pullback(np.ones_like(x)).inputs).all()


def test_a_statistic_beyond_float32_is_stored_as_its_largest_number():
    layer = nbbn.BatchNormalization()
    layer(np.zeros((2, 2), np.float32))
    layer.moving_variance = [1e60, np.inf]
    np.testing.assert_array_equal(layer.moving_variance, [np.finfo(np.float32).max, np.inf])


@pytest.mark.parametrize("weight", [1e-3, 1e3])
def test_differences_beyond_float32_with_weights(weight):
    x = np.array([[3e38], [-3e38], [-3e38], [-3e38]], np.float32)
    y = nbbn.BatchNormalization()(x, training=True, mask=np.full((4, 1), weight))
    np.testing.assert_allclose(y.ravel(), np.array([3, -1, -1, -1]) / np.sqrt(3), rtol=1e-6)


def test_inference_after_equal_values_is_beta_without_epsilon():
    layer = nbbn.BatchNormalization(epsilon=0.0, momentum=0.0, beta_initializer="ones")
    x = np.full((2, 1), 2.0)
    for training in (True, False):
        y, pullback = layer.vjp(x, training=training)
        np.testing.assert_array_equal(y, 1)
        assert all(np.isfinite(g).all() for g in pullback(x)[:3])


def test_weights_that_float32_does_not_have():
    x = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"mask must be more than 0 in float32 somewhere; received at most 1e-60"):
        nbbn.BatchNormalization()(x, training=True, mask=np.full(2, 1e-60))


def test_an_adjustment_that_is_nan_where_a_mask_excludes_nan():
    x, dy = np.random.default_rng(23).normal(size=(2, 6, 3))
    x[1], mask = np.nan, np.arange(6) != 1
    a = np.where(np.isnan(x), np.nan, 1.5)
    layer = nbbn.BatchNormalization(adjustment=lambda shape: (a, 0.0))
    found = layer.vjp(x, training=True, mask=mask)[1](dy)
    assert all(np.isfinite(g).all() for g in found[:3])
