"""What no kernel can follow: derivatives of a gradient, and the transformations of torch.func.

core/formula.py says what is computed, and PyTorch differentiates it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from nbbn.core import formula
from nbbn.kernels.channel import D, R
from nbbn.torch.settings import dispatcher, parsed
from nbbn.torch.tensors import MaybeTensor, statistic


def output(
    x: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    beside: Sequence[MaybeTensor],
    saved: MaybeTensor,
    options: str,
    eps: float,
) -> Tensor:
    """The output of a training call.

    beside: weights, a and b, see Operands. saved: of the call, where r and d of renorm are in it.
    """
    found, dtype, (weights, a, b) = parsed(options), statistic(x.dtype), beside
    axis, members = found["axis"] % x.dim(), [slice(None)]
    if found["virtual_batch_size"] is not None:
        lay = dispatcher(options, eps).layout(tuple(int(n) for n in x.shape), training=True)
        members = lay.members()
    ones = x.new_ones(x.shape[axis], dtype=dtype)
    corrections = None
    if found["renorm"] and saved is not None and saved.numel():  # an empty batch may have no groups
        corrections = tuple(saved[row].to(dtype).reshape(len(members), -1) for row in (R, D))
    y, _, _ = formula.train(
        torch,
        x.to(dtype),
        ones if weight is None else weight.to(dtype),
        torch.zeros_like(ones) if bias is None else bias.to(dtype),
        (axis,),
        eps,
        members=members,
        weights=weights,
        corrections=corrections,
        adjustment=None if a is None else (a, b),
        residual=None if residual is None else residual.to(dtype),
        relu=found["activation"] == "relu",
    )
    result: Tensor = y.to(x.dtype)
    return result


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    beside: Sequence[MaybeTensor],
    saved: Tensor,
    options: str,
    eps: float,
) -> list[MaybeTensor]:
    """Those of x, weight, bias, residual, a and b, with a graph of their own; None for what is not there.

    bias: None stands for zeros, and has a gradient: unless an activation follows, no gradient depends on it.
    """
    mask, *pair = beside
    if bias is None:
        bias = x.new_zeros(x.shape[parsed(options)["axis"]], dtype=statistic(x.dtype))
    # Views: one of them may have been computed from another, and that is not this function's to follow.
    with torch.enable_grad():
        own = [None if t is None else _to_follow(t) for t in (x, weight, bias, residual, *pair)]
        x, weight, bias, residual, *pair = own
        y = output(x, weight, bias, residual, (mask, *pair), saved, options, eps)
        found = iter(torch.autograd.grad(y, [t for t in own if t is not None], dy, create_graph=True))
    return [None if t is None else next(found) for t in own]


def _to_follow(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def is_needed() -> bool:
    """Whether a transformation is under way that kernels cannot follow."""
    return functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def saved_of_transformed(train: Any, tensors: Sequence[MaybeTensor], last: int) -> Tensor:
    """What `train`, a function of these tensors that no transformation sees, returns: a training call, which changes
    the `last` of them.

    Raises: RuntimeError under vmap, if the input has a dimension more and those have not.
    """
    depth = max((functorch.maybe_get_level(t) for t in tensors if t is not None), default=-1)
    if depth < 0:
        with temporarily_clear_interpreter_stack(), torch.no_grad():
            plain = [None if t is None else forward_ad.unpack_dual(t).primal.detach() for t in tensors]
            found: Tensor = train(*plain)
            return found
    inner: list[Any] = [
        t if t is None or functorch.maybe_get_level(t) < depth else functorch.get_unwrapped(t) for t in tensors
    ]
    batched = [t is not None and functorch.maybe_get_level(t) == depth and _is_batched(t) for t in tensors]
    if not any(batched):
        return saved_of_transformed(train, inner, last)
    if not all(batched[len(batched) - last :]):
        raise RuntimeError(
            "a batched tensor cannot update running statistics that are not batched: under vmap stack them "
            "(torch.func.stack_module_state), or use track_running_stats=False"
        )
    with temporarily_clear_interpreter_stack():
        moved: list[Any] = [
            t.movedim(functorch.maybe_get_bdim(own), 0) if b else t
            for t, own, b in zip(inner, tensors, batched, strict=True)
        ]
        size = next(t.shape[0] for t, b in zip(moved, batched, strict=True) if b and t is not None)
        parts = [
            saved_of_transformed(train, [t[i] if b else t for t, b in zip(moved, batched, strict=True)], last)
            for i in range(size)
        ]
        stacked = torch.stack(parts)
    wrapped: Tensor = functorch._add_batch_dim(stacked, 0, depth)
    return wrapped


def _is_batched(tensor: Tensor) -> bool:
    return bool(functorch.is_batchedtensor(tensor))
