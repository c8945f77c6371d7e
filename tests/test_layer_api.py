"""The layer's outside: config, copies, names, weights, losses, what it keeps alive, and several threads at once."""

import copy
import gc
import itertools
import json
import pickle
import sys
import threading
import warnings
import weakref

import numpy as np
import pytest

import nbbn
from nbbn import BatchNormalization

RNG = np.random.default_rng(0)
X = RNG.normal(2, 3, size=(8, 3)).astype(np.float32)
DY = RNG.normal(size=(8, 3)).astype(np.float32)


def trained(**options):
    """A layer whose every weight differs from its initial value."""
    layer = BatchNormalization(**{"momentum": 0.5, **options})
    layer(X, training=True)
    layer.gamma[...] = [1, 2, 3]
    layer.beta[...] = [4, 5, 6]
    return layer


def assert_same_weights(one, two):
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


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
    more = set(BatchNormalization(renorm=True, bessel_correction=False).get_config()) - KERAS_KEYS
    assert more == {"renorm", "renorm_clipping", "renorm_momentum", "bessel_correction"}


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
}


@pytest.mark.parametrize(("options", "what"), WARNED.values(), ids=WARNED)
def test_config_leaves_out_callables_with_a_warning(options, what):
    layer = BatchNormalization(name="bn", **options)
    with pytest.warns(UserWarning, match=f"bn.*{what}") as caught:
        config = layer.get_config()
    assert caught[0].filename == __file__, "the warning must point at the caller of get_config()"
    assert "adjustment" not in config
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


# --- weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("center", "scale"), list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_weight_lists(center, scale, renorm, trainable):
    layer = BatchNormalization(center=center, scale=scale, renorm=renorm, trainable=trainable)
    assert layer.weights == layer.trainable_weights == layer.non_trainable_weights == layer.get_weights() == []
    layer.build((None, 3))
    parameters = [layer.gamma] * scale + [layer.beta] * center
    statistics = [layer.moving_mean, layer.moving_variance]
    if renorm:
        statistics += [layer.moving_stddev, layer.renorm_mean, layer.renorm_stddev]
    for found, expected in (
        (layer.weights, parameters + statistics),
        (layer.trainable_weights, parameters if trainable else []),
        (layer.non_trainable_weights, statistics if trainable else parameters + statistics),
    ):
        assert len(found) == len(expected)
        assert all(np.shares_memory(a, b) for a, b in zip(found, expected, strict=True))
    assert (layer.gamma is None, layer.beta is None) == (not scale, not center)
    assert (layer.moving_stddev is None) == (not renorm)
    assert layer.count_params() == 3 * len(layer.weights)


def test_before_build():
    layer = BatchNormalization(renorm=True)
    assert not layer.built
    assert layer.gamma is layer.beta is layer.moving_mean is layer.renorm_stddev is None
    for use in (layer.count_params, lambda: layer.set_weights([]), lambda: setattr(layer, "gamma", [1.0])):
        with pytest.raises(ValueError, match="build"):
            use()


def test_build_twice_changes_nothing():
    layer = trained()
    before = layer.get_weights()
    layer.build((None, 3))
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_get_weights_are_copies():
    layer = trained()
    for weight in layer.get_weights():
        weight[...] = 77
    assert not any((weight == 77).any() for weight in layer.weights)


def test_set_weights():
    layer = BatchNormalization(renorm=True)
    layer.build((None, 3))
    values = [np.full(3, i, np.float64) for i in range(7)]
    layer.set_weights(values)
    for value, weight in zip(values, layer.weights, strict=True):
        np.testing.assert_array_equal(weight, value)
        assert weight.dtype == np.float32
    values[0][...] = 77
    assert (layer.gamma == 0).all(), "the layer must not keep the arrays that it was given"


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (np.ones(2), ValueError),
        (1.0, ValueError),
        ("abc", ValueError),
        (np.ones(3) * 1j, TypeError),
        (None, ValueError),
    ],
    ids=["shape", "scalar", "text", "complex", "None"],
)
@pytest.mark.parametrize("name", ["gamma", "moving_variance"])
def test_values_that_are_no_weight(value, error, name):
    layer = trained()
    before = layer.get_weights()
    with pytest.raises((error, ValueError)):
        setattr(layer, name, value)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_assigning_what_the_layer_does_not_have():
    layer = BatchNormalization(center=False)
    layer.build((None, 3))
    with pytest.raises(AttributeError, match="beta"):
        layer.beta = np.ones(3)
    with pytest.raises(AttributeError, match="renorm_mean"):
        layer.renorm_mean = np.ones(3)


def test_parameters_are_persistent():
    """An optimizer may hold them, and write to them in place."""
    layer = trained()
    gamma, beta = layer.gamma, layer.beta
    gamma -= 0.5
    layer.beta *= 2
    layer(X, training=True)
    layer.set_weights([w + 1 for w in layer.get_weights()])
    layer.gamma = layer.gamma + 1
    np.testing.assert_array_equal(gamma, [2.5, 3.5, 4.5])
    np.testing.assert_array_equal(beta, [9, 11, 13])
    assert np.shares_memory(gamma, layer.gamma)
    np.testing.assert_allclose(layer(layer.moving_mean[None])[0], beta, rtol=1e-6)


def test_assigned_statistics_are_used():
    layer = trained()
    layer.moving_mean = [1, 2, 3]
    layer.moving_variance = np.array([4, 9, 16]) - 1e-3
    y = layer(np.array([[1, 2, 3], [3, 5, 7]], np.float32))
    np.testing.assert_allclose(y, [layer.beta, layer.gamma + layer.beta], rtol=1e-6)


def test_statistics_that_were_read_do_not_change():
    """A training call replaces them: what was read before stays as it was."""
    layer = trained()
    mean = layer.moving_mean
    before = mean.copy()
    layer(X + 5, training=True)
    np.testing.assert_array_equal(mean, before)
    assert not np.array_equal(layer.moving_mean, before)


def test_layers_without_features():
    layer = BatchNormalization()
    assert layer(np.zeros((4, 0), np.float32), training=True).shape == (4, 0)
    assert [w.shape for w in layer.weights] == [(0,)] * 4


@pytest.mark.parametrize("shape", [(None, 3), [5, 3], (5, 3)])
def test_compute_output_shape(shape):
    assert BatchNormalization().compute_output_shape(shape) == tuple(shape)


def test_apply_is_the_call():
    layer = trained()
    np.testing.assert_array_equal(layer.apply(X), layer(X))
    layer.apply(X, training=True, mask=np.ones(8, bool))


def test_lists_are_inputs():
    with pytest.raises(TypeError, match="int64"):
        BatchNormalization()([[1, 2], [3, 4]])
    assert BatchNormalization()([[1.0, 2.0], [3.0, 4.0]]).dtype == np.float64


def test_masked_arrays_are_refused():
    x = np.ma.masked_less(X, 0)
    with pytest.raises(TypeError, match="mask"):
        BatchNormalization()(x, training=True)


# --- losses, constraints, updates ------------------------------------------------------------------------------


def test_losses():
    layer = BatchNormalization(gamma_regularizer=nbbn.regularizers.L2(0.5), beta_regularizer=nbbn.regularizers.L1(2.0))
    assert layer.losses == []
    layer.build((None, 3))
    layer.gamma[...] = [1, 2, 3]
    layer.beta[...] = [-1, 0, 1]
    assert layer.losses == layer.get_losses_for(None) == [7.0, 4.0]
    assert layer.get_losses_for(X) == []
    gradients = layer.regularization_gradients()
    np.testing.assert_array_equal(gradients.gamma, [1, 2, 3])
    np.testing.assert_array_equal(gradients.beta, [-2, 0, 2])
    assert gradients.inputs is None
    assert gradients.adjustment is None


def test_losses_of_what_does_not_exist():
    layer = BatchNormalization(center=False, beta_regularizer="l2", gamma_regularizer="l2")
    layer.build((None, 3))
    assert len(layer.losses) == 1
    assert layer.regularization_gradients().beta is None


def test_constraints():
    layer = BatchNormalization(gamma_constraint=nbbn.constraints.MaxNorm(1.0), beta_constraint="non_neg")
    layer.build((None, 2))
    gamma = layer.gamma
    layer.gamma[...] = [3, 4]
    layer.beta[...] = [-1, 1]
    layer(np.ones((4, 2), np.float32), training=True)
    np.testing.assert_array_equal(layer.gamma, [3, 4])  # not in the forward pass
    layer.apply_constraints()
    np.testing.assert_allclose(gamma, [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(layer.beta, [0, 1])


def test_constraints_before_build_do_nothing():
    BatchNormalization(gamma_constraint="non_neg").apply_constraints()


def test_no_updates_wait():
    layer = trained()
    assert layer.updates == []
    assert layer.get_updates_for(X) == []


# --- momentum None -----------------------------------------------------------------------------------------------


def batches(count):
    return [np.random.default_rng(i).normal(i, 1 + i, size=(8, 3)).astype(np.float32) for i in range(count)]


def test_momentum_none_is_the_average_of_all_training_calls():
    layer = BatchNormalization(momentum=None)
    data = batches(5)
    for x in data:
        layer(x, training=True)
        layer(x)  # counts for nothing
        layer(x, training=True, update_statistics=False)
        layer(x[:0], training=True)
    np.testing.assert_allclose(layer.moving_mean, np.mean([x.mean(0, np.float64) for x in data], 0), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, np.mean([x.var(0, np.float64) for x in data], 0), rtol=1e-5)


def test_momentum_none_averages_what_each_statistic_has_seen():
    """A statistic that a batch's mask leaves out has one batch less, whether that is the first or not."""
    layer = BatchNormalization(momentum=None)
    data = batches(4)
    masks = np.ones((4, 8, 3), bool)
    masks[0, :, 0] = masks[2, :, 1] = False
    for x, mask in zip(data, masks, strict=True):
        layer(x, training=True, mask=mask)
    for channel in range(3):
        seen = [x[:, channel].mean(dtype=np.float64) for x, mask in zip(data, masks, strict=True) if mask[0, channel]]
        np.testing.assert_allclose(layer.moving_mean[channel], np.mean(seen), rtol=1e-5, err_msg=f"channel {channel}")


# --- trainable --------------------------------------------------------------------------------------------------


def test_trainable_can_be_switched():
    layer = trained()
    frozen = layer(X)
    layer.trainable = False
    before = layer.get_weights()
    np.testing.assert_array_equal(layer(X, training=True), frozen)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    layer.trainable = True
    assert not np.array_equal(layer(X, training=True), frozen)


# --- vjp -----------------------------------------------------------------------------------------------------------


def gradients_of(pullback):
    return [np.array(g) for g in pullback(DY)[:3]]


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"dtype": "float32"}], ids=str)
def test_a_pullback_is_that_of_its_call(training, options):
    """Whatever happens to the layer afterwards, in place or not."""
    layer = trained(**options)
    _, pullback = layer.vjp(X, training=training)
    expected = gradients_of(pullback)
    layer.gamma[...] = 77
    layer.beta -= 1
    assert_same(gradients_of(pullback), expected)
    layer(X * 5, training=True)
    assert_same(gradients_of(pullback), expected)
    layer.set_weights([w + 2 for w in layer.get_weights()])
    layer.trainable = False
    assert_same(gradients_of(pullback), expected)
    del layer
    gc.collect()
    assert_same(gradients_of(pullback), expected)


@pytest.mark.parametrize("training", [False, True])
def test_a_pullback_keeps_statistics_that_are_changed_in_place(training):
    """As gamma and beta: the attributes are arrays, and `layer.moving_mean *= 0` is a way to reset them."""
    layer = trained()
    _, pullback = layer.vjp(X, training=training)
    expected = gradients_of(pullback)
    layer.moving_mean *= 0
    layer.moving_variance *= 9
    assert_same(gradients_of(pullback), expected)


def test_a_pullback_keeps_the_mask():
    """Only the inputs must not change until the gradient is taken."""
    layer = trained()
    mask = np.array([1, 0, 1, 1, 1, 0, 1, 1], bool)
    _, pullback = layer.vjp(X, training=True, mask=mask)
    expected = gradients_of(pullback)
    mask[...] = True
    assert_same(gradients_of(pullback), expected)


def test_a_pullback_keeps_the_adjustment():
    pair = [np.full(X.shape, 2, np.float32), np.full(X.shape, 3, np.float32)]
    _, pullback = BatchNormalization(adjustment=lambda shape: pair).vjp(X, training=True)
    expected = gradients_of(pullback)
    for array in pair:
        array[...] = 77
    assert_same(gradients_of(pullback), expected)


def test_a_pullback_in_another_thread():
    _, pullback = trained().vjp(X, training=True)
    expected, found = gradients_of(pullback), []
    threads = [threading.Thread(target=lambda: found.append(gradients_of(pullback))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4
    for one in found:
        assert_same(one, expected)


def test_gradients_are_the_callers():
    """Changing what one call returned changes no other."""
    _, pullback = trained().vjp(X, training=True)
    expected = gradients_of(pullback)
    for gradient in pullback(DY)[:3]:
        gradient[...] = 77
    assert_same(gradients_of(pullback), expected)


def test_gradients_of_what_does_not_exist():
    _, pullback = BatchNormalization(center=False, scale=False).vjp(X, training=True)
    gradients = pullback(DY)
    assert gradients.gamma is gradients.beta is gradients.adjustment is None


def test_the_gradient_of_the_output_may_have_another_dtype():
    _, pullback = trained().vjp(X, training=True)
    np.testing.assert_array_equal(pullback(DY.astype(np.float64)).inputs, pullback(DY).inputs)
    assert pullback(DY.astype(np.float64)).inputs.dtype == np.float32


@pytest.mark.parametrize("training", [False, True])
def test_the_gradient_of_a_float64_input_to_a_float32_layer(training):
    layer = BatchNormalization(dtype="float32")
    x = X.astype(np.float64)
    y, pullback = layer.vjp(x, training=training)
    assert y.dtype == np.float32
    assert pullback(DY).gamma.dtype == np.float32


# --- what is kept alive -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float32"}, {"adjustment": lambda shape: (np.ones(shape), 0.0)}],
    ids=["", "dtype", "pair"],
)
def test_a_call_keeps_no_input(training, options):
    layer = BatchNormalization(**options)
    x, mask = X.copy(), np.ones(X.shape, np.float32)
    layer(x, training=training, mask=mask)
    references = [weakref.ref(x), weakref.ref(mask)]
    del x, mask
    gc.collect()
    assert [r() for r in references] == [None, None]


def test_a_pullback_keeps_its_input_until_it_goes():
    layer = BatchNormalization()
    x = X.copy()
    reference = weakref.ref(x)
    _, pullback = layer.vjp(x, training=True)
    del x
    gc.collect()
    assert reference() is not None
    del pullback
    gc.collect()
    assert reference() is None


def test_a_small_mask_is_not_blown_up():
    """One weight per sample stays that, also where the layer needs another dtype: no array of the input's size."""
    from nbbn.operands import as_weights

    wide = as_weights(np.ones(8, bool), (8, 1000), (1,), np.dtype(np.float32))
    assert wide.shape == (8, 1000)
    assert wide.strides[1] == 0


# --- several threads ------------------------------------------------------------------------------------------------


def in_threads(functions):
    """Run all functions at once; fail with what any of them raised, or if one hangs."""
    errors, barrier = [], threading.Barrier(len(functions))

    def guarded(function):
        barrier.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert not any(t.is_alive() for t in threads), "a thread hangs"
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def test_threads_that_train_one_layer_lose_no_update():
    """The mean of every batch is 1: after n updates the moving mean is 1 - momentum^n, exactly n of them."""
    layer = BatchNormalization(momentum=0.99)
    x = np.ones((4, 3), np.float32)
    layer(x)

    def train():
        for _ in range(50):
            layer(x, training=True)

    in_threads([train] * 8)
    np.testing.assert_allclose(layer.moving_mean, 1 - 0.99**400, rtol=1e-5)


def test_threads_that_train_a_cumulative_average_count_every_call():
    layer = BatchNormalization(momentum=None)
    data = batches(8)

    def train(x):
        for _ in range(25):
            layer(x, training=True)

    in_threads([lambda x=x: train(x) for x in data])
    np.testing.assert_allclose(layer.moving_mean, np.mean([x.mean(0, np.float64) for x in data], 0), rtol=1e-4)


def test_threads_that_build_one_layer_build_it_once():
    """The initializer draws other values each time: all must see the same."""
    for _ in range(20):
        layer, seen = BatchNormalization(gamma_initializer="random_normal"), []

        def build(layer=layer, seen=seen):
            layer(X)
            seen.append(layer.gamma)

        in_threads([build] * 6)
        assert all(np.shares_memory(gamma, layer.gamma) for gamma in seen)


def test_inference_beside_training_sees_statistics_of_one_step():
    """Mean m and variance m^2 belong together: (0 - mean) / sqrt(variance) is -1, or they are of different steps."""
    layer = BatchNormalization(momentum=0.0, epsilon=0.0, center=False, scale=False)
    sign = np.array([[0.0], [2.0]], np.float32)  # m * sign: mean m, variance m^2
    data = [np.float32(m) * sign * np.ones(3, np.float32) for m in (1, 1000)]
    zero = np.zeros((4, 3), np.float32)
    layer(data[0], training=True)
    stop = threading.Event()

    def train():
        for i in range(1000):
            layer(data[i % 2], training=True)
        stop.set()

    def infer():
        while not stop.is_set():
            np.testing.assert_allclose(layer(zero), -1, rtol=1e-5)

    in_threads([train, infer, infer])


def test_weights_set_beside_inference_are_seen_whole():
    """Statistics that set_weights() gives together are used together."""
    layer = BatchNormalization(epsilon=0.0, center=False, scale=False)
    layer.build((None, 3))
    zero = np.zeros((4, 3), np.float32)
    ones = np.ones(3, np.float32)
    layer.set_weights([ones, ones])
    stop = threading.Event()

    def assign():
        for i in range(2000):
            m = (1, 1000)[i % 2] * ones
            layer.set_weights([m, m * m])
        stop.set()

    def infer():
        while not stop.is_set():
            np.testing.assert_allclose(layer(zero), -1, rtol=1e-5)

    in_threads([assign, infer])


def test_a_pullback_beside_training():
    layer = trained()
    _, pullback = layer.vjp(X, training=True)
    expected, stop = gradients_of(pullback), threading.Event()

    def train():
        for _ in range(300):
            layer(X, training=True)
            layer.gamma += 1
        stop.set()

    def pull():
        while not stop.is_set():
            assert_same(gradients_of(pullback), expected)

    in_threads([train, pull, pull])


def test_layers_of_all_kinds_at_once():
    """Different kernels, some of them first compiled here, and large enough for the thread pool."""
    x = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3)

    def work(dtype):
        for _ in range(5):
            y = BatchNormalization(dtype=dtype)(x, training=True)
            np.testing.assert_allclose(y.astype(np.float64), expected, rtol=2**-10, atol=2**-10)

    in_threads([lambda d=d: work(d) for d in ("float16", "float32", "float32", "float32")])
