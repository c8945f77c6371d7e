"""The operators torch.ops.nbbn.batch_norm and batch_norm_backward: for autograd, torch.compile and torch.export.

A call that nothing traces does without them, where it can (quick.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from nbbn.arrays import place_of
from nbbn.call.operands import as_weights
from nbbn.engine.base import Operands
from nbbn.kernels.channel import SAVED_ROWS
from nbbn.torch import formulas
from nbbn.torch.settings import as_numbers, dispatcher, parsed
from nbbn.torch.tensors import MaybeTensor, array_of, check_saved, statistic, tensor_of

_library = torch.library.Library("nbbn", "DEF")
# beside: weights, a and b, each with as many dimensions as the input, in the dtype of its statistics, or none of them.
# state: the running statistics, which are changed; none if nobody keeps them. count: of batches before this one, where
# they have equal weights. numbers, options: settings.py. adjustment: whether a and b have gradients, which are empty
# where they have none, as that of the residual is.
_library.define(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, Tensor? a, Tensor? b, "
    "Tensor(a!)[] state, Tensor? count, float[] numbers, str options, float eps, bool update) -> (Tensor, Tensor)"
)
_library.define(
    "batch_norm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
    "Tensor? a, Tensor? b, Tensor saved, str options, float eps, bool adjustment=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
batch_norm = torch.ops.nbbn.batch_norm.default
batch_norm_backward = torch.ops.nbbn.batch_norm_backward.default


def operands(x: Tensor, residual: MaybeTensor, mask: MaybeTensor, a: MaybeTensor, b: MaybeTensor) -> Operands:
    array = array_of(x)
    weights = None
    if mask is not None:
        dtype = array_of(mask, "mask").dtype
        given = array_of(mask, "mask") if mask.is_cpu else mask.detach()
        weights = as_weights(given, array, (), dtype)
    others = [None if t is None else array_of(t, "adjustment") for t in (a, b)]
    return Operands(None if residual is None else array_of(_like(residual, x), "residual"), weights, *others)


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """In the dtype of the input; the order in memory is the kernel's to follow."""
    return tensor.to(x.dtype)


def parameters(x: Tensor, weight: MaybeTensor, bias: MaybeTensor, channels: int) -> Tensor:
    """(2, C) in the dtype of the statistics."""
    dtype = statistic(x.dtype)
    gamma = x.new_ones(channels, dtype=dtype) if weight is None else weight.detach().to(dtype)
    beta = torch.zeros_like(gamma) if bias is None else bias.detach().to(dtype)
    return torch.stack((gamma, beta))


def packed_state(x: Tensor, state: Sequence[Tensor], channels: int, rows: int) -> Tensor:
    """(rows, C) in the state's dtype, float32 for 16-bit ones."""
    if state:
        return torch.stack([t.detach().to(statistic(t.dtype)) for t in state])
    return x.new_zeros((rows, channels), dtype=statistic(x.dtype))


def unpack_state(state: Sequence[Tensor], packed: Tensor) -> None:
    for tensor, row in zip(state, packed, strict=True):
        tensor.detach().copy_(row)
    torch.autograd.graph.increment_version(state)


def _train(
    x: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    mask: MaybeTensor,
    a: MaybeTensor,
    b: MaybeTensor,
    state: list[Tensor],
    count: MaybeTensor,
    numbers: list[float],
    options: str,
    eps: float,
    update: bool,
) -> tuple[Tensor, Tensor]:
    run, array = dispatcher(options, eps), array_of(x)
    channels = x.shape[run.axis(x.dim())[0]]
    kept = packed_state(x, state, channels, run.state_rows)
    y = torch.empty_like(x)
    _, new_state, saved = run.train(
        array,
        array_of(parameters(x, weight, bias, channels)),
        array_of(kept),
        operands(x, residual, mask, a, b),
        numbers=as_numbers(numbers, None if count is None else int(count)),
        out=array_of(y),
    )
    if state and update and x.numel():
        unpack_state(state, tensor_of(new_state))
    return y, tensor_of(saved)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    mask: MaybeTensor,
    a: MaybeTensor,
    b: MaybeTensor,
    saved: Tensor,
    options: str,
    eps: float,
    adjustment: bool = False,
) -> tuple[Tensor, ...]:
    run = dispatcher(options, eps)
    has_dz = _has_dz(residual, options)
    beside, dx = operands(x, residual, mask, a, b), torch.empty_like(x)
    _, dparams, dz = run.backward(
        array_of(_like(dy, x), "grad"),
        array_of(x),
        array_of(saved),
        beside,
        training=True,
        out=array_of(dx),
        wants_dz=has_dz or adjustment,
    )
    dgamma, dbeta = tensor_of(dparams).unbind(0)
    da, db = (dgamma.new_empty(0) for _ in "ab")
    if adjustment:
        da, db = map(tensor_of, run.adjustment_gradients(array_of(x), array_of(saved), beside, dz))
    return dx, dgamma.clone(), dbeta.clone(), tensor_like(dz, x) if has_dz else x.new_empty(0), da, db


def _has_dz(residual: MaybeTensor, options: str) -> bool:
    """Whether the residual's gradient is another one than the output's: otherwise it was only added."""
    return residual is not None and parsed(options)["activation"] is not None


def tensor_like(dz: Any, x: Tensor) -> Tensor:
    """dz, which the engine has made, as a tensor."""
    found = torch.empty_like(x)
    place = place_of(dz)
    place.write(array_of(found), dz, tuple(x.shape), tuple(range(x.dim())))
    return found


def groups_of(samples: Any, options: str) -> Any:
    """How many virtual batches so many samples have; they may be a number that is not known yet."""
    size = parsed(options)["virtual_batch_size"]
    return 1 if size is None else (samples + size - 1) // size


def _fake_train(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    options = args[-3]
    channels = x.shape[parsed(options)["axis"]]
    saved = x.new_empty((SAVED_ROWS, groups_of(x.shape[0], options) * channels), dtype=torch.float64)
    return torch.empty_like(x), saved


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    mask: MaybeTensor,
    a: MaybeTensor,
    b: MaybeTensor,
    saved: Tensor,
    options: str,
    eps: float,
    adjustment: bool = False,
) -> tuple[Tensor, ...]:
    dgamma = x.new_empty(x.shape[parsed(options)["axis"]], dtype=statistic(x.dtype))
    pair = [x.new_empty(t.shape if adjustment and t is not None else 0, dtype=dgamma.dtype) for t in (a, b)]
    dz = torch.empty_like(x) if _has_dz(residual, options) else x.new_empty(0)
    return torch.empty_like(x), dgamma, torch.empty_like(dgamma), dz, *pair


class _BatchNorm(Function):
    """The operator for autograd; what is not differentiable is in `rest`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: MaybeTensor,
        bias: MaybeTensor,
        residual: MaybeTensor,
        mask: Any,
        a: Any,
        b: Any,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        activated = parsed(rest[-3])["activation"] is not None
        kept = x, weight, bias if activated else None, residual if activated else None, mask, a, b
        if any(ctx.needs_input_grad):
            check_saved(*kept)
        with torch._C._AutoDispatchBelowAutograd():
            y, saved = batch_norm(x, weight, bias, residual, mask, a, b, *rest)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved)
        ctx.rest, ctx.residual = rest[-3:-1], residual is not None
        ctx.activated, ctx.dtype = activated, None if bias is None else bias.dtype
        ctx.save_for_backward(*kept, saved)
        return y, saved

    @staticmethod
    def backward(ctx: Any, dy: MaybeTensor, _: Any) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * 13
        saved = ctx.saved_tensors  # to be asked for once, for activation checkpointing
        weight = saved[1]
        adjusted = ctx.needs_input_grad[5:7]
        dx, dgamma, dbeta, dz, *pair = batch_norm_backward(dy, *saved, *ctx.rest, any(adjusted))
        if not ctx.activated:  # the residual was only added
            dz = dy
        return (
            dx,
            None if weight is None else dgamma.to(weight.dtype),
            None if ctx.dtype is None else dbeta.to(ctx.dtype),
            dz if ctx.residual else None,
            None,  # the mask
            *(gradient if wanted else None for gradient, wanted in zip(pair, adjusted, strict=True)),
            *(None,) * 6,
        )


def _train_with_autograd(*args: Any) -> Any:
    return _BatchNorm.apply(*args)


def _backward_with_autograd(
    dy: Tensor,
    x: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    mask: MaybeTensor,
    a: MaybeTensor,
    b: MaybeTensor,
    saved: Tensor,
    options: str,
    eps: float,
    adjustment: bool = False,
) -> tuple[Tensor, ...]:
    differentiable = dy, x, weight, bias, residual, a, b
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)):
        with torch._C._AutoDispatchBelowAutograd():
            found: tuple[Tensor, ...] = batch_norm_backward(
                dy, x, weight, bias, residual, mask, a, b, saved, options, eps, adjustment
            )
            return found
    # The derivative of a gradient is that of a formula.
    dx, dgamma, dbeta, dz, *pair = formulas.gradients(dy, x, weight, bias, residual, (mask, a, b), saved, options, eps)
    channels = x.shape[parsed(options)["axis"]]
    zero = x.new_zeros(channels, dtype=statistic(x.dtype))
    assert dx is not None
    assert dbeta is not None
    own_dz = _has_dz(residual, options) and dz is not None
    return (
        dx,
        zero if dgamma is None else dgamma,
        dbeta,
        dz if own_dz and dz is not None else x.new_empty(0),
        *(gradient if adjustment and gradient is not None else zero.new_empty(0) for gradient in pair),
    )


for _key, _forward, _gradient in (
    ("CPU", _train, _backward),
    ("CUDA", _train, _backward),
    ("Autograd", _train_with_autograd, _backward_with_autograd),
):
    _library.impl("batch_norm", _forward, _key)
    _library.impl("batch_norm_backward", _gradient, _key)
torch.library.register_fake("nbbn::batch_norm", _fake_train, lib=_library)
torch.library.register_fake("nbbn::batch_norm_backward", _fake_backward, lib=_library)
