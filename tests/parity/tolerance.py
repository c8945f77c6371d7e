"""How far two correct implementations of one call may differ, in every one of its results.

Both sides compute in float32 (float64 for float64 input), in different orders: TensorFlow forms
x / sigma - mean / sigma, nbbn (x - mean) / sigma. So an error of one unit in the last place of x or mean grows by
1 / sigma, and is then carried on by gamma, a and r. `magnitudes` follows that growth element by element, from the
float64 reference of the same call; what is left is the number of roundings. Results of 16 bits are rounded once more,
at the very end.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from tests.oracle.reference import Array, Reference, Step, divide, sum_to
from tests.parity.tf_side import parameter_dtype

# Sums here have up to a few hundred terms, whose errors mostly cancel; three moving averages follow each other.
ROUNDINGS = 8


class Magnitudes(NamedTuple):
    """For each result the size of the numbers whose rounding it inherits; shapes broadcast against the result."""

    y: Array
    inputs: Array
    gamma: Array
    beta: Array
    a: Array | None
    b: Array | None
    mean: Array
    variance: Array


def magnitudes(layer: Reference, step: Step, dy: np.ndarray) -> Magnitudes:
    """`step` is what `layer` returned for the call; it has the weights from before."""
    abs_dy = np.abs(np.asarray(dy, np.float64)).reshape(step.x.shape)
    a, b = (0 if v is None else np.abs(v) for v in (step.a, step.b))
    a = 1 if step.a is None else a
    abs_x = np.abs(step.x).max(axis=step.axes, keepdims=True) + np.abs(step.mean)
    steep = 1 + abs_x / step.sigma

    z = np.abs(step.r) * steep
    if layer.renorm and not step.frozen:
        divisor = np.maximum(layer.renorm_stddev, np.sqrt(layer.epsilon)).reshape(step.gamma.shape)
        z = z + (np.abs(step.mean) + np.abs(layer.renorm_mean).reshape(step.gamma.shape)) / divisor
    z = z + np.zeros_like(step.x)
    adjusted = z * a + b
    gamma, beta = np.abs(step.gamma), np.abs(step.beta)

    g = abs_dy * gamma * a * np.abs(step.r)
    shared = np.zeros_like(g)
    if not step.frozen:
        sum_g, sum_g_x_hat = (v.sum(axis=step.axes, keepdims=True) for v in (g, g * np.abs(step.x_hat)))
        share = divide(step.w, np.broadcast_to(step.W, step.w.shape))
        shared = share * (sum_g + np.abs(step.x_hat) * sum_g_x_hat)

    def parameter_sum(values: Array) -> Array:
        return sum_to(values, gamma.shape).reshape(layer.parameter_shape)

    return Magnitudes(
        y=(adjusted * gamma + beta).reshape(step.input_shape),
        inputs=((g + shared) * steep / step.sigma).reshape(step.input_shape),
        gamma=parameter_sum(abs_dy * adjusted),
        beta=parameter_sum(abs_dy),
        a=None if step.a is None else sum_to(abs_dy * gamma * z, step.a.shape),
        b=None if step.b is None else sum_to(abs_dy * gamma, step.b.shape),
        mean=np.max(abs_x),
        variance=np.max(step.sigma**2 * steep),
    )


def tolerance(magnitude: Array, expected: np.ndarray, compute_dtype: str) -> Array:
    """Absolute tolerance per element: roundings of the computation, and of storing the result in 16 bits.

    Two values that agree before the last rounding may be stored as neighbours: one unit in the last place apart.
    """
    bound = ROUNDINGS * np.finfo(parameter_dtype(compute_dtype)).eps * magnitude
    if expected.dtype.itemsize == 2:
        info = ml_dtypes.finfo(expected.dtype)
        bound = bound + np.abs(expected.astype(np.float64)) * float(info.eps) + float(info.smallest_subnormal)
    return bound


def assert_close(actual: np.ndarray, expected: np.ndarray, bound: Array, what: str) -> None:
    """Same dtype, same shape, and every element within its bound."""
    actual = np.asarray(actual)
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, TensorFlow has {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, TensorFlow has {expected.shape}"
    if not actual.size:
        return
    ours, theirs = actual.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        excess = np.where(ours == theirs, 0, np.abs(ours - theirs) / np.broadcast_to(bound, ours.shape))
    worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), ours.shape)
    assert excess[worst] <= 1, (
        f"{what}: {ours[worst]!r} at {tuple(map(int, worst))}, TensorFlow has {theirs[worst]!r}; "
        f"that is {excess[worst]:.3g} times the tolerance"
    )
