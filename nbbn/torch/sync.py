"""The module whose batch is those of all ranks of a group together, on CPU and GPU."""

import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nbbn.arrays import beside
from nbbn.engine.base import Operands
from nbbn.engine.dispatcher import Dispatcher
from nbbn.sync.exchange import Exchange, Lost
from nbbn.sync.group import Group
from nbbn.sync.header import BACKWARD, LATER, NEVER, NOW, Header, input_header, training_header
from nbbn.sync.torch_group import torch as group_of
from nbbn.torch import calls, ops
from nbbn.torch.modules import Normalization
from nbbn.torch.replacing import KINDS, Replacements, put, successor
from nbbn.torch.settings import as_numbers, dispatcher, numbers
from nbbn.torch.tensors import MaybeTensor, align, array_of, tensor_of

_groups: weakref.WeakKeyDictionary[Any, Group] = weakref.WeakKeyDictionary()


class SyncBatchNorm(Normalization):
    """torch.nn.SyncBatchNorm with nbbn's options, and on CPU too: the statistics are those of all ranks' batches.

    Every value counts the same, on whatever rank it is; a rank without data takes part with an empty batch. All ranks
    have the same running statistics, to the bit. The gradient of the input is that of the sum of all ranks' losses;
    those of weight and bias are of this rank alone, as DistributedDataParallel expects. In eval no rank waits for
    others, nor does a process outside a group.

    Args:
        process_group: of torch.distributed; None is all processes, or this one alone where torch.distributed is not
            initialized. Or what nbbn.sync.mpi() or .threads() returns.
        The others: as of nbbn.torch.BatchNorm2d.
    Raises: in training SyncError, on all ranks, if one of them has bad input, if they do not make the same call, or if
        one does not come. The running statistics are then as they were.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Any = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.process_group = process_group

    # Not a subclass of torch.nn's, of which DistributedDataParallel says that it needs a GPU.
    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    _COPIED_WITHOUT = (*Normalization._COPIED_WITHOUT, "_exchange")

    def _forget(self) -> None:
        super()._forget()
        self._exchange: Exchange | Lost | None = None

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """A network in which SyncBatchNorm stands in the places of nbbn's and torch.nn's BatchNorm1d, 2d and 3d.

        As torch.nn.SyncBatchNorm.convert_sync_batchnorm, which makes torch.nn's modules of nbbn's, too.
        """
        new: Replacements = {}
        for old in module.modules():
            own = type(old) in KINDS.values()
            if own or type(old) in KINDS:
                new[old] = successor(old, cls, old.options() if own else {})
                new[old].process_group = process_group
        return put(module, new)

    def _shared(self) -> Exchange | Lost | None:
        """Where the messages go; None for a process alone."""
        if self._exchange is None:
            group = self.process_group
            if group is None or isinstance(group, dist.ProcessGroup):
                if not (dist.is_available() and dist.is_initialized()):
                    return None
                own = dist.group.WORLD if group is None else group
                if dist.get_world_size(own) == 1:
                    return None
                group = _groups.get(own)
                if group is None:
                    group = _groups[own] = group_of(own)
            elif not hasattr(group, "rank"):  # torch.distributed has a number for a group of others
                raise ValueError(f"process_group must be one that this process is in; received {group!r}")
            self._exchange = Exchange(group)
        return self._exchange

    def forward(self, input: Tensor, residual: MaybeTensor = None, mask: MaybeTensor = None) -> Tensor:
        """As of nbbn.torch.BatchNorm2d; in training a call of all ranks."""
        if self.training and isinstance(input, Tensor):
            exchange = self._shared()
            if exchange is not None:
                return self._together(exchange, input, residual, mask)
        return super().forward(input, residual, mask)

    @torch.compiler.disable  # ranks wait for each other
    def _together(self, exchange: Exchange | Lost, x: Tensor, residual: MaybeTensor, mask: MaybeTensor) -> Tensor:
        update = self.tracks() and torch._C._current_graph_task_id() == -1
        with exchange.lock:
            try:
                call = _Call(self, exchange, x, residual, mask, update)
            except Exception as cause:
                exchange.gather(Header(call=exchange.calls + 1), None, cause)  # tells the others, and raises
                raise
            y: Tensor = _Synchronized.apply(x, self.weight, self.bias, residual, call)
            exchange.calls += 1
        if self._collector is not None and update:
            self._collector(call.saved, x, call.given)
        elif update:
            ops.unpack_state(self.state_tensors(), call.new_state)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return y


class _Own(NamedTuple):
    """What one rank brings: its input as an Array, what stands beside it, and its moments."""

    x: Any
    operands: Operands
    moments: Any


class _Call:
    """One training call of all ranks. Making it checks this rank's input, and changes nothing."""

    def __init__(self, module: SyncBatchNorm, exchange: Any, x: Tensor, residual: Any, mask: Any, update: bool) -> None:
        calls.check_input(x)
        module._check_input_dim(x)
        module.check_features(x)
        tensors = {name: getattr(module, name) for name in ("weight", "bias", "running_mean", "running_var")}
        calls.check_parameters(x, tensors)
        if residual is not None:
            calls.check_like(residual, x)
        weights = None if mask is None else align(mask, x, module.axis)
        a, b = calls.adjustment_of(module.adjustment, x)
        if any(t is not None and t.requires_grad for t in (a, b)):
            raise ValueError("adjustment's scale and bias must not require gradients in SyncBatchNorm")
        self.run: Dispatcher = dispatcher(module._text, module.eps)
        self.given = numbers(module.momentum, module.renorm_momentum, module.renorm_clipping)
        count = module.num_batches_tracked if module.momentum is None else None
        self.numbers = as_numbers(self.given, None if count is None else int(count))
        array, operands = array_of(x), ops.operands(x, residual, weights, a, b)
        channels, state = module.num_features, module.state_tensors()
        self.params = array_of(ops.parameters(x, module.weight, module.bias, channels))
        self.state = array_of(ops.packed_state(x, state, channels, self.run.state_rows))
        self.own = _Own(array, operands, self.run.reduce(array, operands.weights))
        self.exchange, self.number = exchange, exchange.calls + 1
        self.update = LATER if module._collector is not None and update else NOW if update else NEVER
        self.saved: Any = None
        self.new_state: Any = None

    def header(self) -> Header:
        x, operands, _ = self.own
        header = training_header(self.run, x, self.numbers, operands.adjusted, self.state, self.update)
        return header._replace(call=self.number)

    def finish(self, y: Tensor) -> Any:
        """Write the output. Returns: saved."""
        x, operands, own = self.own
        moments = beside(self.run.merge_moments(self.exchange.gather(self.header(), own)), x)
        new_state, saved, coefficients = self.run.finish(
            moments,
            self.params,
            self.state,
            rank=x.ndim,
            dtype=x.dtype,
            adjusted=operands.adjusted,
            numbers=self.numbers,
        )
        self.run.apply(x, coefficients, operands, out=array_of(y))
        self.new_state, self.saved = tensor_of(new_state), tensor_of(saved)
        return saved

    def gradients(self, dy: Any, x: Any, saved: Any, operands: Operands, dx: Tensor, wants_dz: bool) -> Any:
        """Write dx. Returns: dparams and dz."""
        sums, dparams = self.run.reduce_gradient(dy, x, saved, operands)
        header = input_header(self.run, x)._replace(stage=BACKWARD, call=self.number)
        with self.exchange.lock:
            parts = self.exchange.gather(header, sums)
        found = beside(self.run.add_sums(parts), x)
        _, dz = self.run.apply_gradient(dy, x, saved, found, operands, out=array_of(dx), wants_dz=wants_dz)
        return dparams, dz


class _Synchronized(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, call: _Call) -> Tensor:
        y = torch.empty_like(x)
        ctx.kept, ctx.call = call.finish(y), call
        ctx.operands = call.own.operands
        ctx.dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, residual)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, residual = ctx.saved_tensors
        dx, call = torch.empty_like(x), ctx.call
        wants_dz = residual is not None and call.run.options.activation is not None
        dparams, dz = call.gradients(array_of(dy.to(x.dtype)), array_of(x), ctx.kept, ctx.operands, dx, wants_dz)
        dgamma, dbeta = tensor_of(dparams).unbind(0)
        own_dz = ops.tensor_like(dz, x) if wants_dz else dy
        return (
            dx,
            None if weight is None else dgamma.to(weight.dtype),
            None if ctx.dtype is None else dbeta.to(ctx.dtype),
            None if residual is None else own_dz,
            None,
        )
