"""A layer's state by name, its files, and what a restart remembers."""

import json
import os
import sys

import numpy as np
import pytest

import nbbn
from nbbn import BatchNormalization
from nbbn.compat import v1
from nbbn.layer import files
from tests.helpers.concurrency import in_threads_beside
from tests.helpers.layer_examples import X, assert_same_weights, batches, trained

# Of inputs (8, 6, 3).
OPTIONS = {
    "defaults": {},
    "without parameters": {"center": False, "scale": False, "trainable": False},
    "momentum None": {"momentum": None, "activation": "relu"},
    "debias": {"debias": True, "skip_nonfinite": True, "activation": "relu"},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 2.0, "dmax": float("inf")}, "momentum": 0.5},
    "virtual": {"virtual_batch_size": 4, "axis": [1, 2], "bessel_correction": False},
    "float16": {"dtype": "float16", "axis": 1},
    "objects": {"gamma_initializer": nbbn.initializers.Constant(2.0), "beta_regularizer": "l2", "name": "other"},
}
INPUTS = [np.random.default_rng(i).normal(i, 1 + i, (8, 6, 3)) for i in range(4)]


# -- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_state_is_the_weights_by_name(options):
    layer = BatchNormalization(**options)
    layer(INPUTS[0], training=True)
    state = layer.get_state()
    for name, value, weight in zip(state, layer.get_weights(), layer.weights, strict=True):
        assert state[name].tobytes() == value.tobytes() == weight.tobytes()
        assert getattr(layer, name) is not None
        value[...], state[name][...] = 7, 8
    assert not any((w == 7).any() or (w == 8).any() for w in layer.get_weights())


@pytest.mark.parametrize("way", ["weights", "state"])
@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"momentum": None}, [1] * 6),
        ({"momentum": None, "renorm": True}, [1] * 6),
        ({"momentum": 0.5, "debias": True}, [2.0**-n for n in range(6, 0, -1)]),
    ],
    ids=str,
)
def test_debiased_averages_remember_their_batches(way, options, weights):
    """What a new layer is given of an old one is as much as the batches that are in it."""
    first, *rest = batches(5)
    layer, twin = trained(**options), BatchNormalization(**options)
    layer(first, training=True)
    twin.build(first.shape)
    if way == "weights":
        twin.set_weights(layer.get_weights())
    else:
        twin.set_state(layer.get_state())
    for one in (layer, twin):
        for x in rest:
            one(x, training=True)
    np.testing.assert_array_equal(twin.seen_mean, np.full(3, sum(weights), np.float32))
    assert_same_weights(layer, twin)
    expected = np.average([x.mean(0, np.float64) for x in (X, first, *rest)], 0, weights)
    np.testing.assert_allclose(twin.moving_mean, expected, rtol=1e-6)  # six averages in float32


def test_tensorflows_list_leaves_the_counts():
    layer = trained(momentum=None)
    layer.set_weights([w + 1 for w in layer.get_weights()[:4]])
    np.testing.assert_array_equal(layer.seen_mean, [1, 1, 1])
    layer.seen_mean = [5, 6, 7]
    np.testing.assert_array_equal(layer.get_state()["seen_mean"], [5, 6, 7])


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "complex"])
def test_a_state_that_does_not_fit_changes_nothing(change):
    layer = trained(renorm=True)
    before, state = layer.get_weights(), {n: a + 1 for n, a in layer.get_state().items()}
    wrong = {
        "missing": {n: a for n, a in state.items() if n != "renorm_mean"},
        "unknown": {**state, "seen_mean": np.ones(3)},
        "shape": {**state, "renorm_stddev": np.ones(4)},
        "complex": {**state, "renorm_stddev": np.ones(3) * 1j},
    }
    with pytest.raises((ValueError, TypeError), match="renorm_"):
        layer.set_state(wrong[change])
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_state_needs_a_built_layer():
    for use in (lambda layer: layer.get_state(), lambda layer: layer.set_state({})):
        with pytest.raises(ValueError, match=r"[gs]et_state\(\) needs a built layer"):
            use(BatchNormalization())


def test_the_statistics_of_a_state_are_of_one_moment():
    layer = BatchNormalization(momentum=0.0)
    data = [(m * np.array([[1], [-1]]) + m).astype(np.float32) for m in (1, 1000)]  # mean m, variance m * m
    layer(data[0], training=True)

    def train():
        for i in range(2000):
            layer(data[i % 2], training=True)

    def read():
        state = layer.get_state()
        np.testing.assert_array_equal(state["moving_mean"] ** 2, state["moving_variance"])

    in_threads_beside(train, read)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[".npz", ".safetensors"])
def path(request, tmp_path):
    if request.param == ".safetensors":
        pytest.importorskip("safetensors", reason="writes .safetensors files: needs the extra safetensors")
    return tmp_path / f"layer{request.param}"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_loaded_layer_goes_on_where_it_was(path, options, dtype):
    """The same bits as without a restart, also where the dtype is that of the first input."""
    inputs = [x.astype(dtype) for x in INPUTS]
    layer = BatchNormalization(**options)
    for x in inputs[:2]:
        layer(x, training=True)
    layer.save(str(path))
    twin = nbbn.load(path)
    assert twin.get_config() == layer.get_config()
    for x in inputs[2:]:
        assert layer(x, training=True).tobytes() == twin(x, training=True).tobytes()
    for one, other in zip(layer.get_weights(), twin.get_weights(), strict=True):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    assert layer(inputs[0]).tobytes() == twin(inputs[0]).tobytes()


def test_a_layer_that_is_not_built(path):
    BatchNormalization(axis=1, name="bn").save(path)
    twin = nbbn.load(path)
    assert (twin.name, twin.axis, twin.built) == ("bn", 1, False)


class Mine(BatchNormalization):
    pass


@pytest.mark.parametrize("kind", [v1.keras.layers.BatchNormalization, v1.layers.BatchNormalization, Mine])
def test_a_layer_of_another_class(path, kind):
    layer = kind()
    layer.build((None, 3))
    layer.save(path)
    v1.reset_default_graph()
    twin = kind.load(path)
    assert type(twin) is kind
    assert_same_weights(layer, twin)
    with pytest.raises(ValueError, match=rf"{kind.__name__}: call the load\(\) of that"):
        nbbn.load(path)


def test_callables_are_given_again(path):
    def sevens(shape, dtype):
        return np.full(shape, 7, dtype)

    def adjustment(shape):
        return 1.0, 0.0

    layer = BatchNormalization(gamma_initializer=sevens, adjustment=adjustment)
    layer(X)
    with pytest.warns(UserWarning, match="adjustment"):
        layer.save(path)
    twin = nbbn.load(path, gamma_initializer="ones", adjustment=adjustment)
    np.testing.assert_array_equal(twin.gamma, [7, 7, 7])
    assert twin.adjustment is adjustment


def test_a_file_is_there_as_a_whole_or_not_at_all(path, monkeypatch):
    """A crash while writing leaves the old file, and nothing beside it; a link stays a link."""
    trained().save(path)
    old = path.read_bytes()
    link = path.with_name(f"link{path.suffix}")
    link.symlink_to(path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            trained(renorm=True).save(link)
    assert path.read_bytes() == old
    trained(renorm=True).save(link)
    assert link.is_symlink()
    assert nbbn.load(path).renorm
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, link.name])
    umask = os.umask(0o022)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_mode_of_a_file_stays(path):
    trained().save(path)
    path.chmod(0o600)
    trained().save(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_damaged_files(path):
    trained().save(path)
    whole = path.read_bytes()
    for content in (b"something else", b"", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"layer{path.suffix} is no file of layer\.save\(\), or damaged"):
            nbbn.load(path)


def test_nothing_in_a_file_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    for key in ("nbbn", "gamma"):
        arrays = {"nbbn": np.array(json.dumps({})), key: np.array(Evil(), dtype=object)}
        np.savez(tmp_path / "layer.npz", **arrays)
        with pytest.raises(ValueError, match=r"layer\.npz is no file"):
            nbbn.load(tmp_path / "layer.npz")
    assert not (tmp_path / "evil").exists()


def test_what_is_missing_in_a_file_is_said(path):
    layer = trained(renorm=True)
    layer.save(path)
    state, described = files.read(path)
    del state["renorm_mean"]
    files.write(path, state, described)
    with pytest.raises(
        ValueError, match=rf"layer{path.suffix}: the state of .* must be gamma, .*; missing are \['renorm_mean'\]"
    ):
        nbbn.load(path)


@pytest.mark.parametrize("use", [lambda p: BatchNormalization().save(p), nbbn.load], ids=["save", "load"])
def test_paths(use, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"path must end in \.safetensors or \.npz; received .*layer\.h5"):
        use(tmp_path / "layer.h5")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        use(tmp_path / "nowhere" / "layer.npz")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"layer\.safetensors: .* needs the package safetensors"):
        use(tmp_path / "layer.safetensors")
    assert list(tmp_path.iterdir()) == []


# -- serialized layers -----------------------------------------------------------------------------------------------


def keras_config(**config):
    """As Keras writes it: initializers say where they come from."""
    zeros = {"module": "keras.initializers", "class_name": "Zeros", "config": {}, "registered_name": None}
    return {"gamma_initializer": zeros, "dtype": "float32", **config}


POLICY = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "mixed_float16"}, "registered_name": None}
OLD_POLICY = POLICY | {"module": "keras.mixed_precision", "class_name": "Policy"}
GHOSTS = {"virtual_batch_size": 2, "axis": [2]}
# A config, and the axis, Bessel's correction and dtype that it means.
CONFIGS = {
    "Keras 3": (keras_config(dtype=POLICY, axis=-1), (-1, False, "float16")),
    "Keras 3.0": (keras_config(synchronized=False, axis=1), (1, False, "float32")),
    "tf_keras": (keras_config(axis=[3]), ([3], None, "float32")),
    "tf_keras, policy": (keras_config(dtype=OLD_POLICY, axis=[3]), ([3], None, "float16")),
    "tf_keras, built ghosts": (keras_config(**GHOSTS), ([1], None, "float32")),
    "tf_keras, built ghosts of axes": (keras_config(virtual_batch_size=2, axis=[2, 4]), ([1, 3], None, "float32")),
    "tf_keras, ghosts": (keras_config(virtual_batch_size=2, axis=[1]), ([1], None, "float32")),
    "old, serialized": ({"class_name": "BatchNormalizationV1", "config": GHOSTS}, ([1], None, None)),
    "nbbn": (GHOSTS, ([2], None, None)),
    "nbbn, serialized": (
        {"module": "nbbn", "class_name": "BatchNormalization", "config": GHOSTS},
        ([2], None, None),
    ),
}


@pytest.mark.parametrize(("config", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_what_a_config_means_depends_on_who_wrote_it(config, expected):
    layer = BatchNormalization.from_config(config)
    assert (layer.axis, layer.bessel_correction, layer.dtype) == expected
    again = BatchNormalization.from_config(layer.get_config())
    assert (again.axis, again.bessel_correction, again.dtype) == expected


def test_a_serialized_layer_is_built_where_its_input_is_known():
    config = {
        "class_name": "BatchNormalization",
        "config": keras_config(),
        "build_config": {"input_shape": [None, 4, 3]},
    }
    assert BatchNormalization.from_config(config).gamma.shape == (3,)
    assert not BatchNormalization.from_config({**config, "build_config": {"input_shape": None}}).built


def test_a_serialized_layer_of_another_kind():
    with pytest.raises(ValueError, match=r"config must be that of a BatchNormalization; received .* 'Dense'"):
        BatchNormalization.from_config({"class_name": "Dense", "config": {"units": 3}})
