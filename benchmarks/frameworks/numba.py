"""nbbn.numba in a compiled loop against the layer in a loop of Python."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numba import njit

import nbbn
from benchmarks.frameworks.cases import Case
from nbbn.numba import batch_norm_backward, batch_norm_infer, batch_norm_train

CALLS = 100  # of one measurement
LAYER, BOUND = "nbbn's layer", 0.5


@njit
def _infer(x: Any, gamma: Any, beta: Any, mean: Any, variance: Any, y: Any, calls: int) -> None:
    for _ in range(calls):
        batch_norm_infer(x, gamma, beta, mean, variance, out=y)


@njit
def _train(x: Any, gamma: Any, beta: Any, mean: Any, variance: Any, y: Any, calls: int) -> None:
    for _ in range(calls):
        batch_norm_train(x, gamma, beta, mean, variance, out=y)


@njit
def _step(x: Any, gamma: Any, beta: Any, mean: Any, variance: Any, y: Any, dy: Any, dx: Any, calls: int) -> None:
    for _ in range(calls):
        _, saved = batch_norm_train(x, gamma, beta, mean, variance, out=y)
        batch_norm_backward(dy, x, saved, out=dx)


def cases(quick: bool) -> Iterator[Case]:
    """quick: nothing is smaller."""
    shape = (32, 64)
    x, dy, y, dx = np.random.default_rng(0).normal(3, 2, (4, *shape)).astype(np.float32)
    rows = [np.full(shape[-1], value, np.float32) for value in (1, 0, 0, 1)]
    layer = nbbn.BatchNormalization()

    def step() -> None:
        layer.vjp(x, training=True, out=y)[1](dy, out=dx)

    contenders: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "inference": (lambda: _infer(x, *rows, y, CALLS), lambda: layer(x, out=y)),
        "training": (lambda: _train(x, *rows, y, CALLS), lambda: layer(x, training=True, out=y)),
        "training and its gradient": (lambda: _step(x, *rows, y, dy, dx, CALLS), step),
    }
    for mode, (compiled, call) in contenders.items():
        calls = {"nbbn.numba": compiled, LAYER: _repeated(call)}
        yield Case(f"{shape}, {mode}, {CALLS} times", calls, LAYER, BOUND)


def _repeated(call: Callable[[], Any]) -> Callable[[], None]:
    def many() -> None:
        for _ in range(CALLS):
            call()

    return many
