"""What describes a layer: its config, its copies, its name."""

import copy
import functools
import json
import pickle
import warnings

import numpy as np
import pytest

import nbbn
from nbbn import BatchNormalization
from tests.helpers.layer_examples import X, assert_same_weights, trained

# --- config ----------------------------------------------------------------------------------

KERAS_KEYS = {
    "axis",
    "momentum",
    "epsilon",
    "center",
    "scale",
    "beta_initializer",
    "gamma_initializer",
    "moving_mean_initializer",
    "moving_variance_initializer",
    "beta_regularizer",
    "gamma_regularizer",
    "beta_constraint",
    "gamma_constraint",
    "name",
    "trainable",
    "dtype",
}

CONFIGS = {
    "defaults": {},
    "axes": {"axis": [1, -1]},
    "tuple of axes": {"axis": (1, 2)},
    "NumPy axis": {"axis": np.int64(1)},
    "numbers": {"momentum": 0.5, "epsilon": 0.1, "name": "bn", "trainable": False, "center": False, "scale": False},
    "NumPy numbers": {"momentum": np.float32(0.5), "epsilon": np.float64(0.1)},
    "NumPy scalars": {"epsilon": np.float32(0.5), "renorm": True, "renorm_momentum": np.array(0.5)},
    "NumPy integer": {"virtual_batch_size": np.int32(2)},
    "NumPy bools": {"center": np.True_, "trainable": np.False_, "bessel_correction": np.True_},
    "NumPy fused": {"fused": np.False_},
    "momentum None": {"momentum": None},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 3, "rmin": 0.5, "dmax": 5.0}, "renorm_momentum": 0.9},
    "renorm unclipped": {"renorm": True},
    "renorm NumPy": {"renorm": True, "renorm_clipping": {"rmax": np.float32(3), "dmax": None}},
    "renorm infinite": {"renorm": True, "renorm_clipping": {"rmax": float("inf"), "dmax": float("inf")}},
    "virtual": {"virtual_batch_size": 4},
    "fused": {"fused": True, "axis": 3},
    "not fused": {"fused": False},
    "bessel": {"bessel_correction": False},
    "activation": {"activation": "relu"},
    "averages": {"debias": True, "skip_nonfinite": np.True_},
    "averages by default": {"debias": False, "skip_nonfinite": False},
    "no activation": {"activation": None},
    "Keras's name for no activation": {"activation": "linear"},
    "not synchronized": {"synchronized": False},
    "array of axes": {"axis": np.array([1, 3])},
    "range of axes": {"axis": range(1, 3)},
    "dtype": {"dtype": "bfloat16"},
    "NumPy dtype": {"dtype": np.float64},
    "components": {
        "beta_initializer": nbbn.initializers.Constant(2.0),
        "gamma_initializer": "random_normal",
        "gamma_regularizer": nbbn.regularizers.L1L2(0.1, 0.2),
        "beta_regularizer": "l2",
        "gamma_constraint": nbbn.constraints.MaxNorm(3.0),
        "beta_constraint": "non_neg",
    },
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_config_round_trip_through_json(options):
    """Strict JSON: other readers know no Infinity."""
    layer = BatchNormalization(**options)
    config = layer.get_config()
    text = json.dumps(config, allow_nan=False)
    twin = BatchNormalization.from_config(json.loads(text))
    assert twin.get_config() == config
    assert (twin.name, twin.trainable, twin.center, twin.scale) == (
        layer.name,
        layer.trainable,
        layer.center,
        layer.scale,
    )


def test_config_keys():
    assert set(BatchNormalization().get_config()) == KERAS_KEYS
    options = {"renorm": True, "bessel_correction": False, "activation": "relu", "debias": True, "skip_nonfinite": True}
    more = set(BatchNormalization(**options).get_config()) - KERAS_KEYS
    assert more == {*options, "renorm_clipping", "renorm_momentum"}


@pytest.mark.parametrize("options", [{}, {"axis": [1, -1]}, {"renorm": True}, {"axis": -2}], ids=str)
def test_config_is_the_same_after_build(options):
    layer = BatchNormalization(**options)
    before = layer.get_config()
    layer(np.ones((4, 3, 2), np.float32), training=True)
    assert layer.get_config() == before


def test_changing_a_config_changes_no_layer():
    layer = BatchNormalization(axis=[1, 2], gamma_initializer=nbbn.initializers.Constant([1.0, 2.0]))
    config = layer.get_config()
    config["axis"].append(3)
    config["gamma_initializer"]["config"]["value"].append(3.0)
    assert layer.get_config()["axis"] == [1, 2]
    assert layer.get_config()["gamma_initializer"]["config"] == {"value": [1.0, 2.0]}


def test_from_config_leaves_the_config_alone():
    config = BatchNormalization(renorm=True, axis=[1]).get_config()
    before = copy.deepcopy(config)
    BatchNormalization.from_config(config)
    assert config == before


def test_from_config_with_an_unknown_key():
    with pytest.raises(TypeError, match="momentumm"):
        BatchNormalization.from_config({"momentumm": 0.5})


WARNED = {
    "adjustment": ({"adjustment": lambda shape: (1.0, 0.0)}, "adjustment"),
    "clipping": ({"renorm": True, "renorm_clipping": {"rmax": lambda: 3.0, "dmax": 5.0}}, "renorm_clipping"),
    "initializer": ({"gamma_initializer": lambda shape: np.ones(shape)}, "gamma_initializer"),
    "regularizer": ({"beta_regularizer": lambda w: 0.0}, "beta_regularizer"),
    "constraint": ({"beta_constraint": functools.partial(np.clip, a_min=0, a_max=1)}, "beta_constraint"),
}


@pytest.mark.parametrize(("options", "what"), WARNED.values(), ids=WARNED)
def test_config_leaves_out_callables_with_a_warning(options, what):
    layer = BatchNormalization(name="bn", **options)
    with pytest.warns(UserWarning, match=f"bn.*{what}") as caught:
        config = layer.get_config()
    assert caught[0].filename == __file__, "the warning must point at the caller of get_config()"
    assert what == "renorm_clipping" or what not in config
    json.dumps(config)
    if what == "renorm_clipping":
        assert config["renorm_clipping"] == {"dmax": 5.0}
    BatchNormalization.from_config(config)


def test_config_without_callables_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BatchNormalization(renorm=True, renorm_clipping={"rmax": 3.0}).get_config()


def test_a_function_as_initializer_is_named_in_the_config():
    def my_initializer(shape, dtype):
        return np.full(shape, 3, dtype)

    layer = BatchNormalization(gamma_initializer=my_initializer)
    assert layer.get_config()["gamma_initializer"] == "my_initializer"
    layer.build((None, 2))
    np.testing.assert_array_equal(layer.gamma, 3)


def test_a_subclass_comes_back_as_itself():
    class Mine(BatchNormalization):
        pass

    assert type(Mine.from_config(Mine().get_config())) is Mine


# --- pickle and copy -----------------------------------------------------------------------------

DUPLICATES = {
    "pickle": lambda v: pickle.loads(pickle.dumps(v)),
    "deepcopy": copy.deepcopy,
}
DUPLICATED = pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)


@DUPLICATED
@pytest.mark.parametrize(
    "options",
    [{}, {"renorm": True, "renorm_clipping": {"rmax": 2.0}}, {"virtual_batch_size": 4}, {"momentum": None}],
    ids=str,
)
def test_duplicate_after_training(duplicate, options):
    layer = trained(**options)
    twin = duplicate(layer)
    assert_same_weights(layer, twin)
    for one in (layer, twin):
        one(X + 1, training=True)
    assert_same_weights(layer, twin)
    np.testing.assert_array_equal(layer(X), twin(X))


@DUPLICATED
def test_duplicate_before_build(duplicate):
    twin = duplicate(BatchNormalization(axis=1, gamma_regularizer="l2", name="bn"))
    assert (twin.name, twin.built, twin.axis) == ("bn", False, 1)
    assert twin(X).shape == X.shape


@DUPLICATED
def test_duplicates_share_nothing(duplicate):
    layer = trained()
    twin = duplicate(layer)
    before = layer.get_weights()
    twin.gamma[...] = 77
    twin(X, training=True)
    twin.trainable = False
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert layer.trainable


@DUPLICATED
def test_duplicate_of_a_layer_in_use(duplicate):
    """Its locks are held, or not: the copy's are open."""
    layer = trained()
    with layer._variables.lock:
        twin = duplicate(layer)
    twin(X, training=True)


# --- names and repr ----------------------------------------------------------------------------------


def test_automatic_names():
    first, second = BatchNormalization(), BatchNormalization()
    assert first.name != second.name
    for layer in (first, second):
        base, _, number = layer.name.rpartition("_")
        assert layer.name == "batch_normalization" or (base == "batch_normalization" and number.isdecimal())


def test_a_given_name_takes_no_number():
    before = BatchNormalization().name
    BatchNormalization(name="mine")
    after = BatchNormalization().name
    numbers = [int(n.rpartition("_")[2]) if n[-1].isdecimal() else 0 for n in (before, after)]
    assert numbers[1] == numbers[0] + 1


def test_repr():
    layer = BatchNormalization(axis=[1, 2], name="bn", dtype="float64")
    assert repr(layer) == "<BatchNormalization bn: axis=[1, 2]>"
    layer.build((None, 3, 2))
    assert repr(layer) == "<BatchNormalization bn: axis=[1, 2], parameters (1, 3, 2) float64>"
