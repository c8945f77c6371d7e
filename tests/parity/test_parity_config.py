"""What surrounds the computation, beside tf_keras: configs, weights, losses and shapes."""

import itertools
import json
from typing import Any

import numpy as np
import pytest

import nbbn
from nbbn.compat import v1
from tests.parity.tf_side import LAYERS, tf, tf_keras

pytestmark = pytest.mark.parity

NBBN_LAYERS = {"V1": v1.keras.layers.BatchNormalization, "V2": nbbn.BatchNormalization}
KerasLayer = LAYERS["V2"]
each_version = pytest.mark.parametrize("version", LAYERS)

regularizers, constraints, initializers = tf_keras.regularizers, tf_keras.constraints, tf_keras.initializers

# Factors are exact in float32, which is what tf_keras keeps them in.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "numbers": {"axis": 1, "momentum": 0.9, "epsilon": 1e-5, "center": False, "name": "bn"},
    "axes": {"axis": [1, -1], "scale": False, "trainable": False},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 3.0, "rmin": 0.25, "dmax": 5.0}, "renorm_momentum": 0.9},
    "renorm unclipped": {"renorm": True},
    "virtual": {"virtual_batch_size": 2, "axis": -1},
    "virtual renorm": {"virtual_batch_size": 4, "renorm": True, "renorm_clipping": {"rmax": 2.0}},
    "fused": {"fused": False},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "float64": {"dtype": "float64"},
    "names": {
        "beta_initializer": "ones",
        "gamma_initializer": "he_normal",
        "moving_mean_initializer": "random_normal",
        "moving_variance_initializer": "ones",
        "beta_regularizer": "l1",
        "gamma_regularizer": "l1_l2",
        "beta_constraint": "non_neg",
        "gamma_constraint": "unit_norm",
    },
    "objects": {
        "beta_initializer": initializers.Constant(0.5),
        "gamma_initializer": initializers.RandomUniform(0.5, 1.5, seed=3),
        "moving_mean_initializer": initializers.TruncatedNormal(stddev=0.5, seed=4),
        "moving_variance_initializer": initializers.Constant(2.0),
        "beta_regularizer": regularizers.L1L2(0.5, 0.25),
        "gamma_regularizer": regularizers.L2(0.125),
        "beta_constraint": constraints.MinMaxNorm(0.5, 2.0, rate=0.5),
        "gamma_constraint": constraints.MaxNorm(1.5),
    },
}
each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)

CONFIG_KEYS = [
    "name",
    "trainable",
    "dtype",
    "axis",
    "momentum",
    "epsilon",
    "center",
    "scale",
    *(f"{name}_initializer" for name in ("beta", "gamma", "moving_mean", "moving_variance")),
    *(f"{name}_{what}" for what in ("regularizer", "constraint") for name in ("beta", "gamma")),
]


def as_json(config: dict[str, Any]) -> dict[str, Any]:
    """The config after a file; tf_keras wraps its dicts, which Python's encoder does not know."""
    return json.loads(json.dumps(config, default=dict))


def essence(value: Any) -> Any:
    """A config without what does not count: where a class lives, and float32 roundings."""
    if isinstance(value, dict):
        return {k: essence(v) for k, v in value.items() if k not in ("module", "registered_name")}
    if isinstance(value, list | tuple):
        return [essence(v) for v in value]
    return float(np.float32(value)) if isinstance(value, float) else value


def assert_same_config(ours: dict[str, Any], theirs: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    ours, theirs = as_json(ours), as_json(theirs)
    assert {k: v for k, v in essence(ours).items() if k not in but} == {
        k: v for k, v in essence(theirs).items() if k not in but
    }


# --- configs ------------------------------------------------------------


@each_version
@each_options
def test_config_of_the_same_arguments_is_the_same(version: str, options: dict[str, Any]) -> None:
    """Apart from `fused`, which tf_keras forgets."""
    arguments = {"name": "bn", "dtype": "float32"} | options
    ours, theirs = NBBN_LAYERS[version](**arguments).get_config(), LAYERS[version](**arguments).get_config()
    assert_same_config(ours, theirs, but=("fused",))
    assert set(CONFIG_KEYS) <= set(ours)
    assert ours.get("fused") == options.get("fused")


@each_options
def test_tf_keras_reads_the_config_of_nbbn(options: dict[str, Any]) -> None:
    config = as_json(nbbn.BatchNormalization(**{"dtype": "float32"} | options).get_config())
    theirs = KerasLayer.from_config(config)
    assert_same_config(theirs.get_config(), config, but=("fused",))
    if "fused" in options:
        assert theirs.fused == options["fused"]


@each_options
def test_nbbn_reads_the_config_of_tf_keras(options: dict[str, Any]) -> None:
    config = KerasLayer(**{"dtype": "float32"} | options).get_config()
    for given in (config, as_json(config)):
        ours = nbbn.BatchNormalization.from_config(given).get_config()
        assert_same_config(ours, config)
        json.dumps(ours)


@pytest.mark.parametrize("axis", [-1, 1, [1, 3]], ids=str)
@each_options
def test_nbbn_reads_the_config_of_a_built_layer(options: dict[str, Any], axis: Any) -> None:
    """Of which tf_keras has resolved the axis, for virtual batches in the shape with one dimension more."""
    theirs = KerasLayer(**{"axis": axis} | options)
    theirs.build((8, 5, 4, 3))
    ours = nbbn.BatchNormalization.from_config(as_json(theirs.get_config()))
    whole = as_json(tf_keras.saving.serialize_keras_object(theirs))
    ours.build((8, 5, 4, 3))
    for one in (ours, nbbn.BatchNormalization.from_config(whole)):
        assert [w.shape for w in one.get_weights()] == [w.shape for w in theirs.get_weights()]


def test_config_without_a_dtype_is_float32_in_tf_keras() -> None:
    config = as_json(nbbn.BatchNormalization().get_config())
    assert KerasLayer.from_config(config).dtype == "float32"


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_config_with_a_dtype_policy(policy: str) -> None:
    """nbbn computes in the policy's compute dtype, with float32 variables for 16 bits, as those policies have it."""
    theirs = KerasLayer(dtype=tf_keras.mixed_precision.Policy(policy))
    ours = nbbn.BatchNormalization.from_config(as_json(theirs.get_config()))
    x = np.ones((4, 3), theirs.compute_dtype)
    assert ours(x).dtype == theirs(x).numpy().dtype
    assert [w.dtype for w in ours.get_weights()] == [w.dtype for w in theirs.get_weights()]


@each_options
def test_behaviour_survives_both_ways(options: dict[str, Any]) -> None:
    """nbbn -> tf_keras -> nbbn: same initial weights where they are not random, same losses, same step."""
    first = nbbn.BatchNormalization(**{"dtype": "float32"} | options)
    theirs = KerasLayer.from_config(as_json(first.get_config()))
    last = nbbn.BatchNormalization.from_config(as_json(theirs.get_config()))
    x = np.random.default_rng(5).normal(1, 2, size=(8, 4, 3)).astype(first.dtype)
    for layer in (first, last, theirs):
        layer.build(x.shape)
    for one, other, keras in zip(first.get_weights(), last.get_weights(), theirs.get_weights(), strict=True):
        assert one.shape == other.shape == keras.shape
        assert one.dtype == other.dtype == keras.dtype
    last.set_weights(first.get_weights())
    np.testing.assert_array_equal(last(x, training=True), first(x, training=True))
    for one, other in zip(last.get_weights(), first.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    # Factors pass through tf_keras as float32.
    np.testing.assert_allclose(last.losses, first.losses, rtol=1e-6)


# --- weights, losses, shapes ------------------------------------------------------------


SHAPES = [((8, 3), -1), ((8, 5, 3), 1), ((8, 5, 4, 3), [1, 3]), ((8, 5, 4, 3), [-1, 1]), ((8, 5, 2, 2, 3), [4])]
BUILDS = [
    pytest.param(shape, {"axis": axis, "center": center, "scale": scale, "renorm": renorm, "virtual_batch_size": size})
    for (shape, axis), center, scale, renorm, size in itertools.product(
        SHAPES, (True, False), (True, False), (False, True), (None, 4)
    )
]


@each_version
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize(("shape", "options"), BUILDS)
def test_weights(version: str, trainable: bool, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """Names, order, shapes, dtypes, initial values, counts, and which are trainable."""
    theirs = LAYERS[version](**options, trainable=trainable)
    ours = NBBN_LAYERS[version](**options, trainable=trainable)
    for layer in (theirs, ours):
        assert not layer.built
        layer.build(shape)
        assert layer.built
    names = [variable.name.partition(":")[0] for variable in theirs.weights]
    assert len(names) == len(ours.weights)
    for name, array, variable in zip(names, ours.weights, theirs.weights, strict=True):
        np.testing.assert_array_equal(array, getattr(ours, name))
        np.testing.assert_array_equal(array, variable.numpy())
        assert array.dtype == variable.numpy().dtype
        assert array.shape == tuple(variable.shape)
    for which in ("trainable_weights", "non_trainable_weights"):
        expected = [variable.name.partition(":")[0] for variable in getattr(theirs, which)]
        assert [name_of(array, ours) for array in getattr(ours, which)] == expected
    assert ours.count_params() == theirs.count_params()
    assert ours.compute_output_shape(shape) == theirs.compute_output_shape(shape)
    for name in ("gamma", "beta"):
        assert (getattr(ours, name) is None) == (getattr(theirs, name) is None)


def name_of(array: np.ndarray, layer: Any) -> str:
    """The attribute that this weight is a view of."""
    names = (
        "gamma",
        "beta",
        "moving_mean",
        "moving_variance",
        "moving_stddev",
        "renorm_mean",
        "renorm_stddev",
    )
    found = [n for n in names if getattr(layer, n) is not None and np.may_share_memory(getattr(layer, n), array)]
    assert len(found) == 1
    return found[0]


def set_random_weights(layer: nbbn.BatchNormalization, seed: int) -> None:
    """Of both signs, but for the variance, which is the last."""
    rng = np.random.default_rng(seed)
    *others, variance = (rng.normal(size=w.shape) for w in layer.get_weights())
    layer.set_weights([*others, np.abs(variance)])


def test_initial_state_with_renorm_follows_the_initializers() -> None:
    """moving_stddev and renorm_stddev start at the root of the moving variance, renorm_mean at the moving mean."""
    options = {"renorm": True, "moving_mean_initializer": "ones"}
    theirs = KerasLayer(**options, moving_variance_initializer=initializers.Constant(4.0))
    ours = nbbn.BatchNormalization(**options, moving_variance_initializer=initializers.Constant(4.0))
    for layer in (theirs, ours):
        layer.build((4, 3))
    for mine, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, other)


@each_version
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_losses(version: str, center: bool, scale: bool) -> None:
    """One per regularized weight that exists, in the order of the weights."""
    options = {
        "center": center,
        "scale": scale,
        "beta_regularizer": regularizers.L1L2(0.5, 0.25),
        "gamma_regularizer": regularizers.L2(0.125),
    }
    theirs, ours = LAYERS[version](**options), NBBN_LAYERS[version](**options)
    for layer in (theirs, ours):
        layer.build((4, 3))
    set_random_weights(ours, 6)
    theirs.set_weights(ours.get_weights())
    expected = [float(loss) for loss in theirs.losses]
    assert len(expected) == center + scale
    # Sums of three float32 values.
    np.testing.assert_allclose(ours.losses, expected, rtol=1e-6)
    np.testing.assert_allclose(ours.get_losses_for(None), expected, rtol=1e-6)


def test_regularization_gradients() -> None:
    """Of the sum of the losses, by GradientTape."""
    options = {"beta_regularizer": regularizers.L1L2(0.5, 0.25), "gamma_regularizer": regularizers.L2(0.125)}
    theirs, ours = KerasLayer(**options), nbbn.BatchNormalization(**options)
    for layer in (theirs, ours):
        layer.build((4, 3))
    set_random_weights(ours, 7)
    theirs.set_weights(ours.get_weights())
    with tf.GradientTape() as tape:
        loss = tf.add_n(theirs.losses)
    gradients = ours.regularization_gradients()
    for name, expected in tape.gradient(loss, {"gamma": theirs.gamma, "beta": theirs.beta}).items():
        np.testing.assert_allclose(getattr(gradients, name), expected.numpy(), rtol=1e-6)


def test_constraints_apply_after_a_step() -> None:
    """What a Keras optimizer does to constrained variables, `apply_constraints` does."""
    options = {"beta_constraint": constraints.NonNeg(), "gamma_constraint": constraints.MaxNorm(1.0)}
    theirs, ours = KerasLayer(**options), nbbn.BatchNormalization(**options)
    for layer in (theirs, ours):
        layer.build((4, 3))
    set_random_weights(ours, 8)
    theirs.set_weights(ours.get_weights())
    optimizer = tf_keras.optimizers.legacy.SGD(0.0)
    optimizer.apply_gradients([(tf.zeros_like(v), v) for v in theirs.trainable_weights])
    ours.apply_constraints()
    for mine, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        # A norm of three values in float32.
        np.testing.assert_allclose(mine, other, rtol=1e-6)
    assert (ours.beta >= 0).all()


@each_version
@pytest.mark.parametrize(
    "wrong",
    [
        [],
        [np.ones(3)] * 3,
        [np.ones(3)] * 5,
        [np.ones(4)] * 4,
        [np.ones((1, 3))] * 4,
    ],
)
def test_weights_that_do_not_fit_are_refused(version: str, wrong: list[np.ndarray]) -> None:
    theirs, ours = LAYERS[version](), NBBN_LAYERS[version]()
    for layer in (theirs, ours):
        layer.build((4, 3))
        before = [w.copy() for w in layer.get_weights()]
        with pytest.raises(ValueError, match=r"weight|shape"):
            layer.set_weights(wrong)
        if layer is ours:
            for new, old in zip(layer.get_weights(), before, strict=True):
                np.testing.assert_array_equal(new, old)


INVALID = [
    ({"axis": 2}, (4, 3), ValueError),
    ({"axis": -3}, (4, 3), ValueError),
    ({"axis": [1, 1]}, (4, 3, 2), ValueError),
    ({"axis": [1, -2]}, (4, 3, 2), ValueError),
    ({"axis": "last"}, (4, 3), TypeError),
    ({"axis": 1.0}, (4, 3), TypeError),
    ({"axis": 1}, (4, None, 2), ValueError),
    ({"renorm": True, "renorm_clipping": {"rmax": 2.0, "max": 1.0}}, (4, 3), ValueError),
    ({"fused": True}, (4, 3), ValueError),
    ({"fused": True, "axis": 2}, (4, 3, 2, 5), ValueError),
    ({"fused": True, "axis": [1, 3]}, (4, 3, 2, 5), ValueError),
    ({"fused": True, "renorm": True}, (4, 3, 2, 5), ValueError),
    ({"fused": True, "virtual_batch_size": 2}, (4, 3, 2, 5), ValueError),
    ({"fused": True, "adjustment": lambda shape: (1.0, 0.0)}, (4, 3, 2, 5), ValueError),
    ({"fused": True, "dtype": "float64"}, (4, 3, 2, 5), ValueError),
    ({"virtual_batch_size": 0}, (4, 3), ValueError),
    ({"virtual_batch_size": -2}, (4, 3), ValueError),
    ({"virtual_batch_size": 2, "axis": 0}, (4, 3), ValueError),
    ({"virtual_batch_size": 2, "axis": [0, 1]}, (4, 3, 2), ValueError),
    ({"virtual_batch_size": 2, "adjustment": lambda shape: (1.0, 0.0)}, (4, 3), ValueError),
]


@pytest.mark.parametrize(("options", "shape", "error"), INVALID)
def test_what_tf_keras_refuses_is_refused(
    options: dict[str, Any], shape: tuple[int | None, ...], error: type[Exception]
) -> None:
    """At construction or at build, with the same type of error."""
    for layer_class in (KerasLayer, nbbn.BatchNormalization):
        with pytest.raises(error):
            layer_class(**options).build(shape)


@each_version
@pytest.mark.parametrize("shape", [(4, 3, 2), (4, 4), (4,)])
def test_input_of_another_shape_is_refused(version: str, shape: tuple[int, ...]) -> None:
    for layer in (LAYERS[version](), NBBN_LAYERS[version]()):
        layer.build((4, 3))
        with pytest.raises(ValueError, match=r"shape|rank|axis"):
            layer(np.ones(shape, np.float32))
