"""What exchanges do without the other library: names, shapes, errors, and checkpoints that nothing writes any more.

Whether the libraries mean the same by it is in tests/parity.
"""

import numpy as np
import pytest

import nbbn
from nbbn import BatchNormalization, exchange
from nbbn.exchange.layers import batches_seen
from tests.helpers.layer_examples import X, assert_same_weights, trained

# -- names -----------------------------------------------------------------------------------------------------------


def test_torch_names():
    found = exchange.to_torch(trained(), "block.bn")
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert list(found) == [f"block.bn.{n}" for n in names]
    assert (found["block.bn.num_batches_tracked"].dtype, found["block.bn.num_batches_tracked"].shape) == (np.int64, ())
    assert "weight" not in exchange.to_torch(trained_without_parameters())


def trained_without_parameters():
    layer = BatchNormalization(center=False, scale=False)
    layer(X, training=True)
    return layer


ROUND_TRIPS = {
    "torch": (exchange.to_torch, exchange.from_torch),
    "tensorflow": (exchange.to_tensorflow, exchange.from_tensorflow),
    "flax": (exchange.to_flax, exchange.from_flax),
    "haiku": (exchange.to_haiku, lambda trees, **options: exchange.from_haiku(*trees, **options)),
}
ONE_AXIS = {"axis": 1, "momentum": 0.5, "epsilon": 0.25, "bessel_correction": False}


@pytest.mark.parametrize(
    "options", [{}, {"center": False}, {"scale": False}, {"center": False, "scale": False}], ids=str
)
@pytest.mark.parametrize(("there", "back"), ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_round_trips(there, back, options):
    layer = BatchNormalization(**ONE_AXIS, **options)
    x = np.random.default_rng(0).normal(3, 2, (4, 3, 5))
    layer(x, training=True)
    twin = back(there(layer), ndim=3, **ONE_AXIS)
    has = (layer.center, layer.scale)
    if there is exchange.to_torch:  # PyTorch has both parameters or none
        has = (any(has), any(has))
    assert (twin.center, twin.scale) == has
    for name in layer.get_state():
        np.testing.assert_array_equal(getattr(twin, name), getattr(layer, name))
    assert twin(x).tobytes() == layer(x).tobytes()


def test_several_axes_and_ghosts():
    """Where the names of renorm's statistics exist, all is there; elsewhere they begin at the moving ones."""
    options = {"axis": [3, 1], "renorm": True, "virtual_batch_size": 2}
    layer = BatchNormalization(**options)
    layer(np.random.default_rng(0).normal(3, 2, (4, 3, 2, 5)), training=True)
    assert_same_weights(exchange.from_tensorflow(exchange.to_tensorflow(layer, "bn"), **options), layer)
    twin = exchange.from_flax(exchange.to_flax(layer), ndim=4, epsilon=layer.epsilon, **options)
    np.testing.assert_array_equal(twin.renorm_mean, layer.moving_mean)
    np.testing.assert_allclose(twin.renorm_stddev, np.sqrt(layer.moving_variance + layer.epsilon), rtol=1e-15)


def test_a_layer_without_renorm_from_one_with_it():
    variables = exchange.to_tensorflow(trained(renorm=True))
    assert exchange.from_tensorflow(variables, ndim=2).renorm
    assert len(exchange.from_tensorflow(variables, ndim=2, renorm=False).get_weights()) == 4


def test_cumulative_averages():
    layer = trained(momentum=None)
    state = exchange.to_torch(layer)
    assert state["num_batches_tracked"] == batches_seen(layer) == 1
    state["num_batches_tracked"] = np.array(7)
    np.testing.assert_array_equal(exchange.from_torch(state, ndim=2, momentum=None).seen_variance, [7, 7, 7])
    assert_same_weights(exchange.from_tensorflow(exchange.to_tensorflow(layer), ndim=2, momentum=None), layer)
    assert exchange.from_torch(state, ndim=2, renorm=True).renorm_mean.shape == (3,)
    del state["num_batches_tracked"]  # the first batch will count alone
    np.testing.assert_array_equal(exchange.from_torch(state, ndim=2, momentum=None).seen_mean, [0, 0, 0])
    assert exchange.from_tensorflow(exchange.to_tensorflow(layer), ndim=2).momentum == 0.99
    layer.seen_mean = [1, 2, 3]
    with pytest.raises(ValueError, match=r"same number of batches; received \[1, 2, 3\]"):
        exchange.to_torch(layer)


def test_layers_are_found_by_name():
    one, two = trained(), trained(renorm=True)
    others = {"dense/kernel": np.ones((3, 3)), "global_step": np.array(1), "a/bn/gamma/Adam": np.ones(3)}
    variables = {**exchange.to_tensorflow(one, "a/bn"), **exchange.to_tensorflow(two, "bn"), **others}
    variables = {f"{n}:0": v for n, v in variables.items()}
    assert_same_weights(exchange.from_tensorflow(variables, "a/bn", ndim=2), one)
    assert_same_weights(exchange.from_tensorflow(variables, "bn", ndim=2), two)
    for name in (None, "c"):
        with pytest.raises(ValueError, match=rf"name must be that of a layer in .*\['a/bn', 'bn'\]; received {name!r}"):
            exchange.from_tensorflow(variables, name, ndim=2)
    with pytest.raises(ValueError, match=r"\[\]; received None"):
        exchange.from_torch({}, ndim=2)


def test_what_does_not_fit_is_said():
    state = exchange.to_torch(trained())
    with pytest.raises(ValueError, match=r"ndim, the rank of the inputs, must be given: .*\(3,\)"):
        exchange.from_torch(state)
    with pytest.raises(ValueError, match=r"state of .* must be beta, .*; missing are \[\], not expected \['gamma'\]"):
        exchange.from_torch(state, ndim=2, scale=False)
    with pytest.raises(ValueError, match=r"moving_variance must have shape \(3,\); received \(2,\)"):
        exchange.from_torch({**state, "running_var": np.ones(2)}, ndim=2)
    with pytest.raises(TypeError, match=r"variables must be a mapping of arrays by name; received NoneType"):
        exchange.from_torch(None)
    with pytest.raises(ValueError, match=r"needs a built layer"):
        exchange.to_torch(BatchNormalization())
    with pytest.raises(TypeError, match=r"layer must be a BatchNormalization of nbbn; received dict"):
        exchange.to_tensorflow({})
    axes = BatchNormalization(axis=[1, 2])
    axes.build((None, 2, 3))
    with pytest.raises(ValueError, match=r"to_torch\(\) needs a layer with one feature axis; received axis=\[1, 2\]"):
        exchange.to_torch(axes)


# -- renorm in old checkpoints ---------------------------------------------------------------------------------------


class OldRenorm:
    """Batch renormalization of inputs (N, C) as TensorFlow 1 had it until its averages lost their weights, in float64.

    Source: tensorflow/python/keras/layers/normalization.py of that time, `_renorm_correction_and_moments`.
    """

    def __init__(self, channels, momentum, epsilon):
        self.momentum, self.epsilon = momentum, epsilon
        zeros, none = np.zeros(channels), np.zeros(())
        self.variables = {"gamma": zeros + 1.5, "beta": zeros + 0.5, "moving_mean": zeros, "moving_variance": zeros + 1}
        self.variables |= {"renorm_mean": zeros, "renorm_mean_weight": none}
        self.variables |= {"renorm_stddev": zeros, "renorm_stddev_weight": none}

    def train(self, x):
        v, mean = self.variables, x.mean(0)
        stddev = np.sqrt(x.var(0) + self.epsilon)
        used_mean = v["renorm_mean"] + (1 - v["renorm_mean_weight"]) * mean
        used_stddev = v["renorm_stddev"] + (1 - v["renorm_stddev_weight"]) * stddev
        y = (x - used_mean) / used_stddev * v["gamma"] + v["beta"]  # r and d, unclipped
        for name, new in {"renorm_mean": mean, "renorm_stddev": stddev}.items():
            for key, value in {name: new, f"{name}_weight": 1.0}.items():
                v[key] = v[key] - (v[key] - value) * (1 - self.momentum)
        new_mean = v["renorm_mean"] / v["renorm_mean_weight"]
        new_variance = (v["renorm_stddev"] / v["renorm_stddev_weight"]) ** 2 - self.epsilon
        for name, new in {"moving_mean": new_mean, "moving_variance": new_variance}.items():
            v[name] = v[name] - (v[name] - new) * (1 - self.momentum)
        return y


@pytest.mark.parametrize("steps", [0, 1, 300])
def test_renorm_of_old_checkpoints(steps):
    """From a checkpoint of TensorFlow 1: the averages without their weights, and the steps that follow."""
    rng = np.random.default_rng(0)
    old = OldRenorm(3, 0.9, 1e-3)
    for _ in range(steps):
        old.train(rng.normal([1, -5, 30], [1, 2, 9], (16, 3)))
    layer = exchange.from_tensorflow(
        {f"net/bn/{n}": v for n, v in old.variables.items()}, ndim=2, momentum=0.9, renorm_momentum=0.9
    )
    assert layer.renorm
    variables, exact = old.variables, {"rtol": 1e-14}
    sigma = np.sqrt(variables["moving_variance"] + 1e-3)
    np.testing.assert_allclose(layer.moving_stddev, sigma, **exact)
    for name, start in {"renorm_mean": variables["moving_mean"], "renorm_stddev": sigma}.items():
        weight = variables[f"{name}_weight"]
        np.testing.assert_allclose(weight, 1 - 0.9**steps, rtol=1e-12)
        np.testing.assert_allclose(getattr(layer, name), variables[name] / weight if steps else start, **exact)
    x = rng.normal([1, -5, 30], [1, 2, 9], (16, 3))
    inference = (x - variables["moving_mean"]) / sigma * 1.5 + 0.5
    np.testing.assert_allclose(layer(x), inference, rtol=1e-12, atol=1e-12)
    if steps == 300:  # the weights are 1 up to 0.9 ** 300 = 2e-14: both kinds of averages are the same
        np.testing.assert_allclose(layer(x, training=True), old.train(x), rtol=0, atol=1e-11)
        for name in ("renorm_mean", "renorm_stddev"):
            np.testing.assert_allclose(getattr(layer, name), old.variables[name], rtol=1e-12)


# -- files and models -------------------------------------------------------------------------------------------------


def test_files_that_keras_did_not_write(tmp_path):
    pytest.importorskip("h5py", reason="reads HDF5 files: needs the extra keras")
    path = tmp_path / "model.keras"
    for content in (b"", b"hello", b"PK\x05\x06" + bytes(18)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"path must be a \.keras or \.h5 file of Keras; .*model\.keras"):
            exchange.from_keras(path)


def test_exchange_is_there_without_an_import():
    assert nbbn.exchange.from_torch is exchange.from_torch
