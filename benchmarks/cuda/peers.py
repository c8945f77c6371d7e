"""Who is timed on a GPU: nbbn, PyTorch in its ways, JAX. Each function has a Contender for every form."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.cuda.problem import Problem
from benchmarks.peers import Contender, nbbn
from benchmarks.peers.jax import Formulas, ordinary
from benchmarks.peers.torch import module_for
from benchmarks.problem import EPSILON, MOMENTUM
from nbbn import force

Forms = dict[str, Contender]
Prepare = Callable[[Problem, str], Forms]


def copy_contender(problem: Problem) -> Contender:
    """Copying one array of the input's size to another, on the device."""
    target = problem.torch.empty_like(problem.x)
    return Contender(lambda: target.copy_(problem.x), lambda result: {})


# -- nbbn --------------------------------------------------------------------------------------------------------------


def nbbn_forms(problem: Problem, mode: str, **choices: Any) -> Forms:
    """ordinary, which allocates its results, and preallocated, with out=. The layers' weights are on the device.

    choices: as in nbbn.force().
    """
    library = importlib.import_module("nbbn.arrays.gpu").find_library(problem.x)
    given = {"ordinary": None, "preallocated": library.empty_like(problem.x)}
    found = {}
    for form, out in given.items():
        layer = nbbn.layer_for(problem).to("cuda")
        force(layer, **choices)  # the thresholds of a GPU are none of a CPU's
        found[form] = nbbn.contender(problem, layer, mode, out)
    return found


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
        x = self.x
        module = module_for(self.torch, x, self._weights(), self.mode == "training")
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

    def taken(results: Any) -> dict[str, Any]:
        return {name: torch.from_dlpack(value) for name, value in read(results).items()}

    return {"ordinary": ordinary(jax, function, [given(a) for a in arguments], taken)._replace(waits=True)}


PEERS: dict[str, Prepare] = {"torch": torch_forms, "jax": jax_forms}
