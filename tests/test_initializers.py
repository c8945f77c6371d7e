"""Initializers: values, distributions, fans, seeds, and what foreign callables may return."""

import math

import ml_dtypes
import numpy as np
import pytest

from nbbn import initializers
from nbbn.initializers import initialize

SHAPES = [(), (5,), (1, 3, 1, 2), (1, 1, 4), (0,)]
RANDOM = ["RandomNormal", "RandomUniform", "TruncatedNormal", "VarianceScaling"] + [
    scheme + form for scheme in ("Glorot", "He", "Lecun") for form in ("Normal", "Uniform")
]
DTYPES = ["float16", ml_dtypes.bfloat16, "float32", "float64"]

# Draws for the tests of a distribution. The standard deviation of a sample's mean is sigma / sqrt(n), that of
# its standard deviation at most sigma / sqrt(2 n) (a normal's); five of them are allowed. Seeds are fixed.
N = 40_000
MEAN_TOLERANCE = 5 / math.sqrt(N)
STDDEV_TOLERANCE = 5 / math.sqrt(2 * N)


def check_moments(values, mean, stddev):
    assert abs(values.mean() - mean) < MEAN_TOLERANCE * stddev
    assert abs(values.std() - stddev) < STDDEV_TOLERANCE * stddev


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["Zeros", "Ones", "Constant", *RANDOM])
def test_shape_and_dtype(name, shape, dtype):
    values = getattr(initializers, name)()(shape, dtype=dtype)
    assert type(values) is np.ndarray
    assert values.shape == shape
    assert values.dtype == np.dtype(dtype)
    assert values.flags.writeable


@pytest.mark.parametrize("name", ["Zeros", "Ones", "Constant", *RANDOM])
def test_default_dtype_is_float32_and_a_shape_may_be_an_integer_or_a_list(name):
    initializer = getattr(initializers, name)()
    assert initializer((3,)).dtype == np.float32
    assert initializer(3).shape == initializer(np.int64(3)).shape == initializer([3]).shape == (3,)


@pytest.mark.parametrize(("initializer", "value"), [("zeros", 0.0), ("ones", 1.0), ("constant", 0.0)])
def test_constant_values(initializer, value):
    np.testing.assert_array_equal(initializers.get(initializer)((2, 3)), np.full((2, 3), value, np.float32))


def test_constant_fills_with_a_number():
    np.testing.assert_array_equal(initializers.Constant(0.25)((2, 3)), np.full((2, 3), 0.25, np.float32))


@pytest.mark.parametrize("value", [[1.0, 2.0, 3.0], (1, 2, 3), np.array([1.0, 2.0, 3.0], ml_dtypes.bfloat16)])
def test_constant_holds_an_array_of_as_many_elements(value):
    initializer = initializers.Constant(value)
    np.testing.assert_array_equal(initializer((3,)), np.array([1, 2, 3], np.float32))
    np.testing.assert_array_equal(initializer((1, 3, 1)), np.array([[[1], [2], [3]]], np.float32))
    with pytest.raises(ValueError, match=r"4 numbers for shape \(4,\), received 3"):
        initializer((4,))


def test_constant_does_not_keep_the_array_it_was_given():
    given = np.ones(3)
    initializer = initializers.Constant(given)
    given[:] = 7
    first = initializer((3,))
    first[:] = 8
    np.testing.assert_array_equal(initializer((3,)), np.ones(3, np.float32))


def test_constant_reads_the_form_in_which_keras_writes_an_array():
    config = {"value": {"class_name": "__numpy__", "config": {"value": [1.0, 2.0], "dtype": "float32"}}}
    assert initializers.Constant.from_config(config) == initializers.Constant([1.0, 2.0])


@pytest.mark.parametrize("value", ["a", None, 1j, object(), np.ma.ones(3)])
def test_constant_refuses_what_is_no_number(value):
    with pytest.raises(ValueError, match="value must be a number"):
        initializers.Constant(value)


def test_dtype_in_a_config_of_tensorflow_1_is_ignored():
    config = {"class_name": "Zeros", "config": {"dtype": "float64"}}
    assert initializers.get(config)((2,)).dtype == np.float32
    assert config == {"class_name": "Zeros", "config": {"dtype": "float64"}}


@pytest.mark.parametrize("name", RANDOM)
def test_seed_repeats_and_its_absence_does_not(name):
    cls = getattr(initializers, name)
    seeded = cls(seed=7)
    first = seeded((50,))
    np.testing.assert_array_equal(seeded((50,)), first)
    np.testing.assert_array_equal(cls(seed=7)((50,)), first)
    assert (cls(seed=8)((50,)) != first).any()
    unseeded = cls()
    assert (unseeded((50,)) != unseeded((50,))).any()


@pytest.mark.parametrize("name", RANDOM)
def test_global_random_state_is_neither_read_nor_changed(name):
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = getattr(initializers, name)()((50,))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    assert (getattr(initializers, name)()((50,)) != first).any()


@pytest.mark.parametrize("name", RANDOM)
def test_random_values_of_an_integer_dtype_are_refused(name):
    with pytest.raises(TypeError, match=r"floating.*int32"):
        getattr(initializers, name)()((3,), dtype="int32")


@pytest.mark.parametrize("seed", [-1, 1.5, "1", {"class_name": "SeedGenerator"}])
def test_bad_seed_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be None or an integer >= 0") as caught:
        initializers.HeNormal(seed=seed)
    assert repr(seed) in str(caught.value)


def test_random_normal():
    check_moments(initializers.RandomNormal(3.0, 0.5, seed=1)((N,), "float64"), 3.0, 0.5)
    check_moments(initializers.RandomNormal(seed=1)((N,), "float64"), 0.0, 0.05)


def test_truncated_normal():
    values = initializers.TruncatedNormal(3.0, 0.5, seed=1)((N,), "float64")
    check_moments(values, 3.0, 0.5 * 0.87962566103423978)
    distance = np.abs(values - 3.0) / 0.5
    assert distance.max() <= 2.0
    # Redrawn, not clipped: nothing piles up at the bound, and P(1.9 < |z| | |z| < 2) = 0.0125.
    assert abs((distance > 1.9).mean() - 0.0125) < 5 * math.sqrt(0.0125 / N)


def test_random_uniform():
    values = initializers.RandomUniform(1.0, 3.0, seed=1)((N,), "float64")
    check_moments(values, 2.0, 2 / math.sqrt(12))
    assert values.min() >= 1.0
    assert values.max() < 3.0
    check_moments(initializers.RandomUniform(seed=1)((N,), "float64"), 0.0, 0.1 / math.sqrt(12))


@pytest.mark.parametrize(
    ("shape", "fans"),
    [
        ((), (1, 1)),
        ((7,), (7, 7)),
        ((3, 5), (3, 5)),
        ((2, 3, 5), (6, 10)),
        ((1, 3, 1, 2), (3, 6)),
        ((2, 3, 4, 5), (24, 30)),
        ((0,), (0, 0)),
    ],
)
def test_fans(shape, fans):
    assert initializers.compute_fans(shape) == fans


def test_fans_of_given_axes():
    assert initializers.compute_fans((2, 3, 4, 5), [0, 2], [-1]) == (8, 5)
    assert initializers.compute_fans((2, 3, 4, 5), [0, 2], None) == (24, 30)


@pytest.mark.parametrize("distribution", ["truncated_normal", "untruncated_normal", "uniform"])
@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 100), ("fan_out", 400), ("fan_avg", 250)])
def test_variance_scaling(mode, fan, distribution):
    values = initializers.VarianceScaling(2.0, mode, distribution, seed=1)((100, 400), "float64")
    stddev = math.sqrt(2.0 / fan)
    check_moments(values, 0.0, stddev)
    bound = {
        "truncated_normal": 2 / 0.87962566103423978,
        "uniform": math.sqrt(3),
        "untruncated_normal": math.inf,
    }
    assert np.abs(values).max() <= bound[distribution] * stddev * (1 + 1e-12)  # the bound is itself rounded
    assert np.abs(values).max() > 1.7 * stddev


@pytest.mark.parametrize(
    ("name", "scale", "mode"),
    [("Glorot", 1.0, "fan_avg"), ("He", 2.0, "fan_in"), ("Lecun", 1.0, "fan_in")],
)
@pytest.mark.parametrize(("form", "distribution"), [("Normal", "truncated_normal"), ("Uniform", "uniform")])
def test_named_schemes_are_variance_scaling(name, scale, mode, form, distribution):
    named = getattr(initializers, name + form)(seed=5)
    general = initializers.VarianceScaling(scale, mode, distribution, seed=5)
    np.testing.assert_array_equal(named((6, 9)), general((6, 9)))
    assert named.get_config() == {"seed": 5}


def test_given_axes_set_the_scale():
    values = initializers.HeNormal(seed=1, input_axes=[1], output_axes=[0])((400, 100), "float64")
    check_moments(values, 0.0, math.sqrt(2 / 100))


def test_normal_is_another_name_of_truncated_normal():
    scaling = initializers.VarianceScaling
    assert scaling(distribution="normal") == scaling(distribution="truncated_normal")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("VarianceScaling", {"scale": 0}, "scale must be > 0, received 0"),
        ("VarianceScaling", {"scale": -1.0}, "scale must be a finite number >= 0, received -1.0"),
        (
            "VarianceScaling",
            {"mode": "fan"},
            "mode must be one of 'fan_in', 'fan_out', 'fan_avg', received 'fan'",
        ),
        ("VarianceScaling", {"distribution": "cauchy"}, "distribution must be one of .*, received 'cauchy'"),
        ("HeNormal", {"input_axes": 0}, "input_axes must be None or integers, received 0"),
        ("HeNormal", {"output_axes": [0.5]}, r"output_axes must be None or integers, received \[0.5\]"),
        ("RandomNormal", {"stddev": -0.1}, "stddev must be a finite number >= 0, received -0.1"),
        ("RandomNormal", {"mean": "a"}, "mean must be a finite number, received 'a'"),
        (
            "RandomUniform",
            {"minval": 1.0, "maxval": 0.0},
            "maxval must be a finite number >= 1, received 0.0",
        ),
        ("RandomUniform", {"minval": math.nan}, "minval must be a finite number, received nan"),
    ],
)
def test_bad_argument_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(initializers, name)(**arguments)


@pytest.mark.parametrize("identifier", ["ones", initializers.Ones, initializers.Ones(), np.ones])
def test_initialize_takes_every_identifier(identifier):
    values = initialize(identifier, (1, 3), "float64")
    np.testing.assert_array_equal(values, np.ones((1, 3)))
    assert values.dtype == np.float64


def test_initialize_passes_the_dtype_where_the_signature_has_it():
    received = []

    def with_dtype(shape, dtype=None):
        received.append(dtype)
        return np.ones(shape, dtype)

    def with_keywords(shape, **options):
        received.append(options["dtype"])
        return np.ones(shape)

    def without(shape, fill=1):
        return np.full(shape, fill, "int64")

    for function in (with_dtype, with_keywords, without):
        np.testing.assert_array_equal(initialize(function, (3,), "float64"), np.ones(3), strict=True)
    assert received == [np.dtype("float64")] * 2


@pytest.mark.parametrize("function", [lambda s, d: s, lambda: 1, lambda shape, dtype, rng: 1, lambda *, dtype: 1])
def test_a_function_of_other_arguments(function):
    with pytest.raises(
        TypeError, match=r"^gamma_initializer .* must be a function of \(shape\) or .* received one of \("
    ):
        initialize(function, (3,), argument="gamma_initializer")


def test_an_error_inside_a_foreign_function_comes_through():
    def broken(shape, dtype=None):
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        initialize(broken, (3,))


def test_a_function_whose_signature_cannot_be_read_is_called_with_the_shape():
    class Unreadable:
        __signature__ = "none"

        def __call__(self, shape):
            return np.ones(shape)

    np.testing.assert_array_equal(initialize(Unreadable(), (3,)), np.ones(3, np.float32))


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (4,)])
def test_initialize_refuses_another_shape(shape):
    with pytest.raises(ValueError, match=r"shape \(3,\), received shape") as caught:
        initialize(lambda _: np.ones(shape), (3,))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("values", [np.ones(3, complex), np.array(["1", "2", "3"]), np.array([None] * 3)])
def test_initialize_refuses_what_is_not_real(values):
    with pytest.raises(TypeError, match="must return real numbers") as caught:
        initialize(lambda _: values, (3,))
    assert str(values.dtype) in str(caught.value)


def test_initialize_refuses_a_masked_array():
    with pytest.raises(TypeError, match=r"^gamma_initializer .* received a masked array"):
        initialize(lambda shape: np.ma.ones(shape), (3,), argument="gamma_initializer")


def test_initialize_returns_an_array_of_its_own():
    shared = np.ones((2, 3), np.float32)
    shared.flags.writeable = False
    first, second = (initialize(lambda shape, dtype: shared, (2, 3)) for _ in range(2))
    first[:] = 5
    np.testing.assert_array_equal(second, np.ones((2, 3)))
    np.testing.assert_array_equal(shared, np.ones((2, 3)))


def test_initialize_returns_c_order():
    values = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    initialized = initialize(lambda shape: values, (2, 3))
    assert initialized.flags.c_contiguous
    np.testing.assert_array_equal(initialized, values)
