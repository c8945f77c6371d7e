"""Inference without the layer gives what the layer gives."""

from typing import Any, NamedTuple
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from nbbn import BatchNormalization
from nbbn.compat import v1
from nbbn.layer.folding import fold_into, scale_and_shift
from nbbn.state.variables import Variables

EPS = np.finfo(np.float64).eps


def trained(shape, seed=0, kind=BatchNormalization, **options):
    """A layer for inputs of this shape; its weights are random, of both signs, and none is small."""
    layer = kind(**options)
    layer.build(shape)
    rng = np.random.default_rng(seed)
    values = []
    for name, weight in layer.get_state().items():
        sign = 1 if any(what in name for what in ("variance", "stddev", "seen")) else rng.choice([-1, 1], weight.shape)
        values.append(sign * rng.uniform(0.25, 2, weight.shape))
    layer.set_weights(values)
    return layer


def per_channel(layer, values, rank):
    """`values`, in the shape of the layer's parameters, in one that broadcasts against an input."""
    if isinstance(layer.axis, list):
        return values
    return values.reshape([-1 if i == layer.axis % rank else 1 for i in range(rank)])


# --- scale and shift ------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "channels first": {"axis": 1},
    "several axes": {"axis": [1, 3]},
    "renorm": {"renorm": True},
    "no gamma": {"scale": False},
    "no beta": {"center": False},
    "no parameters": {"scale": False, "center": False},
    "cumulative": {"momentum": None},
    "ghost batches": {"virtual_batch_size": 2},
    "ghost batches, channels first": {"virtual_batch_size": 2, "axis": 1},
    "not trainable": {"trainable": False},
    "version 1": {"kind": v1.keras.layers.BatchNormalization},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scale_and_shift_are_the_layers_inference(options):
    shape = (4, 3, 5, 2)
    layer = trained(shape, dtype="float64", **options)
    x = np.random.default_rng(1).normal(1, 2, size=shape)
    scale, shift = scale_and_shift(layer)
    assert scale.shape == shift.shape == layer.moving_mean.shape
    scale, shift, mean = (per_channel(layer, v, x.ndim) for v in (scale, shift, layer.moving_mean))
    # Half a unit of float64 each for the scale, the product with x or mean, and the sums.
    bound = 4 * EPS * ((abs(x) + abs(mean)) * abs(scale) + abs(shift))
    assert (abs(x * scale + shift - layer(x)) <= bound).all()


def test_they_have_the_digits_of_float64_unless_another_dtype_is_asked_for():
    """From float32 parameters."""
    layer = trained((None, 7), epsilon=1e-3)
    gamma, beta, mean, variance = (w.astype(np.float64) for w in layer.weights)
    scale, shift = scale_and_shift(layer)
    assert scale.dtype == shift.dtype == np.float64
    expected = gamma / np.sqrt(variance + 1e-3)
    np.testing.assert_allclose(scale, expected, rtol=2 * EPS)
    np.testing.assert_allclose(shift, beta - mean * expected, rtol=0, atol=4 * EPS * abs(mean * expected).max())
    for dtype in ("float16", "bfloat16", np.float32):
        for rounded, exact in zip(scale_and_shift(layer, dtype), (scale, shift), strict=True):
            assert rounded.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
            np.testing.assert_array_equal(rounded, exact.astype(rounded.dtype))


def test_they_stay_when_the_layer_is_trained_further():
    layer = trained((None, 3))
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    before = layer(x)
    scale, shift = scale_and_shift(layer)
    layer(x, training=True)
    layer.gamma[...] += 1
    np.testing.assert_allclose(x * scale + shift, before, atol=1e-5)  # float32 values of about 10
    assert abs(layer(x) - before).max() > 0.1


def test_they_come_from_one_training_step():
    """Mean m and variance m^2 belong together: the shift is -m / sqrt(m^2), or they are of different steps."""
    layer = BatchNormalization(epsilon=0.0, center=False, scale=False)
    layer.build((None, 1))
    steps = [np.array([[m], [m * m]]) for m in (1.0, 8.0, 64.0, 512.0)]
    changing = mock.patch.object(Variables, "state", new_callable=mock.PropertyMock, create=True, side_effect=steps)
    with changing:  # as if another thread trained between any two reads
        assert scale_and_shift(layer)[1] == -1
        assert fold_into(np.ones((1, 1)), None, layer)[1] == -1


def test_a_variance_of_zero_gives_infinity_without_a_warning():
    layer = BatchNormalization(epsilon=0.0)
    layer.build((None, 2))
    layer.moving_variance = [0, 4]
    scale, shift = scale_and_shift(layer)
    np.testing.assert_array_equal(scale, [np.inf, 0.5])
    np.testing.assert_array_equal(shift, [np.nan, 0])
    kernel, bias = fold_into(np.ones((1, 2), np.float32), None, layer)
    np.testing.assert_array_equal(kernel, [[np.inf, 0.5]])
    np.testing.assert_array_equal(bias, [np.nan, 0])


# --- kernels --------------------------------------------------------------------------------------------------------


def windows(x):
    """(n, h, w, c, 3, 3): what a 3 x 3 convolution with zero padding sees of an NHWC input."""
    return sliding_window_view(np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]), (3, 3), axis=(1, 2))


def grouped(x, kernel):
    """PyTorch's: kernel (out, in / 2, 3, 3); the outputs of a group follow each other."""
    w = windows(x)
    w = w.reshape(*w.shape[:3], 2, -1, 3, 3)
    y = np.einsum("nhwgcij,gocij->nhwgo", w, kernel.reshape(2, -1, *kernel.shape[1:]))
    return y.reshape(*y.shape[:3], -1)


def grouped_transposed(x, kernel):
    """PyTorch's, with the kernel (in, out / 2, 3, 3) as (group, in / 2, out / 2, 3, 3)."""
    w = windows(x)
    w = w.reshape(*w.shape[:3], 2, -1, 3, 3)
    y = np.einsum("nhwgcij,gcoij->nhwgo", w, kernel[..., ::-1, ::-1])
    return y.reshape(*y.shape[:3], -1)


def depthwise(x, kernel):
    """TensorFlow's: output c * factor + m."""
    y = np.einsum("nhwcij,ijcm->nhwcm", windows(x), kernel)
    return y.reshape(*y.shape[:3], -1)


def convolution(expression):
    return lambda x, kernel: np.einsum(expression, windows(x), kernel)


def transposed(expression, image_axes):
    """With stride 1 it is the convolution with the flipped kernel."""
    return lambda x, kernel: np.einsum(expression, windows(x), np.flip(kernel, image_axes))


class Linear(NamedTuple):
    """A linear layer, as TensorFlow or PyTorch defines it, on an input of 4 channels."""

    input: tuple[int, ...]
    kernel: tuple[int, ...]
    axis: int | tuple[int, ...]
    run: Any
    channels: int = 6


IMAGE = (2, 5, 4, 4)
LINEAR = {
    "dense": Linear((9, 4), (4, 6), -1, np.matmul),
    "dense, positive axis": Linear((9, 4), (4, 6), 1, np.matmul),
    "PyTorch dense": Linear((9, 4), (6, 4), 0, lambda x, k: x @ k.T),
    "convolution": Linear(IMAGE, (3, 3, 4, 6), -1, convolution("nhwcij,ijco->nhwo")),
    "PyTorch convolution": Linear(IMAGE, (6, 4, 3, 3), 0, convolution("nhwcij,ocij->nhwo")),
    "PyTorch grouped convolution": Linear(IMAGE, (6, 2, 3, 3), 0, grouped),
    "depthwise": Linear(IMAGE, (3, 3, 4, 2), (-2, -1), depthwise, 8),
    "depthwise, a list of axes": Linear(IMAGE, (3, 3, 4, 2), [2, 3], depthwise, 8),
    "transposed": Linear(IMAGE, (3, 3, 6, 4), -2, transposed("nhwcij,ijoc->nhwo", (0, 1))),
    "PyTorch transposed": Linear(IMAGE, (4, 6, 3, 3), 1, transposed("nhwcij,coij->nhwo", (2, 3))),
    "PyTorch grouped transposed": Linear(IMAGE, (2, 2, 3, 3, 3), (0, 2), grouped_transposed),
}


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR)
def test_the_folded_kernel_does_both(case, has_bias):
    rng = np.random.default_rng(2)
    x, kernel = rng.normal(size=case.input), rng.normal(size=case.kernel)
    bias = rng.normal(size=case.channels) if has_bias else None
    offset = np.zeros(case.channels) if bias is None else bias
    layer = trained((*case.input[:-1], case.channels), dtype="float64")
    expected = layer(case.run(x, kernel) + offset)

    new_kernel, new_bias = fold_into(kernel, bias, layer, axis=case.axis)
    assert (new_kernel.shape, new_bias.shape) == (kernel.shape, (case.channels,))

    # Sums of at most 36 products, each of which may be rounded after every addition, and a few operations around them.
    scale = layer.gamma / np.sqrt(layer.moving_variance + layer.epsilon)
    terms = (case.run(abs(x), abs(kernel)) + abs(offset) + abs(layer.moving_mean)) * abs(scale) + abs(layer.beta)
    assert (abs(case.run(x, new_kernel) + new_bias - expected) <= 40 * EPS * terms).all()


ONE_AXIS = {name: options for name, options in OPTIONS.items() if name != "several axes"}


@pytest.mark.parametrize("options", ONE_AXIS.values(), ids=ONE_AXIS)
def test_every_option_with_one_feature_axis_folds(options):
    shape = (4, 5, 3, 6) if "axis" not in options else (4, 6, 5, 3)
    layer = trained(shape, dtype="float64", **options)
    kernel, bias = fold_into(np.eye(6), np.arange(6.0), layer)
    scale, shift = (v.ravel() for v in scale_and_shift(layer))
    np.testing.assert_array_equal(kernel, np.diag(scale))
    np.testing.assert_allclose(bias, np.arange(6) * scale + shift, rtol=0, atol=8 * EPS * 20)  # values up to 20


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_the_result_has_the_kernels_dtype_and_is_rounded_once(dtype):
    layer = trained((None, 6))
    rng = np.random.default_rng(3)
    kernel, bias = np.asfortranarray(rng.normal(size=(6, 5)).astype(dtype)), rng.normal(size=6).astype(np.float32)
    result = fold_into(kernel, bias, layer, axis=0)
    exact = fold_into(kernel.astype(np.float64), bias, layer, axis=0)
    for rounded, values in zip(result, exact, strict=True):
        assert rounded.dtype == dtype
        assert rounded.flags.c_contiguous
        np.testing.assert_array_equal(rounded, values.astype(dtype))


def test_inputs_are_not_touched_even_where_nothing_changes():
    layer = BatchNormalization(epsilon=0.0)
    layer.build((None, 3))
    kernel, bias = np.ones((2, 3), np.float32), np.ones(3, np.float32)
    for a in (kernel, bias):
        a.flags.writeable = False
    new_kernel, new_bias = fold_into(kernel, bias, layer)
    np.testing.assert_array_equal(new_kernel, kernel)
    np.testing.assert_array_equal(new_bias, bias)
    new_kernel[...] = new_bias[...] = 5
    assert (kernel == 1).all()
    assert (bias == 1).all()


def test_whatever_numpy_makes_an_array_of_is_accepted():
    layer = trained((None, 2))
    kernel, bias = fold_into([[1.0, 2.0]], [3.0, 4.0], layer)
    expected = fold_into(np.array([[1.0, 9.0, 2.0]])[:, ::2], np.array([3.0, 4.0]).astype(">f8"), layer)
    np.testing.assert_array_equal(kernel, expected[0])
    np.testing.assert_array_equal(bias, expected[1])


# --- errors ---------------------------------------------------------------------------------------------------------

LAYER = trained((None, 6))
KERNEL = np.ones((4, 6), np.float32)
ERRORS: dict[str, tuple[Any, ...]] = {
    "too few channels": ((KERNEL.T, None, LAYER), {}, ValueError, r"kernel must have the layer's 6 channels.*\(6, 4\)"),
    "several axes": ((np.ones((2, 4)), None, LAYER), {"axis": (0, 1)}, ValueError, r"6 channels in axis=\(0, 1\)"),
    "axis out of range": ((KERNEL, None, LAYER), {"axis": 2}, ValueError, "axis must name .* -2 to 1; received 2"),
    "axis below": ((KERNEL, None, LAYER), {"axis": -3}, ValueError, "axis must name .* -2 to 1; received -3"),
    "axis twice": ((KERNEL, None, LAYER), {"axis": (1, -1)}, ValueError, r"axis must name .* received \(1, -1\)"),
    "axis of no kind": ((KERNEL, None, LAYER), {"axis": "HWIO"}, TypeError, "axis must be .* received 'HWIO'"),
    "no axis": ((KERNEL, None, LAYER), {"axis": ()}, ValueError, "axis must name at least one"),
    "bias per input": ((KERNEL, np.ones(4), LAYER), {}, ValueError, r"bias must have shape \(6,\).* received \(4,\)"),
    "bias of rank 0": ((KERNEL, 1.0, LAYER), {}, ValueError, r"bias must have shape \(6,\).* received \(\)"),
    "bias of rank 2": ((KERNEL, np.ones((1, 6)), LAYER), {}, ValueError, r"bias must have .* received \(1, 6\)"),
    "integer bias": (
        (KERNEL, np.ones(6, int), LAYER),
        {},
        TypeError,
        "bias must be an array of .* received dtype int64",
    ),
    "integer kernel": (
        (KERNEL.astype(int), None, LAYER),
        {},
        TypeError,
        "kernel must be an array of .* received dtype int64",
    ),
    "scalar kernel": ((1.0, None, LAYER), {}, ValueError, "kernel must have at least one dimension"),
    "no layer": (
        (KERNEL, None, "layer"),
        {},
        TypeError,
        "layer must be a BatchNormalization of nbbn; received 'layer'",
    ),
    "layer not built": ((KERNEL, None, BatchNormalization()), {}, ValueError, r"fold_into\(\) needs a built layer"),
    "layer of several axes": (
        (KERNEL, None, trained((4, 2, 5, 3), axis=[1, 3])),
        {},
        ValueError,
        r"layer must have one feature axis .* axis=\[1, 3\]",
    ),
}


@pytest.mark.parametrize(("arguments", "options", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_folded_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fold_into(*arguments, **options)


def test_scale_and_shift_need_a_built_layer_and_a_float_dtype():
    with pytest.raises(ValueError, match=r"fold\(\) needs a built layer"):
        scale_and_shift(BatchNormalization())
    with pytest.raises(TypeError, match=r"dtype must be one of .* received 'int8'"):
        scale_and_shift(LAYER, "int8")
    with pytest.raises(TypeError, match="layer must be a BatchNormalization of nbbn; received None"):
        scale_and_shift(None)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_what_the_dtype_cannot_hold_is_refused(dtype):
    """Instead of becoming infinite; what already is stays so."""
    layer = trained((None, 2), dtype="float64")
    layer.gamma = [1e40, 1]
    name = np.dtype(dtype).name
    with pytest.raises(ValueError, match=f"folded kernel must fit into {name}; a value is .*e\\+39"):
        fold_into(np.ones((1, 2), dtype), None, layer)
    with pytest.raises(ValueError, match=f"folded scale must fit into {name}"):
        scale_and_shift(layer, dtype)
    with pytest.raises(ValueError, match=f"folded bias must fit into {name}"):
        fold_into(np.zeros((1, 2), dtype), None, layer)
    layer.gamma = [1, 1]
    kernel, _ = fold_into(np.array([[np.inf, np.nan]], dtype), None, layer)
    np.testing.assert_array_equal(kernel.astype(float), [[np.inf, np.nan]])
