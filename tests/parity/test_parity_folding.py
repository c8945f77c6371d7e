"""Folded layers against the layers of TensorFlow, and against PyTorch's own fusion."""

from typing import Any

import numpy as np
import pytest

import nbbn
from nbbn.layer.folding import fold_into
from tests.parity.tf_side import tf_keras

pytestmark = pytest.mark.parity

# Float32 sums of at most 3 x 3 x 8 products, in an order of TensorFlow's choice, and a few operations around them.
ROUNDINGS = 80 * np.finfo(np.float32).eps

IMAGE = (2, 9, 9, 4)
LAYERS: dict[str, tuple[Any, tuple[int, ...], Any]] = {
    "Dense": (lambda: tf_keras.layers.Dense(6), (5, 4), -1),
    "Dense on a sequence": (lambda: tf_keras.layers.Dense(6), (5, 3, 4), -1),
    "Conv1D": (lambda: tf_keras.layers.Conv1D(6, 3, padding="causal"), (2, 9, 4), -1),
    "Conv2D": (lambda: tf_keras.layers.Conv2D(6, 3), IMAGE, -1),
    "Conv2D, same": (lambda: tf_keras.layers.Conv2D(6, 3, padding="same"), IMAGE, -1),
    "Conv2D, strides": (lambda: tf_keras.layers.Conv2D(6, 3, strides=2, padding="same"), IMAGE, -1),
    "Conv2D, dilation": (lambda: tf_keras.layers.Conv2D(6, 3, dilation_rate=2, padding="same"), IMAGE, -1),
    "Conv2D, no bias": (lambda: tf_keras.layers.Conv2D(6, 3, use_bias=False), IMAGE, -1),
    "Conv3D": (lambda: tf_keras.layers.Conv3D(6, 2), (2, 4, 4, 4, 4), -1),
    "DepthwiseConv1D": (lambda: tf_keras.layers.DepthwiseConv1D(3, depth_multiplier=3), (2, 9, 4), (-2, -1)),
    "DepthwiseConv2D": (
        lambda: tf_keras.layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same"),
        IMAGE,
        (-2, -1),
    ),
    "Conv2DTranspose": (lambda: tf_keras.layers.Conv2DTranspose(6, 3, strides=2, padding="same"), IMAGE, -2),
}


def random_layers(channels: int, rank: int) -> tuple[Any, Any]:
    """nbbn's layer and that of tf_keras, with the same weights."""
    rng = np.random.default_rng(1)
    signed = rng.choice([-1, 1], (3, channels)) * rng.uniform(0.25, 2, (3, channels))
    weights = [*signed, rng.uniform(0.25, 2, channels)]
    shape = (None,) * (rank - 1) + (channels,)
    layers = nbbn.BatchNormalization(), tf_keras.layers.BatchNormalization()
    for layer in layers:
        layer.build(shape)
        layer.set_weights(weights)
    return layers


@pytest.mark.parametrize(("make", "shape", "axis"), LAYERS.values(), ids=LAYERS)
def test_folded_into_tensorflows_layer(make: Any, shape: tuple[int, ...], axis: Any) -> None:
    """The layer alone, with folded weights, is the layer followed by tf_keras's BatchNormalization."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    linear = make()
    linear.build(shape)
    kernel, *bias = (rng.normal(size=w.shape).astype(np.float32) for w in linear.get_weights())
    linear.set_weights([kernel, *bias])
    y = linear(x).numpy()
    ours, theirs = random_layers(y.shape[-1], y.ndim)
    expected = theirs(y).numpy()

    new_kernel, new_bias = fold_into(kernel, bias[0] if bias else None, ours, axis=axis)
    linear.set_weights([new_kernel, new_bias] if bias else [new_kernel])
    found = linear(x).numpy() if bias else linear(x).numpy() + new_bias

    linear.set_weights([abs(kernel), *map(abs, bias)])
    scale = abs(ours.gamma) / np.sqrt(ours.moving_variance + ours.epsilon)
    terms = (linear(abs(x)).numpy() + abs(ours.moving_mean)) * scale + abs(ours.beta)
    assert (abs(found - expected) <= ROUNDINGS * terms).all()


def torch_layers(kind: str, groups: int, has_bias: bool) -> tuple[Any, Any, Any]:
    """PyTorch's convolution of 4 to 6 channels and BatchNorm2d, and nbbn's layer with the same weights."""
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    torch.manual_seed(0)
    conv = getattr(torch.nn, kind)(4, 6, 3, groups=groups, bias=has_bias).eval()
    bn = torch.nn.BatchNorm2d(6).eval()
    layer = nbbn.BatchNormalization(axis=1, epsilon=bn.eps)
    layer.build((None, 6, None, None))
    layer.set_weights(random_layers(6, 4)[0].get_weights())
    names = ("weight", "bias", "running_mean", "running_var")
    bn.load_state_dict(dict(zip(names, map(torch.tensor, layer.get_weights()), strict=True)), strict=False)
    return conv, bn, layer


@pytest.mark.parametrize(("kind", "groups"), [("Conv2d", 1), ("Conv2d", 2), ("ConvTranspose2d", 1)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_same_as_pytorchs_fusion(kind: str, groups: int, has_bias: bool) -> None:
    conv, bn, layer = torch_layers(kind, groups, has_bias)
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    transposed = kind == "ConvTranspose2d"
    fused = fuse_conv_bn_eval(conv, bn, transpose=transposed)
    bias = conv.bias.detach() if has_bias else None
    kernel, bias = fold_into(conv.weight.detach(), bias, layer, axis=1 if transposed else 0)
    # PyTorch computes in float32: a root, a quotient and a product, and for the bias two sums of values below 20.
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(kernel, fused.weight.detach().numpy(), rtol=4 * eps)
    np.testing.assert_allclose(bias, fused.bias.detach().numpy(), rtol=4 * eps, atol=4 * eps * 20)


def test_pytorchs_grouped_transposed_convolution() -> None:
    """Which PyTorch does not fuse: the outputs of a group are those of its part of the kernel's first dimension."""
    conv, bn, layer = torch_layers("ConvTranspose2d", 2, True)
    import torch

    with torch.no_grad():
        x = torch.randn(2, 4, 5, 5)
        expected = bn(conv(x))
        kernel, bias = fold_into(conv.weight.reshape(2, 2, 3, 3, 3), conv.bias, layer, axis=(0, 2))
        conv.weight.copy_(torch.from_numpy(kernel.reshape(4, 3, 3, 3)))
        conv.bias.copy_(torch.from_numpy(bias))
        # Sums of 2 x 9 products of values of about 1, times a scale of at most 4.
        np.testing.assert_allclose(conv(x), expected, rtol=0, atol=20 * np.finfo(np.float32).eps * 20)
