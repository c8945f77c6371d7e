"""The arrays of a case, and whether what a contender made of them is right."""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.cases import Case
from nbbn.core import dtypes
from tests.oracle.reference import Reference

Array = np.ndarray

# Exact in float32, which is what ONNX and TensorFlow keep such numbers in.
EPSILON = 2.0**-10
MOMENTUM = 0.875  # the weight of the old value
# Of what is computed per element. A 16-bit result is rounded once or, with a fused sum, twice: 2 * 2^-11 or 2 * 2^-8 of
# its size; a mean over 1e5 values leaves 1e-5 of their size in float32 where it is summed in a few partial sums.
TOLERANCES = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 5e-4, "float64": 1e-9}
# Some peers sum in float32 from the first value to the last, which may lose half a unit per value. Roundings cancel
# mostly; a hundredth of the worst is allowed.
LOSS_PER_VALUE = 0.01 * float(np.finfo(np.float32).eps)
CHUNK = 1 << 16  # values that are compared at a time, in the cache


class WrongResult(Exception):
    """A contender's result is not batch normalization of its input."""


class Given:
    """What every contender is given for one case, on every machine. Nobody writes to these arrays.

    x, dy: of the case's shape and dtype, in that machine's memory; residual: the same, None where the case has none.
    gamma, beta, mean, variance: NumPy arrays (channels,) in the statistics' dtype; the last two are the moving
    statistics before the call.
    """

    x: Any
    dy: Any
    residual: Any = None

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.dtype = dtypes.resolve(case.dtype)
        self.statistic = dtypes.statistic(self.dtype)
        self._rng = np.random.default_rng(seed)

    def _draw_parameters(self) -> None:
        rng, size = self._rng, (2, self.case.channels)
        self.gamma, self.variance = rng.uniform(0.5, 2, size).astype(self.statistic)
        self.beta, self.mean = rng.normal(size=size).astype(self.statistic)

    def tensor(self, array: Array) -> Any:
        """The values of a NumPy array in an array such as x is."""
        return array


class Problem(Given):
    """A case in the host's memory, and what the tests' float64 reference makes of it."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case, seed)
        self.x = self._normal(2, 1)
        self.residual = self._normal() if case.fused == "residual" else None
        self._draw_parameters()

    def _normal(self, scale: float = 1, shift: float = 0) -> Array:
        values = self._rng.standard_normal(self.case.shape, self.statistic.type)
        values *= scale
        values += shift
        return values.astype(self.dtype, copy=False)

    @cached_property
    def dy(self) -> Array:
        """The gradient of y; 0 where rounding decides about the sign of a relu's input and so about the gradient."""
        dy = self._normal()
        if self.case.fused:
            dy[np.abs(self._unfused(self._step)) < TOLERANCES[self.case.dtype]] = 0
        return dy

    def _reference(self) -> Any:
        options = dict(self.case.options)
        layer = Reference(self.case.axis, MOMENTUM, EPSILON, bessel_correction=True, **options).build(self.case.shape)
        deviation = np.sqrt(self.variance.astype(np.float64))
        renorm = [self.mean, deviation] if layer.renorm else []
        layer.set_weights([self.gamma, self.beta, self.mean, self.variance, *([deviation] if renorm else []), *renorm])
        return layer

    @cached_property
    def _trained(self) -> Any:
        """The float64 layer after a training step, and that step."""
        layer = self._reference()
        return layer, layer(self.x, training=True)

    @property
    def _step(self) -> Any:
        return self._trained[1]

    def _unfused(self, step: Any) -> Array:
        """What a relu is applied to."""
        y: Array = step.y
        if self.residual is not None:
            y += self.residual
        return y

    def expected(self, mode: str) -> dict[str, Array]:
        """The results of `mode` by name, in float64.

        y: of the forward modes. mean, variance: the moving statistics after training; biased_variance: what the latter
        is without Bessel's correction. dx, dgamma, dbeta, dresidual: of backward.
        """
        if mode == "backward":
            return self._gradients()
        step = self._step if mode == "training" else self._reference()(self.x, training=False)
        z = self._unfused(step)
        found = {"y": np.maximum(z, 0, out=z) if self.case.fused else z}
        return found | (self._moving_statistics() if mode == "training" else {})

    def _moving_statistics(self) -> dict[str, Array]:
        layer = self._trained[0]
        mean, variance = layer.moving_mean.ravel(), layer.moving_variance.ravel()
        kept, m = MOMENTUM * self.variance.astype(np.float64), self.case.per_channel
        return {"mean": mean, "variance": variance, "biased_variance": kept + (variance - kept) * (m - 1) / m}

    def _gradients(self) -> dict[str, Array]:
        dz = self.dy.astype(np.float64)
        if self.case.fused:
            dz *= self._unfused(self._step) > 0
        gradients = self._step.gradients(dz)
        found = {"dx": gradients.inputs, "dgamma": gradients.gamma.ravel(), "dbeta": gradients.beta.ravel()}
        return found | ({"dresidual": dz} if self.residual is not None else {})

    @property
    def batch(self) -> tuple[Array, Array]:
        """Mean and biased variance of the batch in the statistics' dtype, which a backward pass is given.

        (channels,); with virtual batches (groups * channels,), the groups first.
        """
        mean, variance = self._step.mean.ravel(), self._step.var.ravel()
        return mean.astype(self.statistic), variance.astype(self.statistic)

    @cached_property
    def y(self) -> Array:
        """The output in training, which the backward pass of a relu may be given."""
        return self.expected("training")["y"].astype(self.dtype)


def tolerance(case: Case) -> float:
    """The error that is allowed, relative to 1 + |value|."""
    return TOLERANCES[case.dtype] + (0 if case.dtype == "float64" else LOSS_PER_VALUE * case.per_channel)


def check(found: Mapping[str, Any], expected: Mapping[str, Array], case: Case) -> float:
    """The largest error, relative to 1 + |value|; that of a gradient's sum relative to the root of its number of terms.

    Raises: WrongResult if there is nothing in `found`, or anything that is not what is expected.
    """
    return compare({name: np.asarray(value) for name, value in found.items()}, expected, case, _largest_error)


def compare(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    case: Case,
    largest_error: Callable[[Any, Any, float], tuple[float, int]],
) -> float:
    """What `check` does, for arrays of any library.

    largest_error: of flat arrays, relative to `scale` + |expected|: the error, NaN if there is one, and its index.
    """
    if not found:
        raise WrongResult("there is no result")
    largest = 0.0
    for name, value in found.items():
        shape, right = tuple(value.shape), tuple(expected[name].shape)
        if shape != right:
            raise WrongResult(f"{name} has shape {shape}; expected {right}")
        values, e = value.reshape(-1), expected[name].reshape(-1)
        scale = math.sqrt(case.per_channel) if name in ("dgamma", "dbeta") else 1.0
        error, at = largest_error(values, e, scale)
        if not error <= tolerance(case):  # so that NaN is wrong
            raise WrongResult(f"{name} is {float(values[at]):.9g} instead of {float(e[at]):.9g} at flat index {at}")
        largest = max(largest, error)
    return largest


def _largest_error(values: Array, expected: Array, scale: float) -> tuple[float, int]:
    worst, where = 0.0, 0
    for start in range(0, values.size, CHUNK):
        v, e = values[start : start + CHUNK].astype(np.float64), expected[start : start + CHUNK]
        error = np.abs(v - e) / (scale + np.abs(e))
        at = int(np.argmax(error))  # that of a NaN, where there is one
        if not error[at] <= worst:
            worst, where = float(error[at]), start + at
            if math.isnan(worst):
                break
    return worst, where
