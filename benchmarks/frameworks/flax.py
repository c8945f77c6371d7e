"""nbbn.flax in the place of Flax's modules: what is timed, each beside what it replaces.

Every callable runs a compiled program and waits for its results.
"""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import nbbn.flax
from benchmarks.frameworks.cases import Case

NORMS = {"nbbn": nbbn.flax.BatchNorm, "flax": nn.BatchNorm}
SMALL, LARGE = ((32, 64), (256, 1024)), ((32, 28, 28, 64), (32, 56, 56, 64))


def cases(quick: bool) -> Iterator[Case]:
    """quick: the small ones only."""
    for shape in SMALL if quick else SMALL + LARGE:
        for what, make in (("forward", _forward), ("forward and backward", _gradient), ("inference", _inference)):
            bound = None if make is _inference else 1.0  # XLA's own operations
            yield Case(f"{shape}, {what}", {who: make(norm, shape) for who, norm in NORMS.items()}, "flax", bound)
    if not quick:
        steps = {who: _network_step(norm) for who, norm in NORMS.items()}
        yield Case("ResNet of 4 blocks, training step, (8, 64, 64, 3)", steps, "flax", 1.0)


def _problem(norm: Any, shape: tuple[int, ...]) -> tuple[Any, Any, Any, Any]:
    x, dy = np.random.default_rng(0).normal(3, 2, (2, *shape)).astype(np.float32)
    module = norm()
    return module, module.init(jax.random.key(0), x, use_running_average=False), jnp.asarray(x), jnp.asarray(dy)


def _forward(norm: Any, shape: tuple[int, ...]) -> Callable[[], Any]:
    module, variables, x, _ = _problem(norm, shape)

    @jax.jit
    def run(variables: Any, x: Any) -> Any:
        return module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])

    return lambda: jax.block_until_ready(run(variables, x))


def _gradient(norm: Any, shape: tuple[int, ...]) -> Callable[[], Any]:
    module, variables, x, dy = _problem(norm, shape)

    @jax.jit
    def run(params: Any, stats: Any, x: Any, dy: Any) -> Any:
        def layer(params: Any, x: Any) -> Any:
            given = {"params": params, "batch_stats": stats}
            return module.apply(given, x, use_running_average=False, mutable=["batch_stats"])

        y, pullback, new = jax.vjp(layer, params, x, has_aux=True)
        return y, pullback(dy), new

    return lambda: jax.block_until_ready(run(variables["params"], variables["batch_stats"], x, dy))


def _inference(norm: Any, shape: tuple[int, ...]) -> Callable[[], Any]:
    module, variables, x, _ = _problem(norm, shape)
    run = jax.jit(lambda variables, x: module.apply(variables, x, use_running_average=True))
    return lambda: jax.block_until_ready(run(variables, x))


class Block(nn.Module):
    """Two convolutions; at the end relu(batch normalization + the block's input), where nbbn does all of it at once."""

    norm: Any
    width: int
    strides: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        shortcut = x
        if self.strides > 1:
            shortcut = nn.Conv(self.width, (1, 1), self.strides, use_bias=False)(x)
        y = nn.Conv(self.width, (3, 3), self.strides, use_bias=False)(x)
        y = nn.Conv(self.width, (3, 3), use_bias=False)(self._norm(y))
        return self._norm(y, shortcut)

    def _norm(self, x: Any, residual: Any = None) -> Any:
        if issubclass(self.norm, nbbn.flax.BatchNorm):
            return self.norm(use_running_average=False, activation="relu")(x, residual=residual)
        y = self.norm(use_running_average=False)(x)
        return nn.relu(y if residual is None else y + residual)


class ResNet(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(32, (3, 3), use_bias=False)(x)
        for width, strides in ((32, 1), (64, 2), (128, 2), (128, 1)):
            x = Block(self.norm, width, strides)(x)
        return nn.Dense(10)(x.mean((1, 2)))


def _network_step(norm: Any) -> Callable[[], Any]:
    network = ResNet(norm)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 64, 64, 3)), jnp.float32)
    variables = network.init(jax.random.key(0), x)

    @jax.jit
    def step(variables: Any, x: Any) -> Any:
        def loss(params: Any) -> Any:
            scores, stats = network.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return -jax.nn.log_softmax(scores)[:, 0].mean(), stats

        gradients, stats = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], gradients)
        return {"params": params, **stats}

    return lambda: jax.block_until_ready(step(variables, x))
