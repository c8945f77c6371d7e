"""Layers from and to other libraries: what these compute in inference with the weights is what the layer computes."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nbbn
from nbbn import exchange
from tests.parity.tf_side import tf, tf_keras

pytestmark = pytest.mark.parity

RNG = np.random.default_rng(3)
LAST = RNG.normal(3, 2, (8, 4, 5, 3)).astype(np.float32)
FIRST = np.ascontiguousarray(np.moveaxis(LAST, -1, 1))


def trained(x: np.ndarray, **options: Any) -> nbbn.BatchNormalization:
    """A layer whose every weight differs from its initial value, and from channel to channel."""
    layer = nbbn.BatchNormalization(**{"momentum": 0.75, **options})
    for shift in range(3):
        layer(x * (1 + shift) + shift, training=True)
    for weight in layer.trainable_weights:
        weight[...] = RNG.uniform(0.5, 2, weight.shape)
    return layer


def filled(x: np.ndarray, **options: Any) -> nbbn.BatchNormalization:
    """A layer with random weights: no kernels of training are compiled."""
    layer = nbbn.BatchNormalization(**{"momentum": 0.75, **options})
    layer.build(x.shape, x.dtype)
    layer.set_state({n: RNG.uniform(0.5, 4, w.shape) for n, w in layer.get_state().items()})
    return layer


def assert_same(layer: nbbn.BatchNormalization, x: np.ndarray, y: Any, expected: Any = None) -> None:
    """y is the layer's inference of x, up to 8 roundings of each of the terms that make it up."""
    y, expected = np.asarray(y), layer(x) if expected is None else expected
    scale, _ = layer.fold()
    shape = exchange.layers.along_axes(layer, "")
    mean, scale, beta = (np.abs(a).reshape(shape) for a in (layer.moving_mean, scale, layer.beta))
    eps = max(np.finfo(a.dtype).eps for a in (y, layer.moving_mean))
    assert y.dtype == x.dtype
    assert (np.abs(y - expected.astype(np.float64)) <= 8 * eps * ((np.abs(x) + mean) * scale + beta)).all()


def library(name: str) -> Any:
    """Imported when a test needs it, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"exchanges layers with {name}, which is not installed")


# -- PyTorch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.75, None])
def test_torch(momentum: float | None) -> None:
    """Both ways, and both train on alike: momentum, Bessel's correction and the number of batches are understood."""
    torch = library("torch")
    layer = trained(FIRST, axis=1, epsilon=1e-5, momentum=momentum, bessel_correction=True)
    module = torch.nn.BatchNorm2d(3, momentum=None if momentum is None else 1 - momentum)
    module.load_state_dict({n: torch.from_numpy(a) for n, a in exchange.to_torch(layer).items()})
    x = torch.from_numpy(FIRST)
    module.eval()
    assert_same(layer, FIRST, module(x).detach())
    module.train()
    module(x - 5)
    module.eval()
    twin = exchange.from_torch(module.state_dict(), ndim=4, momentum=momentum)
    assert_same(twin, FIRST, module(x).detach())
    layer(FIRST - 5, training=True)
    for one, other in zip(layer.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=8 * np.finfo(np.float32).eps)  # one step, in float32 in PyTorch


def test_torch_model() -> None:
    torch = library("torch")
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Sequential(torch.nn.BatchNorm2d(3, affine=False)))
    layers = [exchange.from_torch(model.state_dict(), name, ndim=4) for name in ("0", "1.0")]
    assert [(layer.scale, layer.center) for layer in layers] == [(True, True), (False, False)]
    parts = {
        n: a for name, one in zip(("0", "1.0"), layers, strict=True) for n, a in exchange.to_torch(one, name).items()
    }
    model.load_state_dict({n: torch.from_numpy(a) for n, a in parts.items()})


# -- Flax and Haiku ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, 1, [1, 3]], ids=str)
def test_flax(axis: Any) -> None:
    linen, jax = library("flax.linen"), library("jax")
    layer = trained(LAST, axis=axis, epsilon=1e-5, bessel_correction=False)
    module = linen.BatchNorm(axis=axis, momentum=0.75)
    _, changed = module.apply(exchange.to_flax(layer), LAST, use_running_average=False, mutable="batch_stats")
    layer(LAST, training=True)
    assert_same(layer, LAST, module.apply(exchange.to_flax(layer), LAST, use_running_average=True))
    twin = exchange.from_flax({**exchange.to_flax(layer), **changed}, ndim=4, axis=axis, momentum=0.75)
    assert_same(twin, LAST, module.apply({**exchange.to_flax(layer), **changed}, LAST, use_running_average=True))
    for one, other in zip(layer.get_weights(), twin.get_weights(), strict=True):
        # Flax's variance is E[x^2] - E[x]^2 in float32, of values with (mean / deviation)^2 of about 3.
        np.testing.assert_allclose(one, other, rtol=64 * np.finfo(np.float32).eps)
    assert set(module.init(jax.random.key(0), LAST, use_running_average=True)) == set(exchange.to_flax(layer))


@pytest.mark.parametrize(("x", "data_format", "axis"), [(LAST, "channels_last", -1), (FIRST, "channels_first", 1)])
def test_haiku(x: np.ndarray, data_format: str, axis: int) -> None:
    hk = library("haiku")

    def call(inputs: Any, training: bool) -> Any:
        return hk.BatchNorm(True, True, 0.75, data_format=data_format)(inputs, training)

    model = hk.without_apply_rng(hk.transform_with_state(call))
    params, state = model.init(None, x, True)
    for shift in range(3):
        _, state = model.apply(params, state, x + shift, True)
    twin = exchange.from_haiku(params, state, axis=axis, momentum=0.75)
    assert_same(twin, x, model.apply(params, state, x, False)[0])

    layer = trained(x, axis=axis, epsilon=1e-5, bessel_correction=False)
    params, state = exchange.to_haiku(layer)
    assert_same(layer, x, model.apply(params, state, x, False)[0])
    _, state = model.apply(params, state, x - 5, True)
    layer(x - 5, training=True)  # Haiku trains on from there, too
    # Haiku's variance is E[x^2] - E[x]^2 in float32, of values with (mean / deviation)^2 of about 1.
    np.testing.assert_allclose(layer.moving_mean, state["batch_norm/~/mean_ema"]["average"].ravel(), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, state["batch_norm/~/var_ema"]["average"].ravel(), rtol=1e-5)


# -- ONNX --------------------------------------------------------------------------------------------------------------

OPERATIONS = {
    "node": ({"axis": 1}, FIRST, "BatchNormalization"),
    "node and epilogue": ({"axis": -3, "activation": "relu"}, FIRST, "BatchNormalization Add Relu"),
    "float16": ({"axis": 1, "dtype": "float16"}, FIRST.astype(np.float16), "Cast BatchNormalization Cast"),
    "float16 and epilogue": (
        {"dtype": "float16", "activation": "relu"},
        LAST.astype(np.float16),
        "Cast Cast Sub Mul Add Add Relu Cast",
    ),
    "channels last": ({}, LAST, "Sub Mul Add"),
    "float64": ({"axis": 1}, FIRST.astype(np.float64), "Sub Mul Add"),
    "axes": ({"axis": [1, 3]}, LAST, "Sub Mul Add"),
    "virtual": ({"virtual_batch_size": 4, "renorm": True}, LAST, "Sub Mul Add"),
}


@pytest.mark.parametrize("folded", [False, True], ids=["", "folded"])
@pytest.mark.parametrize(("options", "x", "operations"), OPERATIONS.values(), ids=OPERATIONS)
def test_to_onnx(options: dict[str, Any], x: np.ndarray, operations: str, folded: bool) -> None:
    """With an activation there is a residual, too."""
    onnx, runtime = library("onnx"), library("onnxruntime")
    layer = filled(x, **options)
    residual = {} if layer.activation is None else {"residual": x[::-1].copy()}
    model = exchange.to_onnx(layer, residual=bool(residual), folded=folded)
    onnx.checker.check_model(model, full_check=True)
    if folded:
        operations = operations.replace("Sub Mul Add", "Mul Add").replace("BatchNormalization", "Mul Add")
    assert " ".join(node.op_type for node in model.graph.node) == operations
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for part in (slice(None), slice(3)):  # a batch of any size
        arrays = {"x": x[part], **{n: r[part] for n, r in residual.items()}}
        (y,) = session.run(None, arrays)
        assert_same(layer, x[part], y, layer(x[part], residual=arrays.get("residual")))


def test_from_onnx(tmp_path: Path) -> None:
    onnx = library("onnx")
    layer = filled(FIRST, axis=1)
    model = exchange.to_onnx(layer)
    onnx.save(model, tmp_path / "layer.onnx")
    twin = exchange.from_onnx(tmp_path / "layer.onnx")
    np.testing.assert_array_equal(twin(FIRST), layer(FIRST))
    assert (twin.momentum, twin.epsilon, twin.bessel_correction) == (0.75, 1e-3, False)
    half = filled(FIRST.astype(np.float16), axis=1)
    np.testing.assert_array_equal(exchange.from_onnx(exchange.to_onnx(half))(FIRST[:2]), half(FIRST[:2]))
    del model.graph.initializer[1]
    with pytest.raises(ValueError, match=r"constants.*beta"):
        exchange.from_onnx(model)


# -- TensorFlow's checkpoints ------------------------------------------------------------------------------------------


def read_checkpoint(path: Any) -> dict[str, np.ndarray]:
    reader = tf.train.load_checkpoint(str(path))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def test_tensorflow_checkpoint_by_names(tmp_path: Path) -> None:
    """Of TensorFlow 1's Saver: what it has trained is read, and what nbbn has trained on is restored by it."""
    options = {"momentum": 0.75, "renorm": True, "virtual_batch_size": 4, "axis": [1, 3]}
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        inputs = tf.compat.v1.placeholder(tf.float32, LAST.shape)
        with tf.compat.v1.variable_scope("tower"):
            layer = tf_keras.layers.BatchNormalization(name="bn", **options)
            y = layer(inputs, training=False)
            layer(inputs, training=True)
        session.run(tf.compat.v1.global_variables_initializer())
        session.run(layer.updates, {inputs: LAST})
        saver = tf.compat.v1.train.Saver()
        saver.save(session, str(tmp_path / "model"))
        variables = read_checkpoint(tmp_path / "model")
        ours = exchange.from_tensorflow(variables, **options)
        assert not np.array_equal(ours.moving_stddev, np.ones(ours.moving_stddev.shape))
        assert_same(ours, LAST, session.run(y, {inputs: LAST}))
        ours(LAST - 5, training=True)
        (scope,) = {name.rpartition("/")[0] for name in variables}
        assert set(exchange.to_tensorflow(ours, scope)) == set(variables)
        for variable in tf.compat.v1.global_variables():
            variable.load(exchange.to_tensorflow(ours, scope)[variable.op.name], session)
        assert_same(ours, LAST, session.run(y, {inputs: LAST}))


def test_tensorflow_checkpoint_of_objects(tmp_path: Path) -> None:
    layer = tf_keras.layers.BatchNormalization()
    layer(LAST, training=True)
    variables = read_checkpoint(tf.train.Checkpoint(model=layer).save(str(tmp_path / "model")))
    assert_same(exchange.from_tensorflow(variables, "model", ndim=4), LAST, layer(LAST))


# -- Keras -------------------------------------------------------------------------------------------------------------


KERAS_3_READS = "ignore:__array__ implementation doesn't accept a copy keyword"  # TensorFlow's arrays, by NumPy 2


def keras_library(name: str) -> Any:
    """Keras 3 runs on TensorFlow, which has imported it already."""
    return tf_keras if name == "tf_keras" else library("keras")


def keras_model(keras: Any) -> Any:
    """Layers with each set of weights, of each axis, and in a model inside; trained by one batch."""
    inner = keras.Sequential([keras.layers.BatchNormalization(name="bn"), keras.layers.ReLU()], name="inner")
    inputs = keras.Input((4, 5, 3))
    x = keras.layers.BatchNormalization(name="first", axis=1, scale=False, momentum=0.5, epsilon=0.25)(inputs)
    x = keras.layers.Conv2D(3, 1, name="conv")(x)
    x = keras.layers.BatchNormalization(name="last", momentum=0.5)(inner(x))
    model = keras.Model(inputs, x)
    model(LAST, training=True)
    return model


def in_keras(model: Any) -> dict[str, Any]:
    return {
        "first": model.get_layer("first"),
        "inner/bn": model.get_layer("inner").layers[0],
        "last": model.get_layer("last"),
    }


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file", KERAS_3_READS)
@pytest.mark.parametrize("ending", [".keras", ".h5"])
@pytest.mark.parametrize("kind", ["keras", "tf_keras"])
def test_keras_model_file(kind: str, ending: str, tmp_path: Path) -> None:
    keras = keras_library(kind)
    model, path = keras_model(keras), tmp_path / f"model{ending}"
    model.save(path)
    for name, theirs in in_keras(model).items():
        ours = exchange.from_keras(path, name, ndim=4)
        assert (ours.epsilon, ours.momentum, ours.scale) == (theirs.epsilon, theirs.momentum, theirs.scale)
        assert ours.bessel_correction is (False if kind == "keras" else None)
        assert_same(ours, LAST, theirs(LAST))
        ours(LAST - 5, training=True)
        exchange.to_keras(ours, path, name)
        again = in_keras(keras.models.load_model(path, compile=False))[name]
        assert_same(ours, LAST, again(LAST))
        own = {n: getattr(ours, n) for n in ("axis", "epsilon", "center", "scale")}
        for change in ({"epsilon": 0.5}, {"center": not ours.center, "scale": not ours.scale}, {"renorm": True}):
            with pytest.raises(ValueError, match=next(iter(change)).replace("renorm", "moving_stddev")):
                exchange.to_keras(filled(LAST, **{**own, **change}), path, name)


@pytest.mark.filterwarnings(KERAS_3_READS)
@pytest.mark.parametrize(
    ("kind", "ending"), [("keras", ".weights.h5"), ("tf_keras", ".weights.h5"), ("tf_keras", ".h5")]
)
def test_keras_weights_file(kind: str, ending: str, tmp_path: Path) -> None:
    model, path = keras_model(keras_library(kind)), tmp_path / f"model{ending}"
    model.save_weights(path)
    own = dict(
        zip(
            in_keras(model),
            ["batch_normalization", "sequential/batch_normalization", "batch_normalization_1"],
            strict=True,
        )
    )
    for name, theirs in in_keras(model).items():
        key = own[name] if ending == ".weights.h5" else name
        options = {"axis": 1, "scale": False, "epsilon": 0.25} if name == "first" else {}
        ours = exchange.from_keras(path, key, ndim=4, **options)
        assert_same(ours, LAST, theirs(LAST))
        ours(LAST - 5, training=True)
        exchange.to_keras(ours, path, key)
        model.load_weights(path)
        assert_same(ours, LAST, theirs(LAST))


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("axis", [1, -1, [1, 3]], ids=str)
@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_keras_file_of_ghost_batches(axis: Any, ending: str, tmp_path: Path) -> None:
    """Whose axis is that of an input with one dimension more; the rank is that of the weights."""
    theirs = tf_keras.layers.BatchNormalization(axis=axis, virtual_batch_size=4, renorm=True, momentum=0.5)
    model = tf_keras.Sequential([tf_keras.Input(LAST.shape[1:], LAST.shape[0]), theirs])
    model(LAST, training=True)
    model.save(tmp_path / f"model{ending}")
    ours = exchange.from_keras(tmp_path / f"model{ending}")
    for one, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert_same(ours, LAST, theirs(LAST))


@pytest.mark.filterwarnings(KERAS_3_READS)
@pytest.mark.parametrize("whole", [False, True], ids=["config", "serialized"])
def test_configs_train_as_their_library_does(whole: bool) -> None:
    """Keras 3 never corrects the moving variance, tf_keras does where it is fused; 0.9375 is 15 / 16."""
    x = LAST[:1, :4, :4]
    for kind in ("keras", "tf_keras"):
        keras = keras_library(kind)
        theirs = keras.layers.BatchNormalization(momentum=0.0)
        theirs.build((None, *x.shape[1:]))
        config = keras.saving.serialize_keras_object(theirs) if whole else theirs.get_config()
        ours = nbbn.BatchNormalization.from_config(json.loads(json.dumps(config, default=dict)))
        assert ours.built is whole
        ours(x, training=True)
        theirs(x, training=True)
        # Moments of 16 values in float32.
        np.testing.assert_allclose(ours.moving_variance, np.asarray(theirs.moving_variance), rtol=1e-5)


# -- the page ----------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "saving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- runs with (.+?) -->\n```python\n(.+?)```", PAGE, re.DOTALL)


@pytest.mark.filterwarnings(KERAS_3_READS)
@pytest.mark.parametrize(("needed", "code"), BLOCKS, ids=[needed for needed, _ in BLOCKS])
def test_the_examples_of_the_page_run(needed: str, code: str, tmp_path: Path) -> None:
    for name in needed.split():
        library(name)
    if needed == "tensorflow":
        variables = {n: tf.Variable(a) for n, a in exchange.to_tensorflow(filled(LAST), "tower/bn").items()}
        tf.compat.v1.train.Saver(variables).save(None, f"{tmp_path}/model.ckpt", write_meta_graph=False)
    scope: dict[str, Any] = {"nbbn": nbbn, "np": np, "folder": tmp_path}
    exec(code, scope)
    assert scope["layer"].built


def test_every_block_of_the_page_is_run() -> None:
    assert len(BLOCKS) == PAGE.count("```python") == 5
