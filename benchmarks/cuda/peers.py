"""Who is timed on a GPU: nbbn, PyTorch in its ways, JAX. Each function has a Contender for every form."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.cuda.problem import Problem
from benchmarks.cuda.timing import Contender
from benchmarks.peers.jax import Formulas
from benchmarks.peers.nbbn import layer_for
from benchmarks.problem import EPSILON, MOMENTUM

Forms = dict[str, Contender]


def copy_contender(problem: Problem) -> Contender:
    """Copying one array of the input's size to another, on the device."""
    target = problem.torch.empty_like(problem.x)
    return Contender(lambda: target.copy_(problem.x), lambda result: {})


# -- nbbn --------------------------------------------------------------------------------------------------------------


def nbbn_forms(problem: Problem, mode: str) -> Forms:
    """ordinary, which allocates its results, and preallocated, with out=."""
    make = _nbbn_backward if mode == "backward" else _nbbn_forward
    return {"ordinary": make(problem, mode, {}), "preallocated": make(problem, mode, {"out": _like(problem.x)})}


def _like(x: Any) -> Any:
    return importlib.import_module("nbbn.gpu.arrays").find_library(x).empty_like(x)


def _layer(problem: Problem) -> Any:
    """A layer whose weights are on the device."""
    return layer_for(problem).to("cuda")  # type: ignore[arg-type]  # what it needs of a problem, this one has


def _nbbn_forward(problem: Problem, mode: str, given: dict[str, Any]) -> Contender:
    layer, x, training = _layer(problem), problem.x, mode == "training"

    def read(y: Any) -> dict[str, Any]:
        if not training:
            return {"y": y}
        _, _, mean, variance = layer.get_weights()
        return {"y": y, "mean": problem.tensor(mean), "variance": problem.tensor(variance)}

    return Contender(lambda: layer(x, training=training, **given), read)


def _nbbn_backward(problem: Problem, mode: str, given: dict[str, Any]) -> Contender:
    _, pullback = _layer(problem).vjp(problem.x, training=True)
    return Contender(
        lambda: pullback(problem.dy, **given), lambda g: {"dx": g.inputs, "dgamma": g.gamma, "dbeta": g.beta}
    )


# -- PyTorch -----------------------------------------------------------------------------------------------------------

SMALL = 1 << 20  # bytes; a module's own overhead is nothing to larger inputs


def torch_forms(problem: Problem, mode: str) -> Forms:
    """eager: a plain call, which takes cuDNN where that can do it. native: without cuDNN. compile: torch.compile.
    module: the eager call through torch.nn.BatchNorm1d or 2d, forward only."""
    torch = problem.torch
    torch.set_grad_enabled(False)
    step, batch_norm = _Torch(problem, mode), torch.nn.functional.batch_norm
    found = {"eager": step.contender(batch_norm)}
    with torch.backends.cudnn.flags(enabled=False):  # a backward pass is that of its forward

        def native(*arguments: Any) -> Any:
            with torch.backends.cudnn.flags(enabled=False):
                return batch_norm(*arguments)

        found["native"] = step.contender(native)
    if problem.device == "cuda":
        # A backward pass is timed many times: what it needs must stay.
        setattr(importlib.import_module("torch._functorch.config"), "donated_buffer", False)  # noqa: B010
        torch.compiler.reset()  # the code is for this case's shape, and not for all that came before
        compiled = torch.compile(lambda *arguments: batch_norm(*arguments), fullgraph=True, dynamic=False)
        found["compile"] = step.contender(compiled)
    if problem.case.bytes <= SMALL and mode != "backward":
        found["module"] = step.module()
    return found


class _Torch:
    """A step on tensors whose channels are at dimension 1: views of channels-last memory where they are last."""

    def __init__(self, problem: Problem, mode: str) -> None:
        self.problem, self.torch, self.mode = problem, problem.torch, mode
        self.last = problem.case.channels_last and len(problem.case.shape) == 4
        self.x, self.dy = (t.permute(0, 3, 1, 2) if self.last else t for t in (problem.x, problem.dy))

    def _own(self, tensor: Any) -> Any:
        """In the case's layout."""
        return tensor.permute(0, 2, 3, 1) if self.last else tensor

    def _weights(self) -> list[Any]:
        """gamma, beta and the moving statistics, which a training step changes."""
        p = self.problem
        return [p.tensor(v) for v in (p.gamma, p.beta, p.mean, p.variance)]

    def contender(self, batch_norm: Callable[..., Any]) -> Contender:
        gamma, beta, mean, variance = self._weights()
        if self.mode == "backward":
            return self._backward(batch_norm, gamma, beta, mean, variance)
        x, rest = self.x, (self.mode == "training", 1 - MOMENTUM, EPSILON)
        return Contender(lambda: batch_norm(x, mean, variance, gamma, beta, *rest), self._read(mean, variance))

    def _read(self, mean: Any, variance: Any) -> Callable[[Any], dict[str, Any]]:
        statistics = {"mean": mean, "variance": variance} if self.mode == "training" else {}
        return lambda y: {"y": self._own(y)} | statistics

    def _backward(self, batch_norm: Callable[..., Any], *weights: Any) -> Contender:
        torch, dy = self.torch, self.dy
        gamma, beta, mean, variance = weights
        with torch.enable_grad():
            wanted = [t.detach().requires_grad_() for t in (self.x, gamma, beta)]
            y = batch_norm(wanted[0], mean, variance, *wanted[1:], True, 1 - MOMENTUM, EPSILON)
        return Contender(
            lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True),
            lambda found: {"dx": self._own(found[0]), "dgamma": found[1], "dbeta": found[2]},
        )

    def module(self) -> Contender:
        nn, x = self.torch.nn, self.x
        kind = nn.BatchNorm2d if x.ndim == 4 else nn.BatchNorm1d
        gamma, beta, mean, variance = self._weights()
        module = kind(self.problem.case.channels, EPSILON, 1 - MOMENTUM, device=x.device, dtype=gamma.dtype)
        module.train(self.mode == "training")
        values = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": variance}
        for name, value in values.items():
            getattr(module, name).copy_(value)
        return Contender(lambda: module(x), self._read(module.running_mean, module.running_var))


# -- JAX ---------------------------------------------------------------------------------------------------------------


def jax_forms(problem: Problem, mode: str) -> Forms:
    """ordinary: the formulas under jax.jit, timed by the host's clock, as JAX's streams cannot be had."""
    jax: Any = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    torch = problem.torch

    def given(value: Any) -> Any:
        if value is None or isinstance(value, np.ndarray):
            return None if value is None else jax.device_put(value)
        return jax.dlpack.from_dlpack(value)  # the same memory

    formulas: Any = Formulas(jax.numpy, problem)  # type: ignore[arg-type]  # what it needs of a problem, this one has
    function, arguments, _, read = getattr(formulas, mode)()
    arguments = [given(a) for a in arguments]
    compiled, wait = jax.jit(function), jax.block_until_ready

    def taken(results: Any) -> dict[str, Any]:
        return {name: torch.from_dlpack(value) for name, value in read(results).items()}

    return {"ordinary": Contender(lambda: wait(compiled(*arguments)), taken, waits=True)}


PEERS: dict[str, Callable[[Problem, str], Forms]] = {"torch": torch_forms, "jax": jax_forms}
