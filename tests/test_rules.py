"""The rules as plain Python functions: exact values, NaN, and float32 that stays float32."""

import ast
import inspect
import math

import numba
import numpy as np
import pytest

from nbbn.core import rules

INF, NAN = math.inf, math.nan


def same(found, expected):
    """Equal to the last bit; NaN equals NaN."""
    return np.array_equal(found, expected, equal_nan=True)


# --- exact values: all of these are exact in binary -------------------------

VALUES = [
    (rules.drop, (1.0, NAN), 0.0),
    (rules.drop, (0.0, 3.0), 3.0),
    (rules.drop, (0.0, NAN), NAN),
    (rules.choose, (1.0, 3.0, NAN), 3.0),
    (rules.choose, (0.0, NAN, 3.0), 3.0),
    (rules.divide, (3.0, 4.0), 0.75),
    (rules.divide, (NAN, 4.0), NAN),
    (rules.divide, (NAN, 0.0), 0.0),  # of no value there is nothing
    (rules.divide, (3.0, NAN), NAN),
    # 3, 5, 7 seen from 3: the mean is 5, and 4 + 0 + 4 = 8
    (rules.shifted_moments, (3.0, 3.0, 6.0, 20.0), (5.0, 8.0)),
    (rules.shifted_moments, (1.0, -7.5, 0.0, 0.0), (-7.5, 0.0)),
    (rules.shifted_moments, (0.0, 3.0, 0.0, 0.0), (0.0, 0.0)),
    (rules.shifted_moments, (4.0, 1.0, 4.0, 3.875), (2.0, 0.0)),  # rounding made m2 negative
    (rules.shifted_moments, (2.0, 1.0, NAN, NAN), (NAN, NAN)),
    (rules.shifted_moments, (2.0, 1.0, INF, INF), (INF, NAN)),
    (rules.shifted_moments, (2.0, 1e200, -2e200, INF), (0.0, rules.LARGEST)),
    (rules.combine, (2.0, 4.0, 2.0, 2.0, 2.0, 8.0, 2.0, 2.0), (4.0, 6.0, 20.0, 4.0)),  # 3, 5 and 7, 9
    (rules.combine_some, (2.0, 4.0, 2.0, 2.0, 2.0, 8.0, 2.0, 2.0), (4.0, 6.0, 20.0, 4.0)),
    (rules.per, (10.0, 4.0), 2.5),
    (rules.per, (NAN, 4.0), NAN),
    (rules.per, (NAN, 0.0), 0.0),
    (rules.per, (3e-310, 1e-310), 3.0),
    (rules.per, (1e-5, 1e-300), 1e295),
    (rules.unbiased_count, (18.0, 18.0), 17.0),
    (rules.unbiased_count, (40.0, 40.0), 39.0),
    (rules.unbiased_count, (2.0, 2.0), 1.0),
    (rules.unbiased_count, (1.0, 1.0), 1.0),
    (rules.unbiased_count, (0.0, 0.0), 0.0),
    (rules.unbiased_count, (8.0, 32.0), 4.0),  # two values of weight 4
    (rules.unbiased_count, (4.0, 10.0), 1.5),  # one of 3 and one of 1
    (rules.unbiased_count, (0.3, 0.09), 0.3),  # a single one, whose divisor is a rounding error
    (rules.moving_average, (2.0, 4.0, 0.75), 2.5),
    (rules.moving_average, (4.0, 2.0, 0.25), 2.5),
    (rules.moving_average, (NAN, 2.0, 0.5), NAN),
    (rules.moving_average, (2.0, NAN, 0.5), NAN),
    (rules.is_not_finite, (rules.LARGEST,), False),
    (rules.is_not_finite, (-INF,), True),
    (rules.is_not_finite, (NAN,), True),
    # the weight of all batches, and the share of those before
    (rules.debiased_momentum, (0.0, 0.75, 0.25), (0.25, 0.0)),
    (rules.debiased_momentum, (0.25, 0.5, 0.5), (0.625, 0.2)),
    (rules.debiased_momentum, (0.5, 1.0, 0.0), (0.5, 1.0)),
    (rules.debiased_momentum, (0.0, 1.0, 0.0), (0.0, 1.0)),
    (rules.debiased_momentum, (0.5, 0.0, 1.0), (1.0, 0.0)),
    (rules.debiased_momentum, (3.0, 1.0, 1.0), (4.0, 0.75)),  # of averages with equal weights
    (rules.stddev, (3.75, 0.25), 2.0),
    (rules.stddev, (0.0, 0.0), 0.0),
    # y = (x - rounded_mean) * scale + shift: what the rounding of the mean has lost is in the shift
    (rules.output_terms, (5.25, 5.25, 0.5, 1.0, 0.0, 2.0), (1.0, 0.0)),
    (rules.output_terms, (5.25, 5.0, 0.5, 2.0, 3.0, 4.0), (4.0, 11.0)),
    (rules.output_terms, (NAN, 5.0, 0.5, 2.0, 3.0, 4.0), (4.0, NAN)),
    (rules.reciprocal_stddev, (3.75, 0.25), 0.5),
    (rules.reciprocal_stddev, (0.0, 0.0), 0.0),  # all values are the mean
    (rules.reciprocal_stddev, (NAN, 0.25), NAN),
    (rules.inference_terms, (5.0, 5.0, 3.75, 0.25, 3.0), (1.5, 0.0)),
    (rules.inference_terms, (5.5, 5.0, 3.75, 0.25, 3.0), (1.5, -0.75)),
    (rules.inference_terms, (INF, INF, 3.75, 0.25, 3.0), (1.5, 0.0)),
    # ten deviations away, and a hundred of them
    (rules.is_far, (10.0, 4.0, 0.0, 4.0), False),
    (rules.is_far, (100.0, 4.0, 0.0, 4.0), True),
    (rules.is_far, (1.0, 4.0, 1.0 + 2.0**-50, 0.0), False),  # cannot be nearer
    (rules.is_far, (1.0, 4.0, NAN, NAN), False),
    (rules.saturate, (3.0, 2.0), 2.0),
    (rules.saturate, (-3.0, 2.0), -2.0),
    (rules.saturate, (INF, 2.0), INF),
    (rules.saturate, (NAN, 2.0), NAN),
    (rules.is_left_out, (NAN, 0.5), False),
    (rules.is_left_out, (1.0, 0.0), False),
    (rules.is_left_out, (NAN, 0.0), True),
    (rules.is_left_out, (INF, 0.0), True),
    (rules.stddev, (NAN, 0.25), NAN),
    (rules.clip, (2.0, 1.0, 3.0), 2.0),
    (rules.clip, (0.0, 1.0, 3.0), 1.0),
    (rules.clip, (4.0, 1.0, 3.0), 3.0),
    (rules.clip, (1.0, 1.0, 1.0), 1.0),
    (rules.clip, (INF, 0.0, INF), INF),
    (rules.clip, (-INF, -INF, INF), -INF),
    (rules.clip, (NAN, 1.0, 3.0), NAN),
    (rules.clip, (NAN, -INF, INF), NAN),
    # mean 5, sigma 4 against renorm_mean 1, renorm_stddev 2
    (rules.renorm_correction, (5.0, 4.0, 1.0, 2.0, 0.25, 0.0, INF, INF), (2.0, 2.0)),
    (rules.renorm_correction, (5.0, 4.0, 1.0, 2.0, 0.25, 0.0, 1.5, 0.5), (1.5, 0.5)),
    (rules.renorm_correction, (-5.0, 1.0, 1.0, 2.0, 0.25, 0.75, 1.5, 0.5), (0.75, -0.5)),
    (rules.renorm_correction, (5.0, 4.0, 1.0, 2.0, 0.25, 1.0, 1.0, 0.0), (1.0, 0.0)),
    (rules.renorm_correction, (5.0, 4.0, 1.0, 0.0, 0.25, 0.0, INF, INF), (8.0, 8.0)),  # the floor is sqrt(0.25)
    (rules.renorm_correction, (NAN, 4.0, 1.0, 2.0, 0.25, 0.0, 3.0, 5.0), (2.0, NAN)),
    (rules.renorm_correction, (5.0, NAN, 1.0, 2.0, 0.25, 0.0, 3.0, 5.0), (NAN, 2.0)),
    (rules.renorm_correction, (5.0, 4.0, 1.0, NAN, 0.25, 0.0, 3.0, 5.0), (NAN, NAN)),
    (rules.variance_of_stddev, (2.0, 0.25), 3.75),
    (rules.variance_of_stddev, (0.25, 0.25), 0.0),
    (rules.variance_of_stddev, (NAN, 0.25), NAN),
    (rules.input_gradient_terms, (4.0, 8.0, 16.0, 0.25), (2.0, 0.25)),
    (rules.input_gradient_terms, (0.0, 8.0, 16.0, 0.25), (0.0, 0.0)),
    (rules.input_gradient_terms, (4.0, INF, 16.0, 0.25), (INF, 0.25)),
    (rules.gamma_gradient, (3.0, 8.0, 0.25, 2.0, 5.0), 19.0),
    (rules.normalize, (5.0, 3.0, 0.5, 7.0), 8.0),
    (rules.normalize, (NAN, 3.0, 0.5, 7.0), NAN),
    (rules.adjust, (6.0, 0.5, 3.0, 2.0, 7.0), 16.0),
    # x_hat * gamma = 6, as in adjust(), plus a residual of 0.25
    (rules.output, (15.0, 3.0, 0.5, 0.0, 0.5, 3.0, 2.0, 7.0, 0.25), 16.25),
    (rules.output, (NAN, 3.0, 0.5, 0.0, 0.5, 3.0, 2.0, 7.0, 0.25), NAN),
    (rules.relu, (2.5,), 2.5),
    (rules.relu, (-2.5,), 0.0),
    (rules.relu, (INF,), INF),
    (rules.relu, (-INF,), 0.0),
    (rules.relu, (NAN,), NAN),
    (rules.relu_gradient, (3.0, 2.5), 3.0),
    (rules.relu_gradient, (3.0, -2.5), 0.0),
    (rules.relu_gradient, (3.0, 0.0), 0.0),
    (rules.relu_gradient, (NAN, -1.0), 0.0),
    (rules.relu_gradient, (INF, 0.0), 0.0),
    (rules.relu_gradient, (NAN, 1.0), NAN),
    (rules.relu_gradient, (3.0, NAN), 3.0),
    (rules.input_gradient, (8.0, INF, 3.0, 0.5, 0.0, 0.0, 1.0, 1.0), 4.0),
    (rules.input_gradient, (8.0, 5.0, 3.0, 0.5, 1.0, 0.25, 1.0, 2.0), 2.5),
    (rules.input_gradient, (8.0, 5.0, 3.0, 0.5, 1.0, 0.25, 1.0, 0.0), 4.0),
    (rules.input_gradient, (8.0, NAN, 3.0, 0.5, 1.0, 0.25, 1.0, 0.0), 0.0),
    (rules.input_gradient, (NAN, INF, 3.0, 0.5, 1.0, 0.25, 1.0, 0.0), 0.0),
    (rules.input_gradient, (8.0, 5.0, 3.0, 0.5, NAN, 0.25, 1.0, 0.0), 4.0),
    (rules.input_gradient, (4.0, 5.0, 3.0, 0.5, 1.0, 0.25, 2.0, 2.0), 2.5),
]


@pytest.mark.parametrize(("rule", "arguments", "expected"), VALUES, ids=lambda v: getattr(v, "__name__", None))
def test_exact_values(rule, arguments, expected):
    assert same(rule(*arguments), expected), f"{rule.__name__}{arguments} = {rule(*arguments)}, expected {expected}"


def public_rules():
    functions = inspect.getmembers(rules, inspect.isfunction)
    return [f for _, f in functions if f.__module__ == rules.__name__]


def test_every_rule_has_values():
    assert set(public_rules()) == {rule for rule, _, _ in VALUES}


# --- the type of the result ---------------------------------------------------


@pytest.mark.parametrize(("rule", "arguments", "expected"), VALUES, ids=lambda v: getattr(v, "__name__", None))
def test_float32_stays_float32_in_python(rule, arguments, expected):
    """math.sqrt() makes a Python float, which NumPy lets give way to float32."""
    with np.errstate(invalid="ignore", over="ignore"):  # unlike Python's numbers NumPy's warn of infinity
        results = np.atleast_1d(np.array(rule(*map(np.float32, arguments)), dtype=object))
    for result in results:
        assert isinstance(result, float | np.float32 | bool | np.bool_), type(result)
        assert np.result_type(result, np.float32(1)) == np.float32, type(result)


@pytest.mark.parametrize("rule", public_rules(), ids=lambda r: r.__name__)
def test_float32_stays_float32_when_compiled(rule):
    signature = (numba.float32,) * len(inspect.signature(rule).parameters)
    compiled = numba.njit(rule)
    compiled.compile(signature)
    result = compiled.overloads[signature].signature.return_type
    assert set(getattr(result, "types", (result,))) <= {numba.float32, numba.boolean}


@pytest.mark.parametrize("rule", public_rules(), ids=lambda r: r.__name__)
def test_no_rule_branches_on_a_value(rule):
    """For a vector each of its values would have to take its own way. combine() is of a GPU's threads."""
    tree = ast.parse(inspect.getsource(rule))
    tests = [ast.unparse(n.test) for n in ast.walk(tree) if isinstance(n, ast.If | ast.IfExp | ast.While)]
    branches = [test for test in tests if not test.endswith((" is None", " is not None"))]
    assert not branches or rule in (rules.drop, rules.choose, rules.combine)


# --- moments ------------------------------------------------------------------


def moments_of(x, shift):
    x = np.asarray(x, np.float64)
    return rules.shifted_moments(float(x.size), float(shift), (x - shift).sum(), ((x - shift) ** 2).sum())


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e4, -1e8, 1e12])
def test_shifted_moments_at_large_means(mean):
    """x - x[0] is exact, so NumPy's moments of that are those of x without the digits that the mean would cost."""
    x = mean + np.random.default_rng(0).normal(size=1000)
    found_mean, m2 = moments_of(x, x[0])
    np.testing.assert_allclose(found_mean, x[0] + (x - x[0]).mean(), rtol=1e-15, atol=1e-15)
    np.testing.assert_allclose(m2 / 1000, (x - x[0]).var(), rtol=1e-12)


@pytest.mark.parametrize("cut", [0, 1, 2, 17, 999, 1000])
@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_combine_agrees_with_numpy(cut, mean):
    x = mean + np.random.default_rng(1).normal(size=1000)
    parts = [(float(p.size), *moments_of(p, p[0] if p.size else 0.0), float(p.size)) for p in (x[:cut], x[cut:])]
    count, found_mean, m2, _ = rules.combine(*parts[0], *parts[1])
    assert count == 1000
    np.testing.assert_allclose(found_mean, x.mean(), rtol=1e-15, atol=1e-15)
    np.testing.assert_allclose(m2, x.var() * 1000, rtol=1e-12)


def test_combine_is_symmetric():
    one, two = (3.0, 5.0, 8.0, 3.0), (7.0, -2.0, 1.5, 9.0)
    np.testing.assert_allclose(rules.combine(*one, *two), rules.combine(*two, *one), rtol=1e-14)


def test_combine_many_parts_in_any_order():
    rng = np.random.default_rng(2)
    x = 1e3 + rng.normal(size=4096)
    for order in (range(64), reversed(range(64)), rng.permutation(64)):
        total = (0.0, 0.0, 0.0, 0.0)
        for i in order:
            part = x[64 * i : 64 * i + 64]
            total = rules.combine(*total, 64.0, *moments_of(part, part[0]), 64.0)
        np.testing.assert_allclose(total, (4096, x.mean(), x.var() * 4096, 4096), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("power", [-0.9, 0.0, 0.4, 0.9])
def test_combine_with_nothing_changes_nothing(dtype, power):
    """Also where the square of the mean is no number of this dtype: most lanes of a small reduction are empty."""
    nothing = tuple(map(dtype, (0, 0, 0, 0)))
    something = (dtype(4), dtype(np.finfo(dtype).max ** power), dtype(8), dtype(4))
    with np.errstate(over="ignore", invalid="ignore"):
        assert rules.combine(*nothing, *something) == something
        assert rules.combine(*something, *nothing) == something
    assert rules.combine(*nothing, *nothing) == nothing


# --- moving averages ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [float, np.float32, np.float64])
@pytest.mark.parametrize("other", [INF, -INF, NAN, 1e300, 0.0])
@pytest.mark.parametrize("value", [0.1, INF, NAN])
def test_moving_average_copies_and_freezes_exactly(value, other, dtype):
    with np.errstate(over="ignore", invalid="ignore"):  # what is not chosen is computed, too
        value, other = dtype(value), dtype(other)
        assert same(rules.moving_average(other, value, dtype(0)), value)
        assert same(rules.moving_average(value, other, dtype(1)), value)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.99, 1.0])
def test_moving_average_of_equal_values_is_that_value(momentum):
    assert rules.moving_average(0.1, 0.1, momentum) == 0.1


def test_clip_at_the_bounds_of_no_clipping_is_the_identity():
    for value in (0.0, 5e-324, 1.0, 1.7e308, INF):
        assert rules.clip(value, 0.0, INF) == value


# --- gradients --------------------------------------------------------------------


@pytest.mark.parametrize("r", [1.0, 1.75])
def test_gradient_rules_are_the_formula(r):
    """(g - mean(g) - x_hat * mean(g * x_hat)) / sigma with g = dy * gamma * r, and sum dy * (x_hat * r + d)."""
    rng = np.random.default_rng(3)
    x, dy = rng.normal(3, 2, size=50), rng.normal(size=50)
    gamma, d, epsilon = 1.5, 0.25, 1e-3
    mean, sigma = x.mean(), math.sqrt(x.var() + epsilon)
    x_hat, g = (x - mean) / sigma, dy * gamma * r
    sums = dy.sum(), (dy * (x - mean)).sum()
    bias, slope = rules.input_gradient_terms(50.0, *sums, 1 / sigma)
    dx = [
        rules.input_gradient(*pair, mean, gamma * r / sigma, bias, slope, None, None)
        for pair in zip(dy, x, strict=True)
    ]
    np.testing.assert_allclose(dx, (g - g.mean() - x_hat * (g * x_hat).mean()) / sigma, rtol=1e-12, atol=1e-14)
    found = rules.gamma_gradient(*sums, 1 / sigma, r, d)
    np.testing.assert_allclose(found, (dy * (x_hat * r + d)).sum(), rtol=1e-12)


@pytest.mark.parametrize("zero", [0.0, -0.0, -5e-324, -1.0])
def test_relu_gives_a_zero_without_a_sign(zero):
    assert math.copysign(1.0, rules.relu(zero)) == 1.0
    assert math.copysign(1.0, rules.relu_gradient(-1.0, zero)) == 1.0


def test_what_is_none_is_left_out():
    """As adding zeros and multiplying by ones, but without the cost."""
    assert rules.output(15.0, 3.0, 0.5, 0.25, None, None, None, None, None) == 6.25
    assert rules.output(15.0, 3.0, 0.5, 0.25, None, None, None, None, 2.0) == 8.25
    assert rules.output(15.0, 3.0, 0.5, 0.0, 0.5, 3.0, 2.0, 7.0, None) == 16.0
    assert rules.input_gradient(8.0, 5.0, 3.0, 0.5, 1.0, 0.25, None, None) == 3.25
    assert rules.input_gradient(8.0, 5.0, 3.0, 0.5, 1.0, 0.25, 2.0, None) == 7.25
    assert rules.input_gradient(8.0, 5.0, 3.0, 0.5, 1.0, 0.25, None, 2.0) == 2.5


def test_adjust_is_the_formula():
    x_hat, a, b, gamma, beta = 0.7, 1.3, -0.4, 1.9, 0.6
    np.testing.assert_allclose(
        rules.adjust(x_hat * gamma, a, b, gamma, beta), (x_hat * a + b) * gamma + beta, rtol=1e-15
    )
