"""Inference without the layer: its scale and shift, or a preceding kernel and bias that already contain them.

An activation of the layer is not part of either: whoever runs the result applies it afterwards.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nbbn.call.forward import Normalizer
from nbbn.call.operands import as_input
from nbbn.core import dtypes
from nbbn.core.layout import Sizes
from nbbn.core.options import Options, parse_axis
from nbbn.state.variables import PARAMETERS, STATISTICS, Variables

Array = np.ndarray


def scale_and_shift(layer: Normalizer, dtype: Any = None) -> tuple[Array, Array]:
    """The arrays with which x * scale + shift is what the layer computes in inference, before its activation.

        scale = gamma / sqrt(moving_variance + epsilon)
        shift = beta - moving_mean * scale

    They are those of now: training the layer further does not change them. Where the mean is much larger than the
    standard deviation, x * scale and shift nearly cancel: the error is a rounding of |moving_mean * scale|, while the
    layer, which subtracts the mean first, has that of the result.

    Args:
        dtype: of the result; None is float64, in which it is computed.
    Returns: scale, shift in the shape of the layer's parameters: (C,) for one axis, which broadcasts against inputs
        with the channels last; the input's rank with 1 in every reduced dimension for several axes; with virtual
        batches one more 1 at index 1.
    Raises: ValueError if the layer is not built, or if `dtype` cannot hold a value; TypeError for another dtype.
    """
    target = np.dtype(np.float64) if dtype is None else dtypes.resolve(dtype)
    variables = _variables(layer, "fold()")
    mean, scale, beta = _terms(variables, layer.options.epsilon)
    shape = variables.shapes.params
    with np.errstate(invalid="ignore"):  # an infinite scale, where the layer's output is not finite either
        shift = beta - mean * scale
    return _round(scale.reshape(shape), target, "scale"), _round(shift.reshape(shape), target, "shift")


def fold_into(kernel: Any, bias: Any, layer: Normalizer, *, axis: int | Sequence[int] = -1) -> tuple[Array, Array]:
    """The kernel and bias of a convolution or dense layer that also does the inference of the layer that follows it.

        layer(conv(x, kernel) + bias) = conv(x, new_kernel) + new_bias

    Nothing may lie between the two (an activation of the convolution), and an activation of `layer` still has to
    follow. A layer that precedes a convolution cannot be folded: zero padding would have to be padding with its shift.

    Args:
        kernel: float16, bfloat16, float32 or float64.
        bias: (C,) of such a dtype, or None.
        layer: a built BatchNormalization with one feature axis and C channels.
        axis: the dimension of the kernel that counts the output channels; several dimensions count them together, the
            last of them fastest.

            =====================================================  ========
            dense (in, out), convolution (..., in, out)             -1
            TensorFlow's transposed convolution (..., out, in)      -2
            TensorFlow's depthwise convolution (..., in, factor)    (-2, -1)
            PyTorch's Linear and Conv (out, in, ...), also grouped  0
            PyTorch's ConvTranspose (in, out, ...)                  1
            =====================================================  ========
    Returns: new arrays, contiguous, in the dtype of the kernel; computed in float64. The bias has shape (C,).
    Raises: TypeError, ValueError for arguments that are not possible or do not fit, and if the kernel's dtype cannot
        hold a value of the result.
    """
    weights = as_input(kernel, "kernel")
    axes = _output_axes(axis, weights.ndim)
    sizes = tuple(weights.shape[a] for a in axes)
    variables = _variables(layer, "fold_into()")
    if len(variables.shapes.features) != 1:
        several = list(layer.options.resolved_axis())
        raise ValueError(f"layer must have one feature axis to be folded into a kernel; received axis={several}")
    channels = math.prod(variables.shapes.params)
    if math.prod(sizes) != channels:
        raise ValueError(
            f"kernel must have the layer's {channels} channels in axis={axis!r}; received shape {weights.shape}"
        )
    offset = np.zeros(channels) if bias is None else dtypes.as_float_array(bias, "bias").astype(np.float64)
    if offset.shape != (channels,):
        raise ValueError(f"bias must have shape {(channels,)}, one value per channel; received {offset.shape}")
    mean, scale, beta = _terms(variables, layer.options.epsilon)
    last = range(-len(axes), 0)
    with np.errstate(invalid="ignore"):
        scaled = np.moveaxis(weights.astype(np.float64), axes, last) * scale.reshape(sizes)
        shifted = (offset - mean) * scale + beta
    folded = np.moveaxis(scaled, last, axes)
    return _round(folded, weights.dtype, "kernel"), _round(shifted, weights.dtype, "bias")


def _variables(layer: Normalizer, what: str) -> Variables:
    if not isinstance(getattr(layer, "options", None), Options):
        raise TypeError(f"layer must be a BatchNormalization of nbbn; received {layer!r}")
    return layer._built_variables(what).on_host()


def _terms(variables: Variables, epsilon: float) -> tuple[Array, Array, Array]:
    """mean, scale and beta with which inference is (x - mean) * scale + beta: (C,) float64."""
    state = variables.state.astype(np.float64)  # one reference: a mean and a variance of the same training step
    gamma, beta = (variables.params[PARAMETERS.index(n)].astype(np.float64) for n in ("gamma", "beta"))
    with np.errstate(divide="ignore", invalid="ignore"):  # the layer's output has the same infinity or NaN
        scale = gamma / np.sqrt(state[STATISTICS.index("moving_variance")] + epsilon)
    return state[STATISTICS.index("moving_mean")], scale, beta


def _output_axes(axis: Any, rank: int) -> Sizes:
    parsed = parse_axis(axis)
    axes = (parsed,) if isinstance(parsed, int) else parsed
    if not all(-rank <= a < rank for a in axes) or len({a % rank for a in axes}) < len(axes):
        raise ValueError(f"axis must name different dimensions of the kernel, {-rank} to {rank - 1}; received {axis!r}")
    return axes


def _round(values: Array, dtype: np.dtype, name: str) -> Array:
    """`values` in `dtype`, contiguous. Raises: ValueError if one is finite and too large for it."""
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype, order="C")
    lost = np.isfinite(values) & ~np.isfinite(rounded)
    if lost.any():
        largest = np.abs(values[lost]).max()
        raise ValueError(f"the folded {name} must fit into {dtype.name}; a value is {largest:.3g}: use a wider dtype")
    return rounded
