"""What users pass to the layer and to nn: arrays of every kind, masks, bools, numbers, shapes. Each is taken for what
it is, or refused by an error that names it. tests/test_layer_errors.py has values of right kinds that cannot be."""

import re
import sys

import numpy as np
import pytest

import nbbn
from nbbn import BatchNormalization, nn
from nbbn.compat import v1

F32 = np.float32
SHAPE = (4, 3)
RNG = np.random.default_rng(0)
X, DY, A, GAMMA = (RNG.uniform(0.5, 2, s).astype(F32) for s in (SHAPE, SHAPE, SHAPE, (3,)))
IMAGE = RNG.normal(2, 3, (2, 4, 3, 3)).astype(F32)
IMAGE_DY = RNG.normal(size=IMAGE.shape).astype(F32)


def call(**beside):
    """All results of a training step and its gradient, on new layers."""
    now = {"inputs": X, "residual": A, "mask": X, "dy": DY, "scale": A, "bias": A, **beside}
    layer = BatchNormalization(adjustment=lambda shape: (now["scale"], now["bias"]))
    y, pullback = layer.vjp(now["inputs"], training=True, mask=now["mask"], residual=now["residual"])
    g = pullback(now["dy"])
    return [y, g.inputs, g.gamma, g.beta, *g.adjustment, g.residual, *layer.get_weights()]


def set_weight(**given):
    layer = BatchNormalization(renorm=True)
    layer.build(SHAPE)
    for name, value in given.items():
        setattr(layer, name, value)
    return layer.get_weights()


def folded(**given):
    layer = BatchNormalization()
    layer.build(SHAPE)
    now = {"kernel": X, "bias": GAMMA, **given}
    return nbbn.fold_into(now["kernel"], now["bias"], layer)


def functional(function, *arguments, **options):
    """The function of nn with these arguments, some of them by name."""
    names = {"scale": GAMMA, "offset": GAMMA, "mean": GAMMA, "variance": GAMMA}
    return lambda **given: function(*arguments, **{**names, **options, **given})


TAKES = {
    **dict.fromkeys(("inputs", "mask", "residual", "dy"), call),
    "adjustment's scale": lambda **given: call(scale=given["adjustment's scale"]),
    "adjustment's bias": lambda **given: call(bias=given["adjustment's bias"]),
    **dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance", "renorm_stddev"), set_weight),
    **dict.fromkeys(("kernel", "bias"), folded),
    "x": lambda x: nn.moments(x, 0),
    "frequency_weights": lambda frequency_weights: nn.weighted_moments(X, 0, frequency_weights),
}
NORMALIZATION = functional(lambda **a: nn.batch_normalization(variance_epsilon=0.001, **{"x": X, **a}))
FUSED = functional(lambda **a: nn.fused_batch_norm(**{"x": IMAGE, **a}), is_training=False)


def fused_gradient(**given):
    now = {"scale": GAMMA, "mean": GAMMA, "variance": GAMMA, "y_backprop": IMAGE_DY, "x": IMAGE, **given}
    return nn.fused_batch_norm_grad(**now, is_training=False)


ARGUMENTS = [
    *((f, name) for name, f in TAKES.items()),
    *((NORMALIZATION, name) for name in ("x", "mean", "variance", "offset", "scale")),
    *((FUSED, name) for name in ("x", "mean", "variance", "offset", "scale")),
    *((fused_gradient, name) for name in ("x", "y_backprop", "mean", "variance", "scale")),
]
# np.matrix says at every chance that it will be deprecated.
MATRIX = pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
EACH_ARGUMENT = pytest.mark.parametrize(("function", "name"), ARGUMENTS, ids=lambda v: v if isinstance(v, str) else "")


def of_shape(name, function):
    """A right value for an argument."""
    if name in ("inputs", "residual", "dy", "mask", "adjustment's scale", "adjustment's bias", "kernel"):
        return X
    if name in ("x", "frequency_weights", "y_backprop"):
        return IMAGE if function in (FUSED, fused_gradient) else X
    return GAMMA


NO_ARRAYS = {
    "None": (lambda a: None, "received None"),
    "text": (lambda a: "abc", "received 'abc'"),
    "texts": (lambda a: a.astype(str), "received dtype str"),
    "complex": (lambda a: a + 0j, "received dtype complex64"),
    "objects": (lambda a: a.astype(object), "received dtype object"),
    "uneven lists": (lambda a: [[1.0], [1.0, 2.0]], r"received \[\[1.0\], \[1.0, 2.0\]\]"),
    "masked": (lambda a: np.ma.masked_greater(a, 1), "received a masked array"),
}
# Where None is none.
OPTIONAL = [(call, "mask"), (call, "residual"), (folded, "bias"), (NORMALIZATION, "offset"), (NORMALIZATION, "scale")]
OPTIONAL += [(FUSED, "mean"), (FUSED, "variance")]


@pytest.mark.parametrize(
    ("function", "name", "kind"),
    [(f, n, k) for f, n in ARGUMENTS for k in NO_ARRAYS if k != "None" or (f, n) not in OPTIONAL],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_no_array_of_numbers(function, name, kind):
    make, received = NO_ARRAYS[kind]
    with pytest.raises(TypeError, match=f"^{name} must be .*{received}"):
        function(**{name: make(of_shape(name, function))})


ARRAYS = {
    "matrix": lambda a: np.matrix(a) if a.ndim == 2 else a.view(np.recarray),
    "another byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "list": lambda a: a.tolist(),
    "read-only memory of a file": None,
}


def mapped(a, folder):
    found = np.memmap(folder / "a", a.dtype, "w+", shape=a.shape)
    found[...] = a
    return np.memmap(folder / "a", a.dtype, "r", shape=a.shape)


@MATRIX
@pytest.mark.parametrize("kind", ARRAYS)
@EACH_ARGUMENT
def test_every_kind_of_array_is_its_numbers(function, name, kind, tmp_path):
    value = of_shape(name, function)
    odd = mapped(value, tmp_path) if ARRAYS[kind] is None else ARRAYS[kind](value)
    float64 = kind == "list" and name in ("inputs", "x", "kernel")  # Python's floats decide about the result
    for found, right in zip(function(**{name: odd}), function(**{name: value}), strict=True):
        assert type(found) is np.ndarray
        assert float64 or found.dtype == right.dtype
        np.testing.assert_allclose(found, right, rtol=1e-4 if float64 else 0, atol=1e-5 if float64 else 0)


# -- out -----------------------------------------------------------------------------------------------------------


@MATRIX
@pytest.mark.parametrize("repeated", [1, 2, 3])
@pytest.mark.parametrize("kind", ["matrix", "memmap", "array"])
def test_out_of_every_kind_is_filled_and_returned(kind, repeated, tmp_path):
    out, dx = (np.memmap(tmp_path / n, F32, "w+", shape=SHAPE) for n in ("y", "dx"))
    if kind != "memmap":
        out, dx = (np.matrix(a) if kind == "matrix" else np.array(a) for a in (out, dx))
    layer = BatchNormalization()
    for _ in range(repeated):
        y, pullback = layer.vjp(X, training=True, out=out)
        gradient = pullback(DY, out=dx).inputs
    right, right_pullback = BatchNormalization().vjp(X, training=True)
    assert y is out
    assert gradient is dx
    np.testing.assert_array_equal(np.asarray(y), right)
    np.testing.assert_array_equal(np.asarray(dx), right_pullback(DY).inputs)


@pytest.mark.parametrize(
    ("out", "received"),
    [
        (np.zeros(SHAPE, np.dtype(F32).newbyteorder()), "dtype float32 in foreign byte order"),
        (np.ma.masked_array(np.zeros(SHAPE, F32)), "a masked array"),
        (np.full(SHAPE, "a"), "dtype str"),
        (np.full(SHAPE, None), "dtype object"),
    ],
    ids=["byte order", "masked", "text", "objects"],
)
def test_what_cannot_be_written_to(out, received):
    layer = BatchNormalization()
    _, pullback = layer.vjp(X, training=True)
    before = layer.get_weights()
    for attempt in (lambda: layer(X, training=True, out=out), lambda: pullback(DY, out=out)):
        with pytest.raises((TypeError, ValueError), match=f"out must .*received .*{received}"):
            attempt()
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


# -- integers with a dtype -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeated", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool, ">u2"])
def test_a_layer_with_a_dtype_casts_integers(dtype, repeated):
    """As its docstring says; the gradient has the layer's dtype, for uint8 holds none."""
    pixels = RNG.integers(0, 2 if dtype is bool else 256, (5, 4, 3)).astype(dtype)
    layer, plain = BatchNormalization(dtype="float32"), BatchNormalization()
    for _ in range(repeated):
        y, pullback = layer.vjp(pixels, training=True)
        right, right_pullback = plain.vjp(pixels.astype(F32), training=True)
    assert y.dtype == F32
    np.testing.assert_array_equal(y, right)
    np.testing.assert_array_equal(pullback(y).inputs, right_pullback(y).inputs)
    with pytest.raises(TypeError, match="inputs must be an array of float16"):
        BatchNormalization()(pixels)
    with pytest.raises(TypeError, match=r"inputs .* dtype complex64"):
        layer(pixels.astype(np.complex64), training=True)


# -- masks -----------------------------------------------------------------------------------------------------------

MASKS = [  # shape of the input, axis, shape of the mask, the same with the input's rank
    ((5, 5, 3), -1, (5,), (5, 1, 1)),
    ((4, 5, 3), -1, (4,), (4, 1, 1)),
    ((4, 5, 3), -1, (4, 5), (4, 5, 1)),
    ((4, 5, 3), -1, (1, 5), (1, 5, 1)),
    ((4, 5, 3), -1, (), (1, 1, 1)),
    ((4, 3, 5), 1, (4,), (4, 1, 1)),
    ((4, 3, 5), 1, (4, 5), (4, 1, 5)),
    ((7, 6, 5, 7), -1, (7,), (7, 1, 1, 1)),
    ((7, 6, 5, 7), 1, (7, 5), (7, 1, 5, 1)),
    ((7, 7, 7, 7), 1, (7, 7, 7), (7, 1, 7, 7)),
    ((7, 6, 5, 4), [1, 3], (7,), (7, 1, 1, 1)),
    ((7, 6, 5, 4), 0, (6,), (1, 6, 1, 1)),
]


@pytest.mark.parametrize(("shape", "axis", "given", "full"), MASKS)
def test_a_mask_of_fewer_dimensions_means_the_leading_ones(shape, axis, given, full):
    x, mask = RNG.normal(size=shape).astype(F32), np.asarray(RNG.uniform(0.5, 2, given))
    layer, right = BatchNormalization(axis=axis), BatchNormalization(axis=axis)
    y = layer(x, training=True, mask=mask)
    np.testing.assert_array_equal(y, right(x, training=True, mask=mask.reshape(full)))
    np.testing.assert_array_equal(layer.moving_mean, right.moving_mean)


@pytest.mark.parametrize("given", [(5,), (5, 4), (3,), (4, 3), (4, 5, 2), (1, 4, 5, 3)])
def test_a_mask_that_fits_neither_rule(given):
    """Both are said, with the shapes; the trailing dimensions alone are no rule."""
    message = "mask must broadcast against the input's leading non-feature dimensions (4, 5) (batch first) or, with 3 "
    message += f"dimensions, its shape (4, 5, 3); received shape {given}"
    with pytest.raises(ValueError, match=re.escape(message)):
        BatchNormalization()(np.zeros((4, 5, 3), F32), training=True, mask=np.ones(given))


# -- bools -----------------------------------------------------------------------------------------------------------

BOOLS = ("renorm", "center", "scale", "trainable", "fused", "bessel_correction", "synchronized")


@pytest.mark.parametrize("value", ["false", "no", 2, 1.0, 0.0, [], np.ones(2, bool), np.array("x")], ids=repr)
@pytest.mark.parametrize("name", BOOLS)
@pytest.mark.parametrize("kind", [BatchNormalization, v1.layers.BatchNormalization], ids=["v2", "v1"])
def test_what_is_no_bool(name, value, kind):
    with pytest.raises(TypeError, match=f"{name} must be True.* received {re.escape(repr(value))}"):
        kind(**{name: value})


@pytest.mark.parametrize("false", [False, np.False_, 0, np.int8(0), np.array(False)], ids=repr)
def test_every_bool(false):
    true = type(false)(1) if not isinstance(false, np.ndarray) else np.array(True)
    for name in BOOLS:
        assert getattr(BatchNormalization(**{name: false}), name) is False
    for name in ("center", "scale", "trainable", "bessel_correction"):
        assert getattr(BatchNormalization(**{name: true}), name) is True
    assert BatchNormalization(renorm=true).renorm is True
    layer, plain = BatchNormalization(), BatchNormalization()
    np.testing.assert_array_equal(layer(X, training=true), plain(X, training=True))
    np.testing.assert_array_equal(layer(X, training=false), plain(X))
    before = layer.get_weights()
    layer(X, training=True, update_statistics=false)
    np.testing.assert_array_equal(layer.moving_mean, before[2])


def test_a_first_call_with_what_is_no_bool():
    layer = BatchNormalization()
    with pytest.raises(TypeError, match="update_statistics"):
        layer(X, training=True, update_statistics="no")
    assert not layer.built


@pytest.mark.parametrize("repeated", [0, 1, 2])
def test_what_is_no_bool_in_a_call(repeated):
    layer = BatchNormalization()
    for _ in range(repeated):
        layer(X, training=True)
    layer.build(SHAPE)
    before = layer.get_weights()
    for training in (True, False):
        with pytest.raises(TypeError, match="update_statistics must be True or False; received 'no'"):
            layer(X, training=training, update_statistics="no")
    with pytest.raises(TypeError, match="training must be True, False or None; received 'false'"):
        layer(X, training="false")
    with pytest.raises(TypeError, match="trainable must be True or False; received 'no'"):
        layer.trainable = "no"
    assert layer.trainable is True
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


# -- options ---------------------------------------------------------------------------------------------------------


def test_synchronized_cannot_be_had():
    assert BatchNormalization().synchronized is None
    for kind in (BatchNormalization, v1.layers.BatchNormalization):
        with pytest.raises(ValueError, match=r"synchronized must be False or None: .*; received True"):
            kind(synchronized=True)
    with pytest.raises(ValueError, match="synchronized"):
        BatchNormalization.from_config({**BatchNormalization().get_config(), "synchronized": True})
    config = BatchNormalization(synchronized=False).get_config()
    assert config["synchronized"] is False
    assert BatchNormalization.from_config(config).synchronized is False


@pytest.mark.parametrize("axis", [np.array([1, 3]), range(1, 4, 2), (1, 3), np.array([1, 3], np.uint8)], ids=repr)
def test_axes(axis):
    layer = BatchNormalization(axis=axis)
    assert layer.axis == [1, 3]
    assert layer(IMAGE, training=True).shape == IMAGE.shape
    for mean, right in zip(nn.moments(IMAGE, axis), nn.moments(IMAGE, [1, 3]), strict=True):
        np.testing.assert_array_equal(mean, right)


@pytest.mark.parametrize("axis", [np.array(1), np.int64(1), 1], ids=repr)
def test_one_axis(axis):
    assert BatchNormalization(axis=axis).axis == 1


@pytest.mark.parametrize("axis", [np.array([1.0]), np.array([[1]]), np.array([True]), b"\1", {1}, "1"], ids=repr)
def test_what_is_no_axis(axis):
    with pytest.raises(TypeError, match=r"axis must be an int or a list, .*; received"):
        BatchNormalization(axis=axis)
    with pytest.raises(TypeError, match=r"axes must be an int or a list, .*; received"):
        nn.moments(X, axis)


def test_linear_is_no_activation():
    assert BatchNormalization(activation="linear").activation is None


@pytest.mark.parametrize("clipping", [None, {}, {"rmax": None}])
def test_clipping_that_says_nothing_needs_no_renorm(clipping, recwarn):
    BatchNormalization(renorm_clipping=clipping)
    assert not recwarn.list


def test_clipping_without_renorm():
    with pytest.warns(
        UserWarning, match=r"renorm_clipping has no effect on bn without renorm=True; .*'rmax': 3"
    ) as caught:
        BatchNormalization(renorm_clipping={"rmax": 3}, name="bn")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="renorm_clipping"):
        BatchNormalization.from_config({"renorm": False, "renorm_clipping": {"rmax": 3}})


COMPONENTS = [f"{w}_{k}" for k in ("initializer", "regularizer", "constraint") for w in ("gamma", "beta")]


@pytest.mark.parametrize("value", ["nothing", 3, {"class_name": "nothing"}, {"module": "mine", "class_name": "Zeros"}])
@pytest.mark.parametrize("name", [*COMPONENTS, "moving_mean_initializer", "moving_variance_initializer"])
def test_components_that_there_are_not(name, value):
    with pytest.raises(ValueError, match=f"^{name} must .*received"):
        BatchNormalization(**{name: value})


def test_components_whose_results_do_not_fit():
    layer = BatchNormalization(beta_initializer=lambda shape: np.zeros(7))
    with pytest.raises(ValueError, match=r"^beta_initializer .* must return"):
        layer.build(SHAPE)
    layer = BatchNormalization(
        gamma_regularizer=lambda w: w, beta_regularizer=lambda w: 0, gamma_constraint=lambda w: 1.0
    )
    layer.build(SHAPE)
    with pytest.raises(ValueError, match=r"^gamma_regularizer .* must return a scalar"):
        _ = layer.losses
    with pytest.raises(TypeError, match=r"^gamma_regularizer must be"):
        layer.regularization_gradients()
    with pytest.raises(ValueError, match=r"^gamma_constraint .* must return"):
        layer.apply_constraints()


def test_bfloat16_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ModuleNotFoundError, match="dtype='bfloat16' needs the package ml_dtypes"):
        BatchNormalization(dtype="bfloat16")


# -- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [5, None, "abc", (None, 3.0), (4, "3"), 2.5], ids=repr)
def test_what_is_no_shape(shape):
    for method in (BatchNormalization().build, BatchNormalization().compute_output_shape):
        with pytest.raises(TypeError, match=f"input_shape must be a shape.*received {re.escape(repr(shape))}"):
            method(shape)


def test_a_negative_dimension():
    with pytest.raises(ValueError, match=r"input_shape .* received \(-1, 3\)"):
        BatchNormalization().build((-1, 3))


# -- nn --------------------------------------------------------------------------------------------------------------

NN_NUMBERS = {
    "variance_epsilon": lambda value: nn.batch_normalization(X, GAMMA, GAMMA, None, None, value),
    "epsilon": lambda value: nn.fused_batch_norm(IMAGE, GAMMA, GAMMA, epsilon=value),
    "exponential_avg_factor": lambda value: nn.fused_batch_norm(
        IMAGE, GAMMA, GAMMA, GAMMA, GAMMA, exponential_avg_factor=value
    ),
    "is_training": lambda value: nn.fused_batch_norm(IMAGE, GAMMA, GAMMA, is_training=value),
    "keepdims": lambda value: nn.moments(X, 0, keepdims=value),
    "keep_dims": lambda value: nn.weighted_moments(X, 0, X, keep_dims=value),
}


@pytest.mark.parametrize("value", ["0.1", 1j, [1], -1.0], ids=repr)
@pytest.mark.parametrize("name", NN_NUMBERS)
def test_numbers_of_nn(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be .*received {re.escape(repr(value))}"):
        NN_NUMBERS[name](value)


def test_an_axis_of_nn_that_there_is_not():
    with pytest.raises(ValueError, match=r"axes must be between -2 and 1 .* received 2"):
        nn.moments(X, 2)


def test_shapes_of_nn_that_do_not_broadcast():
    with pytest.raises(ValueError, match=r"x \(4, 3\), scale \(3,\), offset \(3,\), mean \(2,\), variance \(3,\)"):
        nn.batch_normalization(X, np.ones(2), GAMMA, GAMMA, GAMMA, 0.1)


@pytest.mark.parametrize("shape", [(5,), (3, 4), (1, 4, 3), (2, 1)], ids=str)
def test_weights_of_nn_that_do_not_broadcast(shape):
    message = f"frequency_weights must broadcast .* (4, 3) of x; received shape {shape}"
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        nn.weighted_moments(X, 0, np.ones(shape))


@pytest.mark.parametrize("value", [np.array(["NHWC"]), ["NHWC"], None, 4, "nhwc"], ids=repr)
def test_data_formats(value):
    with pytest.raises(ValueError, match=r"^data_format must be one of "):
        nn.fused_batch_norm(IMAGE, GAMMA, GAMMA, data_format=value)


@pytest.mark.parametrize("name", ["mean", "variance"])
@pytest.mark.parametrize("value", ["abc", 1j, {}, object()], ids=["text", "complex", "dict", "object"])
def test_what_training_does_not_need_is_looked_at(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be "):
        nn.fused_batch_norm(IMAGE, GAMMA, GAMMA, **{name: value})


@pytest.mark.parametrize("keep", [False, True])
def test_keep_dims(keep):
    for function, weights in ((nn.moments, ()), (nn.weighted_moments, (X,))):
        found, right = function(X, 0, *weights, keep_dims=keep), function(X, 0, *weights, keepdims=keep)
        for a, b in zip(found, right, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.ndim == 1 + keep
        with pytest.raises(ValueError, match="keepdims and keep_dims are one"):
            function(X, 0, *weights, keepdims=keep, keep_dims=keep)
