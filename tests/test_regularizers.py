"""Regularizers: penalties and gradients, of nbbn's objects and of foreign ones."""

import math

import ml_dtypes
import numpy as np
import pytest

from nbbn import regularizers
from nbbn.regularizers import L1, L1L2, L2

W = [[-2.0, 0.0], [0.5, 1.0]]  # sum |w| = 3.5, sum w^2 = 5.25
CASES = [(L1(0.5), 1.75), (L2(0.5), 2.625), (L1L2(0.5, 0.25), 1.75 + 1.3125), (L1L2(), 0.0)]
SLOPES = [
    (L1(0.5), [[-0.5, 0.0], [0.5, 0.5]]),
    (L2(0.5), [[-2.0, 0.0], [0.5, 1.0]]),
    (L1L2(0.5, 0.25), [[-1.5, 0.0], [0.75, 1.0]]),
    (L1L2(), [[0.0, 0.0], [0.0, 0.0]]),
]
DTYPES = ["float16", ml_dtypes.bfloat16, "float32", "float64"]


# W, the factors and every result are multiples of 1/16 below 8: exact in each dtype.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("regularizer", "penalty"), CASES, ids=repr)
def test_penalty(regularizer, penalty, dtype):
    value = regularizer(np.array(W, dtype))
    assert type(value) is float
    assert value == penalty


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("regularizer", "slope"), SLOPES, ids=repr)
def test_gradient(regularizer, slope, dtype):
    w = np.array(W, dtype)
    gradient = regularizer.gradient(w)
    assert gradient.dtype == w.dtype
    np.testing.assert_array_equal(gradient.astype("float64"), np.array(slope))
    np.testing.assert_array_equal(w.astype("float64"), np.array(W))


@pytest.mark.parametrize("regularizer", [L1(0.3), L2(0.7), L1L2(0.3, 0.7)], ids=repr)
def test_gradient_is_the_derivative_of_the_penalty(regularizer):
    w = np.random.default_rng(0).normal(size=(2, 3))
    step = 1e-6
    numeric = np.empty_like(w)
    for index in np.ndindex(w.shape):
        above, below = w.copy(), w.copy()
        above[index] += step
        below[index] -= step
        numeric[index] = (regularizer(above) - regularizer(below)) / (2 * step)
    # At most quadratic, so central differences err by rounding alone: eps * penalty / step = 2e-10 * 10.
    np.testing.assert_allclose(regularizer.gradient(w), numeric, atol=2e-9, rtol=0)


def test_penalty_of_a_float32_array_is_summed_in_float64():
    w = np.full(1_000_004, 0.1, np.float32)
    w[0] = 1e8
    # 100,100,000.3, where float32 has multiples of 8 only.
    expected = 1e8 + 1_000_003 * float(np.float32(0.1))
    # A float64 sum of 1e6 terms: relative error far below 1e6 * 1.1e-16.
    assert L1(1.0)(w) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("shape", [(), (0,), (1, 3, 1, 2)])
def test_any_shape(shape):
    w = np.ones(shape)
    assert L1L2(1.0, 2.0)(w) == 3.0 * w.size
    assert L1L2(1.0, 2.0).gradient(w).shape == shape


def test_infinite_weight_makes_no_nan_of_a_factor_that_is_zero():
    w = np.array([np.inf, 1.0])
    assert L1(1.0)(w) == L2(1.0)(w) == math.inf
    np.testing.assert_array_equal(L1(1.0).gradient(w), [1.0, 1.0])
    np.testing.assert_array_equal(L2(1.0).gradient(w), [np.inf, 2.0])


def test_nan_comes_through():
    w = np.array([np.nan, 1.0])
    for regularizer in (L1(), L2()):
        assert math.isnan(regularizer(w))
        assert np.isnan(regularizer.gradient(w)).tolist() == [True, False]


def test_defaults_are_those_of_keras():
    assert regularizers.get("l1") == regularizers.get("L1") == L1(0.01)
    assert regularizers.get("l2") == regularizers.get("L2") == L2(0.01)
    assert regularizers.get("L1L2") == regularizers.get("l1l2") == L1L2() == L1L2(0.0, 0.0)
    assert regularizers.get("l1_l2") == regularizers.l1_l2() == L1L2(0.01, 0.01)
    assert regularizers.get({"class_name": "l1_l2", "config": {"l1": 0.5}}) == L1L2(0.5, 0.01)
    assert regularizers.get({"class_name": "L1L2", "config": {"l1": 0.5}}) == L1L2(0.5, 0.0)


@pytest.mark.parametrize("value", ["a", None, math.inf, math.nan, 1j, [0.1]])
@pytest.mark.parametrize(("cls", "name"), [(L1, "l1"), (L2, "l2"), (L1L2, "l1"), (L1L2, "l2")])
def test_bad_factor_is_refused(cls, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number, received") as caught:
        cls(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("w", [np.arange(3), np.ones(3, bool), np.ones(3, complex)])
def test_weights_that_are_not_floating_are_refused(w):
    for call in (L1(), L1().gradient):
        with pytest.raises(TypeError, match=f"w must be .* floating dtype, received dtype {w.dtype}"):
            call(w)


class Cubic:
    """A foreign regularizer: sum w^3, with a gradient of its own."""

    def __call__(self, w):
        return np.sum(w**3)

    def gradient(self, w):
        return (3.0 * w**2).astype("float64")


def test_own_gradient_of_a_foreign_object_is_used_and_cast():
    w = np.array([1.0, -2.0], np.float32)
    assert regularizers.loss(Cubic(), w) == -7.0
    gradient = regularizers.gradient(Cubic(), w)
    assert gradient.dtype == np.float32
    np.testing.assert_array_equal(gradient, [3.0, 12.0])


def test_module_functions_agree_with_the_methods():
    w = np.array(W, np.float32)
    for regularizer, penalty in CASES:
        assert regularizers.loss(regularizer, w) == penalty
        np.testing.assert_array_equal(regularizers.gradient(regularizer, w), regularizer.gradient(w))


def foreign(name, config, module):
    """A regularizer that looks like one of another library and does nothing itself."""

    def refuse(self, w):
        raise AssertionError("nbbn's own formula must be used")

    members = {"__module__": module, "__call__": refuse, "get_config": lambda self: config}
    return type(name, (), members)()


@pytest.mark.parametrize(
    "module",
    [
        "tf_keras.src.regularizers",
        "keras.src.regularizers.regularizers",
        "tensorflow.python.keras.regularizers",
    ],
)
@pytest.mark.parametrize("own", [L1(0.3), L2(0.7), L1L2(0.3, 0.7)], ids=repr)
def test_keras_object_is_known_by_its_names(own, module):
    twin = foreign(type(own).__name__, own.get_config(), module)
    w = np.array(W, np.float32)
    np.testing.assert_array_equal(regularizers.gradient(twin, w), own.gradient(w))
    assert regularizers.loss(twin, w) == own(w)


@pytest.mark.parametrize(
    "regularizer",
    [
        foreign("L2", {"l2": 0.1}, "my_project.regularizers"),
        foreign("OrthogonalRegularizer", {"factor": 0.1}, "keras.src.regularizers.regularizers"),
        np.sum,
        None,
    ],
    ids=["L2 of another module", "another class of Keras", "function", "None"],
)
def test_unknown_gradient_is_refused_and_the_way_out_named(regularizer):
    with pytest.raises(TypeError, match=r"have a method gradient\(w\)") as caught:
        regularizers.gradient(regularizer, np.ones(3))
    assert repr(regularizer) in str(caught.value)


def test_gradient_of_another_shape_is_refused():
    class Wrong(Cubic):
        def gradient(self, w):
            return 1.0

    with pytest.raises(ValueError, match=r"shape \(3,\) of w, received shape \(\)"):
        regularizers.gradient(Wrong(), np.ones(3))


def test_penalty_that_is_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"must return a scalar, received shape \(3,\)"):
        regularizers.loss(np.abs, np.ones(3))


@pytest.mark.parametrize("value", ["abc", None, 1j])
def test_penalty_that_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match=f"^beta_regularizer .* must return a real number, received {value!r}"):
        regularizers.loss(lambda w: value, np.ones(3), "beta_regularizer")
