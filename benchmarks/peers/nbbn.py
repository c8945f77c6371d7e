"""nbbn, through its public layer."""

from typing import Any

import numpy as np

import nbbn
from benchmarks.peers import Contender
from benchmarks.problem import EPSILON, MOMENTUM, Given, Problem


def version() -> str:
    return nbbn.__version__


def layer_for(problem: Given, **choices: Any) -> nbbn.BatchNormalization:
    """A layer with the problem's parameters and statistics; `choices` as in nbbn.force()."""
    case = problem.case
    options: dict[str, Any] = {**case.options} | ({"activation": "relu"} if case.fused else {})
    axis = case.axis if isinstance(case.axis, int) else list(case.axis)
    layer = nbbn.BatchNormalization(
        axis, MOMENTUM, EPSILON, dtype=case.dtype, bessel_correction=None if case.options else True, **options
    )
    layer.build(case.shape)
    weights = [problem.gamma, problem.beta, problem.mean, problem.variance]
    if layer.renorm:
        deviation = np.sqrt(problem.variance)
        weights += [deviation, problem.mean, deviation]
    layer.set_weights([v.reshape(w.shape) for v, w in zip(weights, layer.weights, strict=True)])
    nbbn.force(layer, **choices)
    return layer


def prepare(problem: Problem, mode: str) -> dict[str, Contender]:
    """ordinary, preallocated, and the latter in one thread."""
    forms = {"ordinary": (False, None), "preallocated": (True, None), "preallocated, one thread": (True, False)}
    return {
        form: contender(
            problem, layer_for(problem, parallel=parallel), mode, np.empty_like(problem.x) if given else None
        )
        for form, (given, parallel) in forms.items()
    }


def contender(problem: Given, layer: nbbn.BatchNormalization, mode: str, out: Any) -> Contender:
    """out: memory for the large result; None if the call is to allocate it."""
    residual = {} if problem.residual is None else {"residual": problem.residual}
    given = {} if out is None else {"out": out}
    if mode == "backward":
        return _backward(problem, layer, residual, given)
    return _forward(problem, layer, mode == "training", residual | given)


def _forward(problem: Given, layer: nbbn.BatchNormalization, training: bool, more: dict[str, Any]) -> Contender:
    x = problem.x
    if training:
        more["training"] = True

    def read(y: Any) -> dict[str, Any]:
        if not training:
            return {"y": y}
        mean, variance = (problem.tensor(w.ravel()) for w in layer.get_weights()[2:4])
        # Renorm and ghost batches have rules of their own for the variance, which the tests look after.
        return {"y": y, "mean": mean} | ({} if problem.case.options else {"variance": variance})

    return Contender(lambda: layer(x, **more), read)


def _backward(
    problem: Given, layer: nbbn.BatchNormalization, residual: dict[str, Any], given: dict[str, Any]
) -> Contender:
    dy = problem.dy
    _, pullback = layer.vjp(problem.x, training=True, **residual)

    def read(gradients: Any) -> dict[str, Any]:
        found = {"dx": gradients.inputs, "dgamma": gradients.gamma.ravel(), "dbeta": gradients.beta.ravel()}
        return found | ({"dresidual": gradients.residual} if residual else {})

    return Contender(lambda: pullback(dy, **given), read)
