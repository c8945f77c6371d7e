"""The arrays of a case in a GPU's memory, and whether what a contender made of them is right.

PyTorch holds them, and computes in float64 what is expected of them: on the host that would take longer than all that
is measured.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from benchmarks.cases import Case
from benchmarks.problem import EPSILON, MOMENTUM, Given, compare

Tensor = Any


class Problem(Given):
    """A case in the device's memory, and what is expected. No case here has options or a residual."""

    def __init__(self, case: Case, torch: Any, device: str = "cuda", seed: int = 0) -> None:
        super().__init__(case, seed)
        self.torch, self.device = torch, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self.x, self.dy = self._normal(2, 1), self._normal(1, 0)
        self._draw_parameters()
        self._reduced = [i for i in range(len(case.shape)) if i not in case.kept]

    def _normal(self, scale: float, shift: float) -> Tensor:
        torch, wide = self.torch, getattr(self.torch, self.statistic.name)
        values = torch.randn(self.case.shape, generator=self._generator, device=self.device, dtype=wide)
        return values.mul_(scale).add_(shift).to(getattr(torch, self.case.dtype))

    def tensor(self, array: Any) -> Tensor:
        """A new tensor on the device from a NumPy array."""
        return self.torch.tensor(array, device=self.device)

    def _spread(self, statistic: Any) -> Tensor:
        """Per channel, in float64, to broadcast against x."""
        shape = [n if i in self.case.kept else 1 for i, n in enumerate(self.case.shape)]
        return self.torch.as_tensor(statistic, device=self.device).double().reshape(shape)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        variance, mean = self.torch.var_mean(self.x.double(), self._reduced, correction=0, keepdim=True)
        return mean, variance

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the batch in the statistics' dtype, which a backward pass is given."""
        mean, variance = (v.reshape(-1).to(getattr(self.torch, self.statistic.name)) for v in self._moments)
        return mean, variance

    def expected(self, mode: str) -> dict[str, Tensor]:
        """The results of `mode` by name, in float64: y, and in training mean and variance; dx, dgamma, dbeta."""
        if mode == "backward":
            return self._gradients()
        mean, variance = self._moments if mode == "training" else (self._spread(self.mean), self._spread(self.variance))
        scale = self._spread(self.gamma) / (variance + EPSILON).sqrt()
        y = (self.x.double() - mean) * scale + self._spread(self.beta)
        return {"y": y} | (self._moving_statistics() if mode == "training" else {})

    def _moving_statistics(self) -> dict[str, Tensor]:
        """biased_variance: what the moving variance is without Bessel's correction."""
        (mean, variance), m = self._moments, self.case.per_channel
        found = {
            name: MOMENTUM * self._spread(old) + (1 - MOMENTUM) * new
            for name, old, new in (
                ("mean", self.mean, mean),
                ("variance", self.variance, variance * m / (m - 1)),
                ("biased_variance", self.variance, variance),
            )
        }
        return {name: value.reshape(-1) for name, value in found.items()}

    def _gradients(self) -> dict[str, Tensor]:
        (mean, variance), m = self._moments, self.case.per_channel
        rstd = (variance + EPSILON).rsqrt()
        x_hat, dy = (self.x.double() - mean) * rstd, self.dy.double()
        dbeta, dgamma = (v.sum(self._reduced, keepdim=True) for v in (dy, dy * x_hat))
        dx = (dy - dbeta / m - x_hat * (dgamma / m)) * (self._spread(self.gamma) * rstd)
        return {"dx": dx, "dgamma": dgamma.reshape(-1), "dbeta": dbeta.reshape(-1)}


def check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], case: Case) -> float:
    """As benchmarks.problem.check, for tensors."""
    return compare(found, expected, case, _largest_error)


def _largest_error(values: Tensor, expected: Tensor, scale: float) -> tuple[float, int]:
    error = (values.double() - expected).abs_().div_(expected.abs().add_(scale))
    at = int(error.argmax())  # that of a NaN, where there is one
    return float(error[at]), at
