"""Whether a layer agrees with the oracle, and how far from it a result may be.

Every bound is `FEW` units of rounding times the natural scale of the quantity. Elements, parameters and
state are float32 for 16-bit and float32 inputs, float64 for float64. Whatever is summed or computed once
per statistic is float64, and x - mean is formed before anything is scaled: so cancellation in sums and at
large means costs float64 digits, not float32 ones. A bound is therefore the sum of two: units of the stored
dtype on the size of the terms that are left after the cancellation, and units of float64 on the size of the
terms before it. A 16-bit result adds half a unit in the last place of what is stored.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from ml_dtypes import finfo
from numpy.typing import ArrayLike, NDArray

from tests.oracle.reference import Gradients, Reference, Step, divide, sum_to

Array = NDArray[np.float64]

# A dozen dependent operations, most of them half a unit each, and room for their order.
FEW = 16


def state_dtype(dtype: Any) -> np.dtype[Any]:
    """Dtype of parameters and statistics for an input dtype."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def check(name: str, found: ArrayLike, expected: ArrayLike, bound: ArrayLike, dtype: Any) -> None:
    """Fail unless `found`, stored as `dtype`, is within `bound` of `expected` before its rounding."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, f"{name}: shape {found.shape}, expected {expected.shape}"
    assert found.dtype == dtype, f"{name}: dtype {found.dtype}, expected {np.dtype(dtype)}"
    info = finfo(dtype)
    found = found.astype(np.float64)
    half_ulp = 0.5 * (float(info.eps) * (np.abs(expected) + bound) + float(info.smallest_subnormal))
    overflow = (np.abs(expected) + bound + half_ulp >= float(info.max)) & (found == np.copysign(np.inf, expected))
    with np.errstate(invalid="ignore"):
        wrong = ~((np.abs(found - expected) <= bound + half_ulp) | overflow)
    if wrong.any():
        at = np.unravel_index(np.argmax(wrong), wrong.shape)
        where = f"{int(wrong.sum())} of {wrong.size} elements, first at {tuple(int(i) for i in at)}"
        allowed = np.broadcast_to(bound + half_ulp, wrong.shape)[at]
        raise AssertionError(f"{name}: {where}: {found[at]!r}, expected {expected[at]!r} +- {allowed:.3g}")


class Terms:
    """Sizes of a step's terms, in units of the stored dtype.

    unit: what one stored rounding costs, relatively; sum_share: what a float64 rounding is of a stored one.
    """

    def __init__(self, step: Step, dtype: Any) -> None:
        stored, summed = np.finfo(state_dtype(dtype)).eps, np.finfo(np.float64).eps
        self.step, self.sum_share = step, summed / stored
        # Moments are taken about one of the values, the farthest from the mean at worst: a variance may be
        # off by a float64 rounding of that distance squared.
        distance = 0.0 if step.frozen else float(np.max(step.x_hat**2, initial=0, where=step.w > 0))
        if not step.frozen and (step.w != 1).any():
            # Or, where the first value has no weight, about 0, up to the distance at which rules.is_far() has them made
            # again about the mean.
            distance = max(distance, float(np.max(np.minimum((step.mean / step.sigma) ** 2, 1024), initial=0)))
        self.unit = FEW * (stored + summed * distance)

    @property
    def x_hat(self) -> Array:
        before = (np.abs(self.step.x) + np.abs(self.step.mean)) / self.step.sigma
        # The second order: a stored mean's rounding is made good by a stored shift, whose own rounding is
        # left.
        return np.abs(self.step.x_hat) + (self.sum_share + self.unit) * before

    @property
    def renormed(self) -> Array:
        return self.x_hat * self.step.r + np.abs(self.step.d) + self.sum_share * self.step.d_terms

    @property
    def adjusted(self) -> Array:
        terms = self.renormed
        return terms if self.step.a is None else terms * np.abs(self.step.a) + np.abs(self.step.b)

    def sum(self, values: Array, sizes: Array) -> Array:
        """Size of a sum over a statistic's values whose terms have the given sizes."""

        def over(v: Array) -> Array:
            return v.sum(axis=self.step.axes, keepdims=True)

        return np.abs(over(values)) + self.sum_share * over(sizes)

    def input_gradient(self, g: Array) -> Array:
        step, size = self.step, np.abs(g)
        if step.frozen:
            return size / step.sigma
        sum_g, sum_g_x_hat = self.sum(g, size), self.sum(g * step.x_hat, size * self.x_hat)
        share = divide(step.w, np.broadcast_to(step.W, step.w.shape))
        return (size + share * (sum_g + self.x_hat * sum_g_x_hat)) / step.sigma


def output(step: Step, dtype: Any) -> Array:
    """Bound for y."""
    terms = Terms(step, dtype)
    bound = (terms.unit * (terms.adjusted * np.abs(step.gamma) + np.abs(step.beta))).reshape(step.input_shape)
    return bound if step.residual is None else bound + terms.unit * np.abs(step.residual)


def gradients(step: Step, dy: ArrayLike, dtype: Any) -> Gradients:
    """Bounds for the gradients, of every parameter whether it exists or not."""
    terms = Terms(step, dtype)
    dy = step.gated(dy).reshape(step.x.shape)
    g = dy * step.gamma * (1.0 if step.a is None else step.a) * step.r

    def parameter(values: Array, sizes: Array) -> Array:
        size = np.abs(sum_to(values, step.gamma.shape)) + terms.sum_share * sum_to(sizes, step.gamma.shape)
        return (terms.unit * size).reshape(step.parameter_shape)

    adjustment = None
    if step.a is not None and step.b is not None:
        scaled = np.abs(dy * step.gamma)
        adjustment = (
            terms.unit * sum_to(scaled * terms.renormed, step.a.shape),
            terms.unit * sum_to(scaled, step.b.shape),
        )
    return Gradients(
        inputs=(terms.unit * terms.input_gradient(g)).reshape(step.input_shape),
        gamma=parameter(dy * step.adjusted, np.abs(dy) * terms.adjusted),
        beta=parameter(dy, np.abs(dy)),
        adjustment=adjustment,
    )


def state(name: str, before: Array, after: Array, step: Step, dtype: Any) -> Array:
    """Bound for one state variable after the step that moved it from `before` to `after`."""
    terms = Terms(step, dtype)
    size = np.abs(before) + np.abs(after)
    if name.endswith("mean") and not step.frozen:
        summed = divide((step.w * np.abs(step.x)).sum(axis=step.axes, keepdims=True), step.W)
        groups = tuple(i for i, n in enumerate(step.gamma.shape) if n != summed.shape[i])
        size = size + terms.sum_share * summed.max(axis=groups, keepdims=True, initial=0).reshape(before.shape)
    return terms.unit * size


def saturated(value: Array, dtype: Any) -> Array:
    """What a statistic becomes that `dtype` cannot hold: its largest number."""
    most = float(finfo(dtype).max)
    return np.clip(value, -most, most)


def check_seen(name: str, found: Array, seen: Array) -> None:
    """Fail unless the weight of the batches agrees; a number of them to the bit."""
    bound = 0.0 if np.array_equal(seen, np.rint(seen)) else FEW * float(np.finfo(found.dtype).eps) * seen
    check(name, found, seen, bound, found.dtype)


def gated_as(step: Step, y: ArrayLike, dtype: Any) -> Step:
    """`step` with the gate of another output of it: that may differ where the sign of z is lost in its rounding."""
    if step.activation is None:
        return step
    gate = ~(np.asarray(y).astype(np.float64) <= 0)
    underflow = float(finfo(dtype).smallest_subnormal)
    wrong = (gate != step.gate) & ~(np.abs(step.z) <= output(step, dtype) + underflow)
    assert not wrong.any(), f"gate: {int(wrong.sum())} of {wrong.size} elements are on the wrong side of 0"
    return replace(step, gate=gate)


def check_gradients(found: Any, step: Step, dy: ArrayLike, dtype: Any) -> None:
    """Fail unless every gradient agrees; the adjustment's dtype is not the layer's to choose."""
    expected, bound, parameters = step.gradients(dy), gradients(step, dy, dtype), state_dtype(dtype)
    check("grads.inputs", found.inputs, expected.inputs, bound.inputs, dtype)
    for name in ("gamma", "beta"):
        value = getattr(expected, name)
        if value is None:
            assert getattr(found, name) is None, f"grads.{name} must be None"
        else:
            check(f"grads.{name}", getattr(found, name), value, getattr(bound, name), parameters)
    if expected.residual is None:
        assert found.residual is None, "grads.residual must be None"
    else:  # dy itself, or nothing of it
        exact = np.where(step.gate, np.asarray(dy), np.zeros((), dtype))
        np.testing.assert_array_equal(found.residual, exact.astype(dtype), err_msg="grads.residual", strict=True)
    if expected.adjustment is None:
        assert found.adjustment is None, "grads.adjustment must be None"
    else:
        for name, one, value, limit in zip("ab", found.adjustment, expected.adjustment, bound.adjustment, strict=True):
            check(f"grads.adjustment {name}", one, value, limit, one.dtype)


def check_step(
    layer: Any,
    oracle: Reference,
    x: Any,
    dy: Any,
    mask: Any = None,
    training: bool | None = True,
    **options: Any,
) -> Step:
    """Run both forward and backward; fail unless y, state and gradients agree. Returns the oracle's step.

    The oracle goes on from the layer's state, so that the bounds need not grow from step to step.
    """
    before = [w.copy() for w in oracle.get_weights()]
    step = oracle(x, training, mask, **options)
    y, pullback = layer.vjp(x, training=training, mask=mask, **options)
    check("y", y, step.y, output(step, x.dtype), x.dtype)
    step = gated_as(step, y, x.dtype)
    found = layer.get_state()
    for name, old, value in zip(oracle.weight_names, before, oracle.get_weights(), strict=True):
        bound, stored = state(name, old, value, step, x.dtype), state_dtype(x.dtype)
        check(name, found[name], saturated(value, stored), bound, stored)
    check_gradients(pullback(dy), step, dy, x.dtype)
    for name in set(found) - set(oracle.weight_names):
        check_seen(name, found[name], oracle.seen)
    oracle.set_weights([found[name] for name in oracle.weight_names])
    return step
