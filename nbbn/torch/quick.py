"""Calls of a few microseconds: modules whose tensors lie where they lay in the last call, on inputs like earlier ones.

Beside the step there is what PyTorch takes for a Function and for the tensors of its results, and little else.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from nbbn.core import dtypes
from nbbn.core.options import Numbers
from nbbn.kernels.channel import BATCH_MEAN, SAVED_ROWS
from nbbn.torch import formulas
from nbbn.torch.past import Past
from nbbn.torch.settings import dispatcher
from nbbn.torch.tensors import MaybeTensor, check_saved, numpy_of, rows_of

_increment_version = torch._C._increment_version


class Step:
    """What a call on inputs of one geometry runs. gradient: the same for its gradient, of training. activated: whether
    an activation follows. has_dz: whether that needs the residual, and makes its gradient."""

    __slots__ = (
        *("activated", "channels", "dtype", "gradient", "has_dz", "options", "run", "saved_shape", "shape"),
        *("statistic", "stride"),
    )

    def __init__(
        self, x: Tensor, training: bool, residual: bool, numbers: list[float], options: str, eps: float
    ) -> None:
        """Raises: ValueError where a call needs more than one step on the memory of its tensors."""
        run, array = dispatcher(options, eps), numpy_of(x.detach())
        lay = run.layout(array.shape, training)
        self.activated = run.options.activation is not None
        self.has_dz = residual and self.activated
        found = run.on_memory("train" if training else "infer", array, residual, Numbers(*numbers))
        gradient = run.on_memory("backward", array, self.has_dz) if training else None
        if found is None or (training and gradient is None):
            raise ValueError("not one step")
        self.run, self.gradient, self.options = found, gradient, (options, eps)
        self.shape, self.stride, self.dtype = x.shape, x.stride(), x.dtype
        self.saved_shape, self.channels = (SAVED_ROWS, lay.statistics), lay.channels
        self.statistic = dtypes.statistic(array.dtype)

    def laid(self, tensor: Tensor) -> Tensor:
        """A tensor as this step takes it: gradients may lie in another way, and so may what saved_tensors_hooks have
        brought back; zeros may have no memory."""
        if (
            type(tensor) is Tensor
            and tensor.dtype is self.dtype
            and tensor.is_cpu
            and tensor.stride() == self.stride
            and not tensor.is_neg()
            and tensor.data_ptr()
        ):
            return tensor
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="cpu").copy_(tensor)


class Views:
    """The parameters and running statistics of a module as kernels take them.

    where: the memory of weight, bias, num_batches_tracked and the running statistics when the views were made; they are
    good while it is the same. They keep it: so no other memory can be there. rows: pairs of a row of the state and the
    module's own, where the statistics are more than two, and are gathered for a step.
    """

    __slots__ = ("_count", "_kept", "_tracked", "params", "rows", "scratch", "state", "where")

    def __init__(self, tensors: Sequence[MaybeTensor], step: Step) -> None:
        """Raises: ValueError where the step cannot use the tensors as they lie."""
        kinds = Tensor, torch.nn.Parameter
        if any(t is not None and not (t.is_cpu and type(t) in kinds and not t.is_neg()) for t in tensors):
            raise ValueError("a tensor elsewhere, or of another kind")
        weight, bias, count, *state = (None if t is None else t.detach() for t in tensors)
        like = np.empty(step.channels, step.statistic)
        self.where = where(tensors)
        self.params, kept = rows_of(weight, bias, (1.0, 0.0), like)
        self.rows: list[tuple[np.ndarray, np.ndarray]] = []
        if len(state) > 2:
            self.state, own = np.empty((len(state), step.channels), step.statistic), [numpy_of(t) for t in state]
            if any(row.shape != like.shape or row.dtype != like.dtype for row in own):
                raise ValueError("statistics of another kind")
            self.rows = list(zip(self.state, own, strict=True))
        else:
            self.state, more = rows_of(state[0], state[1], (0.0, 1.0), like)
            kept += more
        self._kept = kept
        self.scratch = np.empty(self.state.shape, self.state.dtype)
        self._count = None if count is None else count.numpy().reshape(1)
        self._tracked = [t for t in tensors[2:] if t is not None]

    def count_one(self) -> None:
        """A batch more is in the statistics, which have another version now."""
        if self._count is not None:
            self._count[0] += 1
        _increment_version(self._tracked)


def where(tensors: Sequence[MaybeTensor]) -> Any:
    """What tells memory, and what of it is seen, from other memory."""
    return [None if t is None else (t.data_ptr(), t.numel(), t.dtype, t.is_contiguous()) for t in tensors]


def train(
    x: Tensor, residual: MaybeTensor, step: Step, views: Views, update: bool, past: Past | None = None
) -> tuple[Tensor, np.ndarray]:
    """The output, and what the gradient needs. past: of statistics that the output depends on."""
    y, saved, state = torch.empty_like(x), np.empty(step.saved_shape), views.state
    for row, own in views.rows:
        row[...] = own
    before = state.copy() if past is not None and update else None
    address = residual if residual is None else residual.data_ptr()
    step.run(address, x.data_ptr(), y.data_ptr(), views.params, state, state if update else views.scratch, saved)
    if update:
        for row, own in views.rows:
            own[...] = row
    if past is None:
        return y, saved
    if before is not None:
        past.keep(saved[BATCH_MEAN].copy(), before)
    elif (rows := past.find(saved)) is not None:
        step.run(address, x.data_ptr(), y.data_ptr(), views.params, rows.numpy(), views.scratch, saved)
    return y, saved


def infer(x: Tensor, residual: MaybeTensor, step: Step, views: Views) -> Tensor:
    y, state = torch.empty_like(x), views.state
    for row, own in views.rows:
        row[...] = own
    address = residual if residual is None else residual.data_ptr()
    step.run(address, x.data_ptr(), y.data_ptr(), views.params, state)
    return y


class BatchNorm(Function):
    """A training call for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: MaybeTensor,
        bias: MaybeTensor,
        residual: MaybeTensor,
        step: Step,
        views: Views,
        update: bool,
        past: Past | None = None,
    ) -> Tensor:
        kept = x, weight, bias if step.activated else None, residual if step.has_dz else None
        if any(ctx.needs_input_grad):
            check_saved(*kept)
        y, ctx.saved = train(x, residual, step, views, update, past)
        ctx.step, ctx.residual = step, residual is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: MaybeTensor) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * 8
        x, weight, bias, residual = ctx.saved_tensors
        step, saved = ctx.step, ctx.saved
        if torch.is_grad_enabled():
            beside, kept = (None, None, None), torch.from_numpy(saved)
            dx, dw, db, dz, _, _ = formulas.gradients(dy, x, weight, bias, residual, beside, kept, *step.options)
            dz = dy if ctx.residual and not step.has_dz else dz
            return dx, dw, db if ctx.needs_input_grad[2] else None, dz, *(None,) * 4
        x, dy = step.laid(x), step.laid(dy)
        dx = torch.empty_like(x)
        dgamma, dbeta = dparams = np.empty((2, step.channels), step.statistic)
        if step.has_dz:
            dz, residual = torch.empty_like(x), step.laid(residual)  # a copy lives until the step has run
            there = dz.data_ptr(), residual.data_ptr()
        else:
            dz = dy if ctx.residual else None
            there = None, None
        step.gradient(*there, x.data_ptr(), dy.data_ptr(), dx.data_ptr(), saved, dparams)
        return (
            dx,
            None if weight is None else torch.from_numpy(dgamma),
            torch.from_numpy(dbeta) if ctx.needs_input_grad[2] else None,
            dz,
            *(None,) * 4,
        )
