"""JAX on the CPU: the formulas under jax.jit.

The variance is mean(x^2) - mean(x)^2, as in Flax, which XLA reads x once for. The backward pass is the closed formula
on saved statistics. preallocated donates the buffer of the result before last.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peers import Contender
from benchmarks.problem import EPSILON, MOMENTUM, Problem


def version() -> str:
    return str(importlib.import_module("jax").__version__)


def prepare(problem: Problem, mode: str) -> dict[str, Contender]:
    jax: Any = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    formulas = Formulas(jax.numpy, problem)
    function, arguments, big, read = getattr(formulas, mode)()
    arguments = [None if a is None else jax.device_put(a) for a in arguments]
    return {
        "ordinary": ordinary(jax, function, arguments, read),
        "preallocated": _donating(jax, function, arguments, big, read),
    }


def ordinary(jax: Any, function: Callable[..., Any], arguments: list[Any], read: Any) -> Contender:
    compiled, wait = jax.jit(function), jax.block_until_ready
    return Contender(lambda: wait(compiled(*arguments)), read)


def _donating(jax: Any, function: Callable[..., Any], arguments: list[Any], big: int, read: Any) -> Contender:
    """`big`: how many of the results, the first ones, have the input's size."""

    def with_buffers(buffers: Any, *arguments: Any) -> Any:
        return function(*arguments)

    compiled = jax.jit(with_buffers, donate_argnums=0, keep_unused=True)
    wait = jax.block_until_ready
    buffers = [jax.numpy.empty_like(arguments[0]) for _ in range(big)]

    def call() -> Any:
        results = wait(compiled(buffers, *arguments))
        buffers[:] = results[:big]
        return results

    return Contender(call, read)


class Formulas:
    """Each method: a function to be compiled, its arguments, how many of its results are of the input's size, and how
    they are read. The first argument has the input's shape and dtype."""

    def __init__(self, jnp: Any, problem: Problem) -> None:
        self.jnp, self.problem = jnp, problem
        case = problem.case
        size = case.options.get("virtual_batch_size")
        self.clips: Any = case.options.get("renorm_clipping")
        self.shape = case.shape if size is None else (size, case.shape[0] // size, *case.shape[1:])
        shift = size is not None
        self.kept = tuple(a + shift for a in case.kept)
        self.statistics = tuple(n if i in self.kept else 1 for i, n in enumerate(self.shape))
        self.reduced = tuple(i for i in range(len(self.shape)) if i not in self.kept and not (shift and i == 1))

    def _wide(self, x: Any) -> Any:
        return x.astype(self.problem.statistic).reshape(self.shape)

    def _narrow(self, y: Any) -> Any:
        return y.reshape(self.problem.case.shape).astype(self.problem.dtype)

    def _fuse(self, y: Any, residual: Any) -> Any:
        y = y if residual is None else y + self._wide(residual)
        return self.jnp.maximum(y, 0) if self.problem.case.fused else y

    def _spread(self, *values: Any) -> list[Any]:
        return [v.reshape(self.statistics) for v in values]

    def _parameters(self) -> tuple[np.ndarray, ...]:
        p = self.problem
        return p.gamma, p.beta, p.mean, p.variance

    def _correction(self, mean: Any, variance: Any, old_mean: Any, old_variance: Any) -> tuple[Any, Any]:
        """r and d of batch renormalization."""
        jnp, clips = self.jnp, self.clips
        deviation = jnp.maximum(jnp.sqrt(old_variance), EPSILON**0.5)
        r = jnp.clip(jnp.sqrt(variance + EPSILON) / deviation, clips["rmin"], clips["rmax"])
        return r, jnp.clip((mean - old_mean) / deviation, -clips["dmax"], clips["dmax"])

    def inference(self) -> Any:
        def infer(x: Any, residual: Any, *parameters: Any) -> Any:
            gamma, beta, mean, variance = self._spread(*parameters)
            y = (self._wide(x) - mean) * (gamma / self.jnp.sqrt(variance + EPSILON)) + beta
            return (self._narrow(self._fuse(y, residual)),)

        arguments = [self.problem.x, self.problem.residual, *self._parameters()]
        return infer, arguments, 1, lambda results: {"y": results[0]}

    def training(self) -> Any:
        def train(x: Any, residual: Any, *parameters: Any) -> Any:
            gamma, beta, old_mean, old_variance = self._spread(*parameters)
            wide = self._wide(x)
            mean = wide.mean(self.reduced, keepdims=True)
            variance = self.jnp.maximum((wide * wide).mean(self.reduced, keepdims=True) - mean * mean, 0)
            scale, shift = gamma / self.jnp.sqrt(variance + EPSILON), beta
            if self.clips:
                r, d = self._correction(mean, variance, old_mean, old_variance)
                scale, shift = scale * r, shift + gamma * d
            y = self._fuse((wide - mean) * scale + shift, residual)
            groups = tuple(i for i in range(len(self.shape)) if i not in self.kept)
            new_mean, new_variance = (v.mean(groups, keepdims=True) for v in (mean, variance))
            return (
                self._narrow(y),
                (MOMENTUM * old_mean + (1 - MOMENTUM) * new_mean).ravel(),
                (MOMENTUM * old_variance + (1 - MOMENTUM) * new_variance).ravel(),
            )

        def read(results: Any) -> dict[str, Any]:
            found = {"y": results[0], "mean": results[1]}
            return found | ({} if self.problem.case.options else {"biased_variance": results[2]})

        return train, [self.problem.x, self.problem.residual, *self._parameters()], 1, read

    def backward(self) -> Any:
        relu, residual = bool(self.problem.case.fused), self.problem.residual is not None
        groups = [n if i in (*self.kept, 1) else 1 for i, n in enumerate(self.shape)]
        of_batch = groups if len(self.shape) > len(self.problem.case.shape) else self.statistics

        def pull_back(x: Any, dy: Any, y: Any, mean: Any, variance: Any, *parameters: Any) -> Any:
            gamma, _, old_mean, old_variance = self._spread(*parameters)
            mean, variance = mean.reshape(of_batch), variance.reshape(of_batch)
            r, d = self._correction(mean, variance, old_mean, old_variance) if self.clips else (1, 0)
            rstd = 1 / self.jnp.sqrt(variance + EPSILON)
            wide = self._wide(dy)
            g = self.jnp.where(self._wide(y) > 0, wide, 0) if relu else wide
            x_hat = (self._wide(x) - mean) * rstd
            sum_g, sum_g_x_hat = (v.sum(self.reduced, keepdims=True) for v in (g, g * x_hat))
            m = np.prod([self.shape[i] for i in self.reduced])
            dx = (g - sum_g / m - x_hat * (sum_g_x_hat / m)) * (gamma * r * rstd)
            rest = tuple(i for i in range(len(self.shape)) if i not in self.kept)
            dbeta, dgamma = (v.sum(rest) for v in (sum_g, sum_g_x_hat * r + sum_g * d))
            more = (self._narrow(g),) if residual else ()
            return (self._narrow(dx), *more, dgamma.ravel(), dbeta.ravel())

        def read(results: Any) -> dict[str, Any]:
            found = {"dx": results[0], "dgamma": results[-2], "dbeta": results[-1]}
            return found | ({"dresidual": results[1]} if residual else {})

        p = self.problem
        arguments = [p.x, p.dy, p.y if relu else None, *p.batch, *self._parameters()]
        return pull_back, arguments, 1 + residual, read
