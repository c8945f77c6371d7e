"""PyTorch on the CPU.

ordinary is torch.nn.functional.batch_norm, for small inputs also the module; preallocated calls the operators below it
with results given. The backward pass calls the operator that autograd ends in, without autograd; its variant with
results given computes new ones and copies them. Channels last is the memory format of that name; where PyTorch has none
for a rank, "as image" presents the same memory as an image of one column.
"""

import importlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks.peers import Contender, plain_only
from benchmarks.problem import EPSILON, MOMENTUM, Problem

View = Callable[[Problem, Any], Any]

SMALL = 1 << 16  # bytes; the module's own overhead is nothing to larger inputs


def version() -> str:
    return str(importlib.import_module("torch").__version__)


def prepare(problem: Problem, mode: str) -> dict[str, Contender]:
    plain_only(problem, "PyTorch")
    torch: Any = importlib.import_module("torch")
    _enter_inference_mode(torch)
    make: type[_Step] = _Backward if mode == "backward" else _Forward
    views: dict[str, View] = {"": _natural}
    if problem.case.channels_last and len(problem.case.shape) != 4:
        views[" as image"] = _as_image
    found = {}
    for name, view in views.items():
        for form, contender in make(torch, problem, mode == "training", view).contenders().items():
            found[form + name] = contender
    return found


@lru_cache
def _enter_inference_mode(torch: Any) -> Any:
    """For good, as long as what is returned is kept. Without it autograd's bookkeeping is 5 % of a small call."""
    mode = torch.inference_mode()
    mode.__enter__()
    return mode


def _tensor(torch: Any, array: np.ndarray) -> Any:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _natural(problem: Problem, tensor: Any) -> Any:
    """Channels at dimension 1, the memory as it is."""
    return tensor.movedim(problem.case.kept[0], 1)


def _as_image(problem: Problem, tensor: Any) -> Any:
    return tensor.view(1, -1, 1, problem.case.channels).permute(0, 3, 1, 2)


def module_for(torch: Any, x: Any, weights: Iterable[Any], training: bool) -> Any:
    """The module for inputs such as x, whose channels are at dimension 1.

    weights: gamma, beta and the moving statistics, which it copies.
    """
    nn = torch.nn
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    named = dict(zip(("weight", "bias", "running_mean", "running_var"), weights, strict=True))
    module = kinds[x.ndim](x.shape[1], EPSILON, 1 - MOMENTUM, device=x.device, dtype=named["weight"].dtype)
    module.train(training)
    for name, value in named.items():
        getattr(module, name).copy_(value)
    return module


class _Step:
    """Tensors that share memory with the problem's arrays."""

    def __init__(self, torch: Any, problem: Problem, training: bool, view: View) -> None:
        self.torch, self.problem, self.training = torch, problem, training
        self._view = view
        self.x, self.dy = self.view(problem.x), self.view(problem.dy)
        self.residual = None if problem.residual is None else self.view(problem.residual)
        self.gamma, self.beta = _tensor(torch, problem.gamma), _tensor(torch, problem.beta)
        self.mean, self.variance = _tensor(torch, problem.mean.copy()), _tensor(torch, problem.variance.copy())

    def view(self, array: np.ndarray) -> Any:
        return self._view(self.problem, _tensor(self.torch, array))

    def contenders(self) -> dict[str, Contender]:
        raise NotImplementedError

    def empty(self) -> tuple[np.ndarray, Any]:
        """New memory like the input's, as an array and as a tensor in this view."""
        array = np.empty_like(self.problem.x)
        return array, self.view(array)

    def array(self, tensor: Any) -> np.ndarray:
        """The tensor in the case's layout; 16-bit ones as float32."""
        last = tensor.movedim(1, -1) if self.problem.case.channels_last else tensor
        wide = last if tensor.dtype in (self.torch.float32, self.torch.float64) else last.float()
        return np.asarray(wide.numpy()).reshape(self.problem.case.shape)


class _Forward(_Step):
    def contenders(self) -> dict[str, Contender]:
        problem, torch = self.problem, self.torch
        found = {"ordinary": self._ordinary(torch.nn.functional.batch_norm), "preallocated": self._preallocated()}
        if problem.case.bytes <= SMALL and not problem.case.fused and self._view is _natural:
            found["ordinary, module"] = self._module()
        return found

    def _fuse(self, y: Any) -> Any:
        """In place, and in one pass where there is an operator for it, which knows no 16-bit floats."""
        if self.residual is None:
            return y.relu_()
        if self.problem.dtype.itemsize > 2:
            return self.torch.ops.aten._add_relu_.Tensor(y, self.residual)
        return y.add_(self.residual).relu_()

    def _read(self, y: Any, mean: Any, variance: Any) -> dict[str, Any]:
        found = {"y": self.array(y)}
        return found | ({"mean": mean.numpy(), "variance": variance.numpy()} if self.training else {})

    def _ordinary(self, batch_norm: Any) -> Contender:
        mean, variance = self.mean.clone(), self.variance.clone()
        x, gamma, beta, training, fuse = self.x, self.gamma, self.beta, self.training, self._fuse
        fused = bool(self.problem.case.fused)

        def call() -> Any:
            y = batch_norm(x, mean, variance, gamma, beta, training, 1 - MOMENTUM, EPSILON)
            return fuse(y) if fused else y

        return Contender(call, lambda y: self._read(y, mean, variance))

    def _preallocated(self) -> Contender:
        mean, variance = self.mean.clone(), self.variance.clone()
        x, gamma, beta, training, fuse = self.x, self.gamma, self.beta, self.training, self._fuse
        fused = bool(self.problem.case.fused)
        _, out = self.empty()
        size = self.problem.case.channels if training else 0
        results = (out, *(self.mean.new_empty(size) for _ in range(2)))
        batch_norm = self.torch.native_batch_norm

        def call() -> Any:
            y = batch_norm(x, gamma, beta, mean, variance, training, 1 - MOMENTUM, EPSILON, out=results)[0]
            return fuse(y) if fused else y

        return Contender(call, lambda y: self._read(y, mean, variance))

    def _module(self) -> Contender:
        x, weights = self.x, (self.gamma, self.beta, self.mean, self.variance)
        module = module_for(self.torch, x, weights, self.training)
        return Contender(lambda: module(x), lambda y: self._read(y, module.running_mean, module.running_var))


class _Backward(_Step):
    def contenders(self) -> dict[str, Contender]:
        ops = self.torch.ops.aten
        mean, variance = (_tensor(self.torch, v) for v in self.problem.batch)
        rstd = (variance + EPSILON).rsqrt()
        saved = (self.x, self.gamma, self.mean, self.variance, mean, rstd, True, EPSILON, [True] * 3)
        relu, dy = bool(self.problem.case.fused), self.dy
        y = self.view(self.problem.y) if relu else None
        (_, dz), (_, dx) = self.empty() if relu else (None, None), self.empty()
        given = {"out0": dx, "out1": self.gamma.new_empty(rstd.shape), "out2": self.gamma.new_empty(rstd.shape)}

        def ordinary() -> Any:
            g = ops.threshold_backward.default(dy, y, 0) if relu else dy
            return g, *ops.native_batch_norm_backward.default(g, *saved)

        def preallocated() -> Any:
            g = ops.threshold_backward.grad_input(dy, y, 0, grad_input=dz) if relu else dy
            return g, *ops.native_batch_norm_backward.out(g, *saved, **given)

        return {"ordinary": Contender(ordinary, self._read), "preallocated": Contender(preallocated, self._read)}

    def _read(self, results: Any) -> dict[str, Any]:
        g, dx, dgamma, dbeta = results
        found = {"dx": self.array(dx), "dgamma": dgamma.numpy(), "dbeta": dbeta.numpy()}
        return found | ({} if self.residual is None else {"dresidual": self.array(g)})
