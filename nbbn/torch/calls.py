"""A call, wherever it happens: at once, while something traces it, or inside a transformation of torch.func."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

from nbbn.kernels.channel import BATCH_MEAN
from nbbn.torch import formulas, ops
from nbbn.torch.past import Past
from nbbn.torch.settings import parsed
from nbbn.torch.tensors import DTYPES, MaybeTensor, statistic


def train(
    x: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    beside: tuple[MaybeTensor, MaybeTensor, MaybeTensor],
    state: list[Tensor],
    count: MaybeTensor,
    numbers: list[float],
    options: str,
    eps: float,
    *,
    update: bool,
    equal: bool = False,
    past: Past | None = None,
) -> tuple[Tensor, MaybeTensor]:
    """The output, and what the operator has saved, if it was called.

    count: of the batches in the statistics. update: whether this is one more, and the statistics change. equal: whether
    all batches have equal weights. past: of statistics that the output depends on, if the call is to be remembered, or
    repeats one. The other arguments are the operator's.
    """
    if _becomes_onnx():
        raise RuntimeError("ONNX has no batch normalization that trains: call eval() on the network before the export")
    mask, a, b = beside
    transformed = _is_transformed() if is_compiling() else formulas.is_needed()
    if is_compiling() and transformed and (update or parsed(options)["renorm"]):
        raise RuntimeError(
            "running statistics are not for torch.func inside of torch.compile: compile without the transformation, or "
            "use track_running_stats=False"
        )
    if is_compiling() or transformed or not state:
        past = None

    def run(
        x: Tensor, weight: Any, bias: Any, residual: Any, mask: Any, a: Any, b: Any, count: Any, *state: Tensor
    ) -> Any:
        past = count if equal else None
        found = ops.batch_norm(x, weight, bias, residual, mask, a, b, [*state], past, numbers, options, eps, update)
        if update and count is not None:
            count.add_(1)
        return found

    tensors = x, weight, bias, None, mask, None, None, count  # the statistics are those of the input alone
    before = None
    if past is not None and update:
        before = ops.packed_state(x, state, 0, 0)
    elif past is not None:
        with torch.no_grad(), _disable_current_modes():  # a mode may record what a call computes
            rows = past.find(run(*tensors, *state)[1])
            state = state if rows is None else [*rows]
    adjusted = any(t is not None and t.requires_grad for t in (a, b))
    if not transformed and (is_compiling() or not adjusted):
        y, saved = run(x, weight, bias, residual, mask, a, b, count, *state)
    else:
        saved = None
        if update or parsed(options)["renorm"]:
            saved = formulas.saved_of_transformed(lambda *plain: run(*plain)[1], (*tensors, *state), len(state))
        y = formulas.output(x, weight, bias, residual, beside, saved, options, eps)
    if past is not None and before is not None:
        past.keep(saved[BATCH_MEAN].clone(), before)
    return y, saved


_is_transformed = torch.compiler.assume_constant_result(formulas.is_needed)


@torch.compiler.assume_constant_result
def _becomes_onnx() -> bool:
    """PyTorch's compiler answers the question itself, and says no."""
    return torch.onnx.is_in_onnx_export()


def infer(
    x: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    mean: Tensor,
    variance: Tensor,
    axis: int,
    eps: float,
    activation: str | None,
) -> Tensor:
    """The output with given statistics, in PyTorch's own operations: exported programs hold aten.batch_norm."""
    axis %= x.dim()  # an ONNX file knows no negative one
    moved = x if axis == 1 else x.movedim(axis, 1)
    y = F.batch_norm(moved, mean, variance, weight, bias, False, 0.0, eps)
    if moved is not x:
        y = y.movedim(1, axis)
    if residual is not None:
        y = y + residual
    return y.relu() if activation == "relu" else y


def check_input(x: Any) -> None:
    """Raises: TypeError for what is no tensor of floats, with memory of its own."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        received = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"input must be a tensor of {accepted}; received {received}")
    if x.layout is not torch.strided or x.is_nested:
        received = "a nested tensor" if x.is_nested else x.layout
        raise TypeError(f"input must be a strided tensor, as to_dense() makes; received {received}")


def check_device(x: Tensor, tensors: Mapping[str, MaybeTensor]) -> None:
    """Raises: ValueError unless all of them are where the input is."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the input's device {x.device}; received {tensor.device}")


def check_parameters(x: Tensor, tensors: Mapping[str, MaybeTensor]) -> None:
    """Raises: ValueError unless all of them are where the input is; TypeError for dtypes that PyTorch refuses, too."""
    check_device(x, tensors)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    accepted = (x.dtype, torch.float32) if x.dtype.itemsize == 2 else (x.dtype,)
    if len(set(dtypes.values())) > 1 or any(dtype not in accepted for dtype in dtypes.values()):
        raise TypeError(
            f"parameters and running statistics must all have the dtype {' or '.join(map(str, accepted))} for an "
            f"input of {x.dtype}; received {', '.join(f'{name} of {dtype}' for name, dtype in dtypes.items())}"
        )


def check_like(residual: Any, x: Tensor) -> None:
    """Raises: TypeError, ValueError unless it is a tensor of the input's shape, where that is."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a tensor; received {type(residual).__name__}")
    if residual.shape != x.shape:
        raise ValueError(f"residual must have the input's shape {tuple(x.shape)}; received {tuple(residual.shape)}")
    check_device(x, {"residual": residual})


def adjustment_of(adjustment: Callable[..., Any] | None, x: Tensor) -> tuple[MaybeTensor, MaybeTensor]:
    """The tensors a and b, with as many dimensions as `x`, in the dtype of its statistics.

    Raises: TypeError, ValueError for what is no pair, or does not broadcast against the input.
    """
    if adjustment is None:
        return None, None
    pair = adjustment(tuple(x.shape))
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"adjustment must return a pair (scale, bias); received {type(pair).__name__}")
    found = []
    for name, value in zip(("scale", "bias"), pair, strict=True):
        tensor = torch.as_tensor(value).to(x.device, statistic(x.dtype))
        missing = x.dim() - tensor.dim()
        if missing < 0 or any(n not in (1, m) for n, m in zip(tensor.shape, x.shape[missing:], strict=True)):
            raise ValueError(
                f"adjustment's {name} must broadcast against the input's shape {tuple(x.shape)}; "
                f"received shape {tuple(tensor.shape)}"
            )
        found.append(tensor.reshape((1,) * missing + tuple(tensor.shape)))
    return found[0], found[1]


def check_training(x: Tensor, axis: int, eps: float) -> None:
    """Raises: ValueError, as PyTorch does in training, for one value per channel, and an eps that is not positive."""
    if not eps > 0:
        raise ValueError(f"eps must be positive in training; received {eps}")
    if torch._C._get_tracing_state() is None and x.numel() == x.shape[axis]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")


def check_channels(x: Tensor, axis: int, tensors: Mapping[str, MaybeTensor]) -> None:
    """Raises: TypeError, ValueError unless all of them have one number for each feature of the input."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor or None; received {type(tensor).__name__}")
        if tensor.shape != x.shape[axis : axis + 1 or None]:
            raise ValueError(
                f"{name} must have shape ({x.shape[axis]},), as dimension {axis} of the input, whose shape is "
                f"{tuple(x.shape)}; received {tuple(tensor.shape)}"
            )
    check_parameters(x, tensors)


def state_of(mean: MaybeTensor, variance: MaybeTensor, renorm: Any, seen: Any) -> list[Tensor]:
    """The running statistics in the order of the state's rows; none where nobody keeps them.

    Raises: ValueError if there is one without the other, or not as many more as there must be.
    """
    if (mean is None) != (variance is None):
        raise ValueError("running_mean and running_var come together; received one of them")
    for name, more, size in (("renorm_state", renorm, 3), ("seen_state", seen, 2)):
        if more is not None and (mean is None or len(more) != size):
            raise ValueError(f"{name} must be {size} tensors beside running_mean and running_var; received {len(more)}")
    return [] if mean is None or variance is None else [mean, variance, *(renorm or ()), *(seen or ())]
