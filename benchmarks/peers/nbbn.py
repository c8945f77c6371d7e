"""nbbn, through its public layer."""

import inspect
from typing import Any

import numpy as np

import nbbn
from benchmarks.peers import CannotDo, Contender
from benchmarks.problem import EPSILON, MOMENTUM, Problem

Array = np.ndarray


def version() -> str:
    return nbbn.__version__


def layer_for(problem: Problem, parallel: bool | None = None) -> nbbn.BatchNormalization:
    """A layer with the problem's parameters and statistics; `parallel` as in nbbn.force()."""
    case = problem.case
    options: dict[str, Any] = {**case.options}
    if case.fused:
        if "activation" not in inspect.signature(nbbn.BatchNormalization).parameters:
            raise CannotDo(f"nbbn {nbbn.__version__} has no activation")
        options["activation"] = "relu"
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
    if parallel is not None:
        nbbn.force(layer, parallel=parallel)
    return layer


def prepare(problem: Problem, mode: str) -> dict[str, Contender]:
    """ordinary, preallocated, and the latter in one thread."""
    forms = {"ordinary": (False, None), "preallocated": (True, None), "preallocated, one thread": (True, False)}
    make = _backward if mode == "backward" else _forward
    found = {form: make(problem, mode, *choices) for form, choices in forms.items()}
    return {form: contender for form, contender in found.items() if contender}


def _forward(problem: Problem, mode: str, given: bool, parallel: bool | None) -> Contender:
    layer, x, training = layer_for(problem, parallel), problem.x, mode == "training"
    more: dict[str, Any] = {} if problem.residual is None else {"residual": problem.residual}
    if training:
        more["training"] = True
    if given:
        more["out"] = np.empty_like(x)

    def read(y: Array) -> dict[str, Any]:
        if not training:
            return {"y": y}
        results = {"y": y, "mean": np.ravel(layer.moving_mean), "variance": np.ravel(layer.moving_variance)}
        if problem.case.options:
            del results["variance"]  # renorm and ghost batches have rules of their own, which the tests look after
        return results

    return Contender(lambda: layer(x, **more), read)


def _backward(problem: Problem, mode: str, given: bool, parallel: bool | None) -> Contender | None:
    layer, dy = layer_for(problem, parallel), problem.dy
    more: dict[str, Any] = {} if problem.residual is None else {"residual": problem.residual}
    _, pullback = layer.vjp(problem.x, training=True, **more)
    takes_out = "out" in inspect.signature(pullback).parameters
    if given and not takes_out and parallel is None:
        return None
    arguments: dict[str, Any] = {"out": np.empty_like(problem.x)} if given and takes_out else {}

    def read(gradients: Any) -> dict[str, Any]:
        found = {"dx": gradients.inputs, "dgamma": np.ravel(gradients.gamma), "dbeta": np.ravel(gradients.beta)}
        return found | ({} if problem.residual is None else {"dresidual": gradients.residual})

    return Contender(lambda: pullback(dy, **arguments), read)
