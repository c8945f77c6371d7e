"""nbbn.nn against tf.nn and tf.compat.v1.nn, live.

Tolerances: both sides compute in float32 (float64 for float64), so a result may differ by a few units in the last place
of the numbers it was made of, here of size 10 at most; a 16-bit result by one unit in its own last place, because both
round it at the end. Where TensorFlow itself rounds to 16 bits on the way, the test says how often.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nbbn
from tests.parity.tf_side import numpy_dtype, parameter_dtype, tf

pytestmark = pytest.mark.parity

fused_batch_norm = tf.compat.v1.nn.fused_batch_norm
DTYPES = ("float16", "bfloat16", "float32", "float64")
FUSED_DTYPES = DTYPES[:3]  # TensorFlow has no fused kernel for float64
FORMATS = {"NHWC": (4, 3, 2, 5), "NCHW": (4, 5, 3, 2), "NDHWC": (2, 3, 2, 2, 5), "NCDHW": (2, 5, 3, 2, 2)}
CHANNELS = 5
ABSOLUTE = {"float32": 2e-5, "float64": 4e-14}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.normal(1, 2, shape).astype(numpy_dtype(dtype))


def assert_close(actual: Any, expected: Any, dtype: str, roundings: float = 1) -> None:
    """`roundings`: how many units in the last place of a 16-bit result are allowed."""
    expected = expected.numpy()
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    relative = 0.0
    if expected.dtype.itemsize == 2:
        relative = roundings * float(ml_dtypes.finfo(expected.dtype).eps)
    np.testing.assert_allclose(
        actual.astype(np.float64),
        expected.astype(np.float64),
        rtol=relative,
        atol=ABSOLUTE[parameter_dtype(dtype)],
    )


def assert_all_close(actual: Any, expected: Any, dtype: str, roundings: float = 1) -> None:
    for mine, other in zip(actual, expected, strict=True):
        assert_close(mine, other, dtype, roundings)


# --- moments ------------------------------------------------------------


# In bfloat16, unlike in float16, TensorFlow also rounds the mean that it subtracts, the differences and their squares.
MOMENTS_ROUNDINGS = {"bfloat16": 4}
REDUCTIONS = [
    ((6, 3), [0]),
    ((6, 3), [-1]),
    ((6, 3), 1),
    ((6, 3), [0, 1]),
    ((4, 3, 5), [0, 2]),
    ((4, 3, 5), [1]),
    ((4, 3, 2, 5), [0, 1, 2]),
    ((4, 3, 2, 5), [-1, -2, 0]),
    ((4, 3, 2, 5), [1, 3]),
    ((2, 3, 2, 2, 3), (0, 1, 2, 3)),
    ((2, 3, 2, 2, 3), [0, 2, 4]),
    ((3, 4), []),
]


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axes"), REDUCTIONS)
def test_moments(rng: np.random.Generator, shape: tuple[int, ...], axes: Any, dtype: str, keepdims: bool) -> None:
    x = normal(rng, shape, dtype)
    expected = tf.nn.moments(x, axes, keepdims=keepdims)
    actual = nbbn.nn.moments(x, axes, keepdims=keepdims)
    assert_all_close(actual, expected, dtype, MOMENTS_ROUNDINGS.get(dtype, 1))


def test_moments_ignore_the_shift(rng: np.random.Generator) -> None:
    x = normal(rng, (6, 3), "float32")
    assert_all_close(nbbn.nn.moments(x, [0], 100.0), tf.nn.moments(x, [0], 100.0), "float32")


def test_moments_of_nothing_are_nan() -> None:
    x = np.zeros((0, 3), np.float32)
    assert_all_close(nbbn.nn.moments(x, [0]), tf.nn.moments(x, [0]), "float32")


def test_deviation_moments_of_bfloat16(rng: np.random.Generator) -> None:
    """TensorFlow subtracts a mean rounded to bfloat16: its variance is off by percents; nbbn's is rounded once."""
    x = (100.25 + rng.normal(size=(512, 3))).astype(numpy_dtype("bfloat16"))
    right = x.astype(np.float64).var(0)
    theirs, ours = tf.nn.moments(x, [0])[1].numpy(), nbbn.nn.moments(x, [0])[1]
    assert ours.dtype == theirs.dtype == x.dtype
    assert np.abs(theirs.astype(np.float64) / right - 1).max() > 0.02
    half_ulp = float(ml_dtypes.finfo(x.dtype).eps) / 2
    np.testing.assert_allclose(ours.astype(np.float64), right, rtol=1.01 * half_ulp)


WEIGHTS = [
    ((6, 3), [0], (6, 1)),
    ((6, 3), [0], (6, 3)),
    ((6, 3), [0], (3,)),
    ((6, 3), [1], ()),
    ((4, 3, 5), [0, 2], (4, 1, 5)),
    ((4, 3, 5), [0, 2], (3, 1)),
    ((4, 3, 2, 5), [0, 1, 2], (4, 3, 2, 1)),
    ((4, 3, 2, 5), [-1, 0], (1, 3, 1, 5)),
]


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axes", "weights_shape"), WEIGHTS)
def test_weighted_moments(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    axes: Any,
    weights_shape: tuple[int, ...],
    dtype: str,
    keepdims: bool,
) -> None:
    x = normal(rng, shape, dtype)
    weights = rng.uniform(0.25, 2, weights_shape).astype(np.float32)
    expected = tf.nn.weighted_moments(x, axes, weights, keepdims=keepdims)
    actual = nbbn.nn.weighted_moments(x, axes, weights, keepdims=keepdims)
    assert_all_close(actual, expected, dtype, MOMENTS_ROUNDINGS.get(dtype, 1))


@pytest.mark.parametrize("weights", [np.array([[1], [0], [1], [1]]), np.array([[True], [False], [True], [True]])])
def test_weights_of_integers_and_bools(rng: np.random.Generator, weights: np.ndarray) -> None:
    x = normal(rng, (4, 3), "float32")
    expected = tf.nn.weighted_moments(x, [0], weights)
    assert_all_close(nbbn.nn.weighted_moments(x, [0], weights), expected, "float32")


def test_weights_that_sum_to_zero(rng: np.random.Generator) -> None:
    x, weights = normal(rng, (4, 3), "float32"), np.zeros((4, 1), np.float32)
    expected = tf.nn.weighted_moments(x, [0], weights)
    np.testing.assert_array_equal(expected[0].numpy(), 0)
    assert_all_close(nbbn.nn.weighted_moments(x, [0], weights), expected, "float32")


# --- batch_normalization ------------------------------------------------------------


OPERANDS = [
    ((6, 3), (3,)),
    ((4, 3, 2, 5), (5,)),
    ((4, 3, 2, 5), (1, 3, 1, 1)),
    ((4, 3, 2, 5), (1, 3, 1, 5)),
    ((4, 3, 2, 5), (4, 1, 1, 1)),
    ((4, 3, 2, 5), (4, 3, 2, 5)),
    ((4, 3, 5), ()),
    ((3, 5), (4, 3, 5)),
]


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "operand_shape"), OPERANDS)
def test_batch_normalization(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    operand_shape: tuple[int, ...],
    dtype: str,
    with_offset: bool,
    with_scale: bool,
) -> None:
    """Statistics of the parameters' dtype. For a 16-bit x TensorFlow rounds scale, shift and product to 16 bits too."""
    x, parameters = normal(rng, shape, dtype), parameter_dtype(dtype)
    mean, offset, scale = (np.asarray(rng.normal(size=operand_shape), parameters) for _ in range(3))
    variance = np.asarray(rng.uniform(0.5, 2, operand_shape), parameters)
    arguments = (mean, variance, offset if with_offset else None, scale if with_scale else None, 1e-3)
    expected = tf.nn.batch_normalization(x, *arguments)
    actual = nbbn.nn.batch_normalization(x, *arguments)
    if expected.dtype.size > 2:
        assert_close(actual, expected, dtype)
        return
    # Each of TensorFlow's four roundings is half a unit of a term that may be larger than the sum.
    gain = 1 if not with_scale else np.abs(scale)
    terms = (np.abs(x.astype(np.float64)) + np.abs(mean)) / np.sqrt(variance) * gain
    terms = terms + (np.abs(offset) if with_offset else 0)
    assert actual.dtype == x.dtype
    error = np.abs(actual.astype(np.float64) - expected.numpy().astype(np.float64))
    assert (error <= 2 * float(ml_dtypes.finfo(x.dtype).eps) * terms).all()


# --- fused_batch_norm ------------------------------------------------------------


def fused_arguments(rng: np.random.Generator, data_format: str, dtype: str) -> tuple[np.ndarray, ...]:
    """x, scale, offset, mean, variance."""
    scale, offset, mean = rng.normal(size=(3, CHANNELS)).astype(np.float32)
    variance = rng.uniform(0.5, 2, CHANNELS).astype(np.float32)
    return normal(rng, FORMATS[data_format], dtype), scale, offset, mean, variance


@pytest.mark.parametrize("factor", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", FUSED_DTYPES)
@pytest.mark.parametrize("data_format", FORMATS)
def test_fused_batch_norm_in_training(
    rng: np.random.Generator, data_format: str, dtype: str, given: bool, factor: float
) -> None:
    x, scale, offset, mean, variance = fused_arguments(rng, data_format, dtype)
    options: dict[str, Any] = {"data_format": data_format, "epsilon": 1e-2, "exponential_avg_factor": factor}
    if given:
        options |= {"mean": mean, "variance": variance}
    elif factor != 1:
        for function in (fused_batch_norm, nbbn.nn.fused_batch_norm):
            with pytest.raises(ValueError, match="variance"):
                function(x, scale, offset, **options)
        return
    expected = fused_batch_norm(x, scale, offset, **options)
    assert_all_close(nbbn.nn.fused_batch_norm(x, scale, offset, **options), expected, dtype)


@pytest.mark.parametrize("dtype", FUSED_DTYPES)
@pytest.mark.parametrize("data_format", FORMATS)
def test_fused_batch_norm_in_inference(rng: np.random.Generator, data_format: str, dtype: str) -> None:
    x, *arguments = fused_arguments(rng, data_format, dtype)
    expected = fused_batch_norm(x, *arguments, data_format=data_format, is_training=False)
    actual = nbbn.nn.fused_batch_norm(x, *arguments, data_format=data_format, is_training=False)
    assert_all_close(actual, expected, dtype)
    for function in (fused_batch_norm, nbbn.nn.fused_batch_norm):
        with pytest.raises(ValueError, match="variance"):
            function(x, *arguments[:2], data_format=data_format, is_training=False)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("dtype", FUSED_DTYPES)
@pytest.mark.parametrize("data_format", FORMATS)
def test_fused_batch_norm_grad(rng: np.random.Generator, data_format: str, dtype: str, is_training: bool) -> None:
    x, scale, offset, mean, variance = map(tf.constant, fused_arguments(rng, data_format, dtype))
    dy = rng.normal(size=x.shape).astype(numpy_dtype(dtype))
    options = {"data_format": data_format, "epsilon": 1e-2, "is_training": is_training}
    statistics = {} if is_training else {"mean": mean, "variance": variance}
    with tf.GradientTape() as tape:
        tape.watch([x, scale, offset])
        y, _, _ = fused_batch_norm(x, scale, offset, **statistics, **options)
    expected = tape.gradient(y, [x, scale, offset], output_gradients=tf.constant(dy))
    given = {name: value.numpy() for name, value in statistics.items()}
    actual = nbbn.nn.fused_batch_norm_grad(dy, x.numpy(), scale.numpy(), **given, **options)
    assert_all_close(actual, expected, dtype)


@pytest.mark.parametrize("is_training", [True, False])
def test_fused_batch_norm_with_a_small_epsilon(rng: np.random.Generator, is_training: bool) -> None:
    """Variances of 1e-6: any floor under epsilon = 1e-9 would show."""
    x, scale, offset, mean, variance = fused_arguments(rng, "NHWC", "float32")
    x, mean, variance = x * 1e-3, mean * 1e-3, variance * 1e-6
    options = {"mean": mean, "variance": variance, "epsilon": 1e-9, "is_training": is_training}
    expected = fused_batch_norm(x, scale, offset, **options)
    assert_all_close(nbbn.nn.fused_batch_norm(x, scale, offset, **options), expected, "float32")


def test_fused_batch_norm_of_one_value_per_channel(rng: np.random.Generator) -> None:
    x = normal(rng, (1, 1, 1, CHANNELS), "float32")
    scale, offset = rng.normal(size=(2, CHANNELS)).astype(np.float32)
    expected = fused_batch_norm(x, scale, offset)
    assert_all_close(nbbn.nn.fused_batch_norm(x, scale, offset), expected, "float32")


def test_deviation_fused_batch_norm_in_float64(rng: np.random.Generator) -> None:
    """TensorFlow has no such kernel; nbbn computes, with as many digits as there are."""
    x, scale, offset = (v.astype(np.float64) for v in fused_arguments(rng, "NHWC", "float64")[:3])
    with pytest.raises(tf.errors.InvalidArgumentError, match="double"):
        fused_batch_norm(x, scale, offset)
    y, mean, variance = nbbn.nn.fused_batch_norm(x, scale, offset)
    right = x.mean((0, 1, 2)), x.var((0, 1, 2), ddof=1)
    # Sums of 24 values of size 5 in float64.
    np.testing.assert_allclose((mean, variance), right, rtol=1e-14)
    expected = (x - right[0]) / np.sqrt(x.var((0, 1, 2)) + 1e-3) * scale + offset
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_deviation_fused_batch_norm_of_nothing(factor: float) -> None:
    """TensorFlow blends NaN into the running statistics; nbbn leaves them."""
    x, ones = np.zeros((0, 3, 2, CHANNELS), np.float32), np.ones(CHANNELS, np.float32)
    arguments = (x, ones, ones, 3 * ones, 5 * ones)
    _, mean, variance = fused_batch_norm(*arguments, exponential_avg_factor=factor)
    assert np.isnan(mean).all()
    assert np.isnan(variance).all()
    y, mean, variance = nbbn.nn.fused_batch_norm(*arguments, exponential_avg_factor=factor)
    assert y.shape == x.shape
    np.testing.assert_array_equal((mean, variance), (3 * ones, 5 * ones))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"data_format": "HWCN"}, "data_format"),
        ({"scale": np.ones(4, np.float32)}, "scale"),
        ({"x": np.ones((3, 2, CHANNELS), np.float32)}, "x "),
    ],
)
def test_fused_batch_norm_refuses_the_same(arguments: dict[str, Any], names: str) -> None:
    ones = np.ones(CHANNELS, np.float32)
    arguments = {"x": np.ones((4, 3, 2, CHANNELS), np.float32), "scale": ones, "offset": ones} | arguments
    with pytest.raises(tf.errors.InvalidArgumentError):
        fused_batch_norm(**arguments)
    with pytest.raises(ValueError, match=names):
        nbbn.nn.fused_batch_norm(**arguments)
