"""Initializers, regularizers and constraints beside those of tf_keras and Keras 3."""

import json
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import pytest

from nbbn import constraints, initializers, regularizers

tf = pytest.importorskip("tensorflow", reason="parity needs tensorflow")
tf_keras = pytest.importorskip("tf_keras", reason="parity needs tf_keras")
keras = pytest.importorskip("keras", reason="parity needs Keras 3")

pytestmark = pytest.mark.parity

INITIALIZERS = [
    "Zeros",
    "Ones",
    "Constant",
    "RandomNormal",
    "RandomUniform",
    "TruncatedNormal",
    "VarianceScaling",
]
INITIALIZERS += [scheme + form for scheme in ("Glorot", "He", "Lecun") for form in ("Normal", "Uniform")]
RANDOM = INITIALIZERS[3:]
REGULARIZERS = ["L1", "L2", "L1L2"]
CONSTRAINTS = ["MaxNorm", "NonNeg", "UnitNorm", "MinMaxNorm"]
EVERY = [
    *(("initializers", initializers, name) for name in INITIALIZERS),
    *(("regularizers", regularizers, name) for name in REGULARIZERS),
    *(("constraints", constraints, name) for name in CONSTRAINTS),
]
# Objects with arguments that are no defaults, exact in float32 so that configs can be compared for equality.
GIVEN = [
    ("initializers", initializers, "Constant", {"value": 2.5}),
    ("initializers", initializers, "RandomNormal", {"mean": 1.0, "stddev": 2.0, "seed": 3}),
    ("initializers", initializers, "RandomUniform", {"minval": -2.0, "maxval": 3.0, "seed": 3}),
    ("initializers", initializers, "TruncatedNormal", {"mean": 1.0, "stddev": 2.0, "seed": 3}),
    (
        "initializers",
        initializers,
        "VarianceScaling",
        {"scale": 2.0, "mode": "fan_avg", "distribution": "uniform", "seed": 3},
    ),
    ("initializers", initializers, "GlorotUniform", {"seed": 3}),
    ("regularizers", regularizers, "L1", {"l1": 0.5}),
    ("regularizers", regularizers, "L2", {"l2": 0.25}),
    ("regularizers", regularizers, "L1L2", {"l1": 0.5, "l2": 0.25}),
    ("constraints", constraints, "MaxNorm", {"max_value": 1.5, "axis": [0, 1]}),
    ("constraints", constraints, "NonNeg", {}),
    ("constraints", constraints, "UnitNorm", {"axis": 1}),
    (
        "constraints",
        constraints,
        "MinMaxNorm",
        {"min_value": 0.5, "max_value": 0.75, "rate": 0.5, "axis": -1},
    ),
]
FRAMEWORKS = [tf_keras, keras]
each_framework = pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda framework: framework.__name__)
each_given = pytest.mark.parametrize(("area", "module", "name", "arguments"), GIVEN)

# One side computes with float32 factors or in float32: some roundings of 2^-24, over at most 24 summands.
FLOAT32 = 2e-6


def foreign(framework, area, name, **arguments):
    return getattr(getattr(framework, area), name)(**arguments)


@pytest.mark.parametrize(("area", "module", "name"), EVERY)
def test_defaults_are_those_of_tf_keras(area, module, name):
    ours, theirs = getattr(module, name)().get_config(), foreign(tf_keras, area, name).get_config()
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        # tf_keras keeps a regularizer's factor in float32.
        assert ours[key] == (pytest.approx(value, rel=2**-24) if isinstance(value, float) else value)


@pytest.mark.parametrize(("area", "module", "name"), EVERY)
def test_snake_case_name_is_that_of_tf_keras(area, module, name):
    snake_name = "l1_l2" if name == "L1L2" else tf_keras.src.utils.generic_utils.to_snake_case(name)
    assert type(getattr(tf_keras, area).get(snake_name)).__name__ == name
    assert type(module.get(snake_name)).__name__ == name


@pytest.mark.parametrize(("name", "framework"), [("l1_l2", tf_keras), ("l1l2", keras)])
def test_names_of_l1l2_have_the_defaults_of_keras(name, framework):
    ours, theirs = regularizers.get(name).get_config(), framework.regularizers.get(name).get_config()
    assert ours == pytest.approx(theirs, rel=2**-24)


@each_framework
@each_given
def test_our_config_is_read_by_keras(area, module, name, arguments, framework):
    config = json.loads(json.dumps(module.serialize(getattr(module, name)(**arguments))))
    theirs = getattr(framework, area).get(config)
    assert type(theirs) is getattr(getattr(framework, area), name)
    assert theirs.get_config().items() >= arguments.items()


@each_framework
@each_given
def test_config_of_keras_is_read(area, module, name, arguments, framework):
    theirs = foreign(framework, area, name, **arguments)
    config = json.loads(json.dumps(getattr(framework, area).serialize(theirs)))
    assert "module" in config
    assert module.get(config) == getattr(module, name)(**arguments)


@each_given
def test_legacy_config_of_tf_keras_is_read(area, module, name, arguments):
    theirs = foreign(tf_keras, area, name, **arguments)
    config = json.loads(json.dumps(getattr(tf_keras, area).serialize(theirs, use_legacy_format=True)))
    assert "module" not in config
    assert module.get(config) == getattr(module, name)(**arguments)


@each_framework
@each_given
def test_object_of_keras_is_kept_and_serialized(area, module, name, arguments, framework):
    theirs = foreign(framework, area, name, **arguments)
    assert module.get(theirs) is theirs
    assert module.get(module.serialize(theirs)) == getattr(module, name)(**arguments)


@each_framework
def test_config_of_an_array_is_read_and_written(framework):
    theirs = framework.initializers.Constant(np.array([1.0, 2.0], np.float32))
    ours = initializers.get(framework.initializers.serialize(theirs))
    np.testing.assert_array_equal(ours((2,)), [1.0, 2.0])
    again = tf_keras.initializers.get(initializers.serialize(ours))
    np.testing.assert_array_equal(np.asarray(again((1, 2))), ours((1, 2)))


@pytest.mark.filterwarnings("ignore:The `keras.initializers.serialize")  # tf_keras, for a function
@each_framework
def test_own_class_and_function_of_a_user_are_refused_by_config(framework):
    class Zeros(framework.initializers.Initializer):
        pass

    def zeros(shape, dtype=None):
        return np.ones(shape)

    for own in (Zeros(), zeros):
        with pytest.raises(ValueError, match="must be passed as the object or function itself"):
            initializers.get(framework.initializers.serialize(own))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", INITIALIZERS)
@each_framework
def test_initializer_of_keras_is_called(framework, name, dtype):
    dtype = np.dtype(tf.as_dtype(dtype).as_numpy_dtype)
    values = initializers.initialize(foreign(framework, "initializers", name), (1, 3, 1, 2), dtype)
    assert type(values) is np.ndarray
    assert values.shape == (1, 3, 1, 2)
    assert values.dtype == dtype
    values[...] = 0


def test_initializer_of_tensorflow_1_is_called():
    values = initializers.initialize(tf.compat.v1.constant_initializer(2.5), (3,), "float64")
    np.testing.assert_array_equal(values, [2.5, 2.5, 2.5])


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 5), (1, 3, 1, 2), (2, 3, 4, 5), (1, 1, 1, 1, 6)])
def test_fans_are_those_of_tf_keras(shape):
    theirs = tf_keras.src.initializers.initializers._compute_fans(shape)
    assert initializers.compute_fans(shape) == theirs


@pytest.mark.parametrize("name", RANDOM)
def test_random_values_have_the_distribution_of_tf_keras(name):
    shape = (100, 200)
    ours = getattr(initializers, name)(seed=1)(shape).astype("float64")
    theirs = np.asarray(foreign(tf_keras, "initializers", name, seed=1)(shape), "float64")
    # The share of n values below a point has a standard deviation of at most sqrt(1/4 / n), the difference of
    # two shares one of sqrt(1/2 / n); five of them are allowed.
    n = ours.size
    grid = np.linspace(theirs.min(), theirs.max(), 41)
    below_ours, below_theirs = ((values[..., None] <= grid).mean(axis=(0, 1)) for values in (ours, theirs))
    np.testing.assert_allclose(below_ours, below_theirs, rtol=0, atol=5 * np.sqrt(0.5 / n))
    # A bounded distribution comes within 1 % of its bound in 20,000 draws, on either side.
    if not name.startswith("RandomNormal"):
        np.testing.assert_allclose([ours.min(), ours.max()], [theirs.min(), theirs.max()], rtol=0.01)


W = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
W[0, 0, 0] = 0.0  # where |w| has no derivative, and the sign of NonNeg changes


@each_framework
@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, arguments) for area, _, name, arguments in GIVEN if area == "regularizers"]
    + [("L1L2", {"l1": 0.3}), ("L1L2", {})],
)
def test_penalty_and_gradient_agree(framework, name, arguments):
    ours, theirs = (
        getattr(regularizers, name)(**arguments),
        foreign(framework, "regularizers", name, **arguments),
    )
    variable = tf.Variable(W)
    with tf.GradientTape() as tape:
        penalty = tf.convert_to_tensor(theirs(variable))
    slope = tape.gradient(penalty, variable, unconnected_gradients=tf.UnconnectedGradients.ZERO).numpy()
    assert ours(W) == pytest.approx(float(penalty), rel=FLOAT32)
    np.testing.assert_allclose(ours.gradient(W), slope, rtol=FLOAT32)
    assert ours.gradient(W)[0, 0, 0] == 0.0


@each_framework
@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_regularizer_object_of_keras_has_loss_and_gradient(framework, name, dtype):
    w = W.astype(dtype)
    arguments = {"l1": 0.5, "l2": 0.25} if name == "L1L2" else {name.lower(): 0.3}
    ours, theirs = (
        getattr(regularizers, name)(**arguments),
        foreign(framework, "regularizers", name, **arguments),
    )
    slope = regularizers.gradient(theirs, w)
    assert type(slope) is np.ndarray
    assert slope.dtype == w.dtype
    np.testing.assert_allclose(slope, ours.gradient(w), rtol=FLOAT32)
    assert regularizers.loss(theirs, w) == pytest.approx(ours(w), rel=FLOAT32)


@each_framework
def test_regularizer_of_keras_without_a_known_gradient_is_refused(framework):
    theirs = framework.regularizers.OrthogonalRegularizer()
    with pytest.raises(TypeError, match=r"have a method gradient\(w\)"):
        regularizers.gradient(theirs, W[0])


@each_framework
@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, arguments) for area, _, name, arguments in GIVEN if area == "constraints"]
    + [
        ("MaxNorm", {}),
        ("UnitNorm", {"axis": [0, 2]}),
        ("MinMaxNorm", {}),
        ("MinMaxNorm", {"min_value": 0.9}),
    ],
)
def test_constraint_agrees_and_the_object_of_keras_works(framework, name, arguments):
    ours, theirs = (
        getattr(constraints, name)(**arguments),
        foreign(framework, "constraints", name, **arguments),
    )
    np.testing.assert_allclose(ours(W), np.asarray(theirs(W)), rtol=FLOAT32)
    for dtype in ("float32", "float64"):
        projected = constraints.project(theirs, W.astype(dtype))
        assert type(projected) is np.ndarray
        assert projected.dtype == np.dtype(dtype)
        np.testing.assert_allclose(projected, ours(W), rtol=FLOAT32)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraint_of_a_zero_weight_agrees(name):
    w = np.zeros(3, np.float32)
    ours, theirs = getattr(constraints, name)()(w), foreign(tf_keras, "constraints", name)(w)
    np.testing.assert_array_equal(ours, np.asarray(theirs))
