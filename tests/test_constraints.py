"""Constraints: formulas, dtypes, axes, and what foreign callables may return."""

import math

import ml_dtypes
import numpy as np
import pytest

from nbbn import constraints
from nbbn.constraints import MaxNorm, MinMaxNorm, NonNeg, UnitNorm

ALL = [MaxNorm(), NonNeg(), UnitNorm(), MinMaxNorm()]
NORMED = [MaxNorm, UnitNorm, MinMaxNorm]
DTYPES = ["float16", ml_dtypes.bfloat16, "float32", "float64"]

# The epsilon of 1e-7 beside the norm makes a result smaller by a part of 1e-7 / norm; norms here are >= 0.5.
EPSILON_TOLERANCE = 1e-6


def norm(w, axis=0):
    return np.sqrt(np.square(w).sum(axis=axis))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (1, 3, 1, 2), (0,)])
@pytest.mark.parametrize("constraint", ALL, ids=repr)
def test_shape_and_dtype(constraint, shape, dtype):
    if shape == () and not isinstance(constraint, NonNeg):
        constraint = type(constraint)(axis=None)
    w = np.ones(shape, dtype)
    projected = constraint(w)
    assert type(projected) is np.ndarray
    assert projected.shape == shape
    assert projected.dtype == w.dtype


@pytest.mark.parametrize("constraint", ALL, ids=repr)
def test_input_is_not_modified(constraint):
    w = np.array([-3.0, 4.0])
    constraint(w)[:] = 9.0
    np.testing.assert_array_equal(w, [-3.0, 4.0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_neg(dtype):
    w = np.array([-1.5, -0.0, 0.0, 2.0, np.inf, -np.inf, np.nan], dtype)
    np.testing.assert_array_equal(NonNeg()(w).astype("float64"), [0.0, 0.0, 0.0, 2.0, np.inf, 0.0, np.nan])


def test_max_norm_shortens_what_is_too_long_and_only_that():
    w = np.array([[3.0, 0.3], [4.0, 0.4]])
    projected = MaxNorm(2.0)(w)
    np.testing.assert_allclose(projected, [[1.2, 0.3], [1.6, 0.4]], rtol=EPSILON_TOLERANCE)


def test_unit_norm():
    w = np.array([[3.0, 0.3, 0.0], [4.0, 0.4, 0.0]])
    np.testing.assert_allclose(UnitNorm()(w), [[0.6, 0.6, 0.0], [0.8, 0.8, 0.0]], rtol=EPSILON_TOLERANCE)


def test_min_max_norm_reaches_the_bounds():
    w = np.array([[3.0, 0.3, 0.9], [4.0, 0.4, 1.2]])  # norms 5, 0.5, 1.5
    np.testing.assert_allclose(norm(MinMaxNorm(1.0, 2.0)(w)), [2.0, 1.0, 1.5], rtol=EPSILON_TOLERANCE)


def test_min_max_norm_goes_there_at_its_rate():
    w = np.array([[3.0, 0.3], [4.0, 0.4]])
    np.testing.assert_allclose(norm(MinMaxNorm(1.0, 2.0, rate=0.25)(w)), [4.25, 0.625], rtol=EPSILON_TOLERANCE)


def test_epsilon_keeps_a_zero_finite_and_is_that_of_keras():
    for cls in NORMED:
        np.testing.assert_array_equal(cls()(np.zeros(3)), np.zeros(3))
    # A norm as small as epsilon itself is halved by it; float64 rounding only.
    np.testing.assert_allclose(UnitNorm()(np.array([1e-7])), [0.5], rtol=1e-12)
    np.testing.assert_allclose(MaxNorm()(np.array([1e-7])), [0.5e-7], rtol=1e-12)


@pytest.mark.parametrize("axis", [0, -1, 1, [0, 1], (0, 1), (1, 3), None])
def test_axis(axis):
    w = np.random.default_rng(0).uniform(0.5, 1.5, size=(2, 3, 4, 5))
    axes = tuple(axis) if isinstance(axis, list) else axis
    norms = norm(UnitNorm(axis)(w), axes)
    np.testing.assert_allclose(norms, np.ones_like(norms), rtol=EPSILON_TOLERANCE)
    other = norm(UnitNorm(2)(w), axes)
    assert np.abs(other - 1).max() > 0.1


@pytest.mark.parametrize("cls", NORMED)
def test_axis_outside_the_rank_is_refused(cls):
    with pytest.raises(ValueError, match="axis 3 is out of bounds"):
        cls(axis=3)(np.ones(4))


def test_norm_is_computed_wide():
    # 1e30^2 overflows float32, 300^2 float16. The tolerance is the rounding of the result.
    np.testing.assert_allclose(UnitNorm()(np.full(4, 1e30, np.float32)), np.full(4, 0.5), rtol=2**-23)
    np.testing.assert_allclose(UnitNorm()(np.full(4, 300, np.float16)), np.full(4, 0.5), rtol=2**-10)


def test_nan_spoils_its_own_norm_only():
    w = np.array([[np.nan, 3.0], [1.0, 4.0]])
    for cls in NORMED:
        assert np.isnan(cls()(w)).tolist() == [[True, False], [True, False]]


def test_defaults_are_those_of_keras():
    assert MaxNorm().get_config() == {"max_value": 2, "axis": 0}
    assert UnitNorm().get_config() == {"axis": 0}
    assert MinMaxNorm().get_config() == {"min_value": 0, "max_value": 1, "rate": 1, "axis": 0}
    assert NonNeg().get_config() == {}


def test_an_upper_bound_may_be_infinite():
    w = np.array([3.0, 4.0])
    np.testing.assert_allclose(MinMaxNorm(1.0, math.inf)(w), w, rtol=EPSILON_TOLERANCE)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (MaxNorm, {"max_value": -1}, "max_value must be a number >= 0, received -1"),
        (MaxNorm, {"max_value": "2"}, "max_value must be a number >= 0, received '2'"),
        (MinMaxNorm, {"min_value": -0.5}, "min_value must be a finite number >= 0, received -0.5"),
        (MinMaxNorm, {"min_value": 2.0}, "max_value must be a number >= 2, received 1.0"),
        (MinMaxNorm, {"rate": math.nan}, "rate must be a finite number, received nan"),
        (UnitNorm, {"axis": 1.5}, "axis must be None or integers, received 1.5"),
        (UnitNorm, {"axis": [0, "1"]}, r"axis must be .*, received \[0, '1'\]"),
        (UnitNorm, {"axis": "0"}, "axis must be .*, received '0'"),
    ],
)
def test_bad_argument_is_refused(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize("constraint", ALL, ids=repr)
def test_weights_that_are_not_floating_are_refused(constraint):
    with pytest.raises(TypeError, match=r"w must be .* floating dtype, received dtype int64"):
        constraint(np.arange(3))


def test_project_casts_what_a_foreign_function_returns():
    w = np.array([-1.0, 2.0], np.float32)
    projected = constraints.project(lambda w: np.clip(w, 0, 1).astype("float64"), w)
    assert projected.dtype == np.float32
    np.testing.assert_array_equal(projected, [0.0, 1.0])
    np.testing.assert_array_equal(constraints.project(NonNeg(), w), [0.0, 2.0])


def test_project_refuses_another_shape():
    with pytest.raises(ValueError, match=r"must return the shape \(3,\) of w, received shape \(1,\)"):
        constraints.project(lambda w: w[:1], np.ones(3))
