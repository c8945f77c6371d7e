"""torch.nn.functional.batch_norm with nbbn's options."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from nbbn.torch import calls
from nbbn.torch.settings import as_text, check_clipping, check_momentum, numbers
from nbbn.torch.tensors import align

_text = lru_cache(maxsize=256)(as_text)


@torch.compiler.assume_constant_result
def _constant_text(*args: Any, **options: Any) -> str:
    """What a compiled program has of the options: they are constants there."""
    return _text(*args, **options)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Callable[[], float] = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    axis: int = 1,
    renorm_state: Sequence[Tensor] | None = None,
    renorm_clipping: Mapping[str, float | Callable[[], float]] | None = None,
    renorm_momentum: float | Callable[[], float] = 0.01,
    virtual_batch_size: int | None = None,
    ragged: str = "error",
    virtual_batch_order: str = "interleaved",
    adjustment: Callable[[tuple[int, ...]], tuple[Any, Any]] | None = None,
    activation: str | None = None,
    bessel_correction: bool | None = None,
    seen_state: Sequence[Tensor] | None = None,
    skip_nonfinite: bool = False,
) -> Tensor:
    """The normalized input; in training the running statistics change in their place.

    Args:
        input to eps: as in torch.nn.functional.batch_norm; momentum is the weight of the new value.
        residual, mask: as in a call of nbbn.torch.BatchNorm2d.
        renorm_state: the tensors (C,) running_stddev, renorm_mean and renorm_stddev, which make it batch
            renormalization. seen_state: those of debiased averages, seen_mean and seen_var.
        Others: as of nbbn.torch.BatchNorm2d.
    Raises: TypeError, ValueError; the running statistics are then as they were.
    """
    calls.check_input(input)
    check_momentum("momentum", momentum)
    check_clipping(renorm_clipping, renorm_state is not None)
    if residual is not None:
        calls.check_like(residual, input)
    if input.numel() == 0 and input.dim() == 1:
        return input.clone()  # PyTorch lets it pass
    if not -input.dim() <= axis < input.dim():
        raise ValueError(f"axis must be a dimension of the input, whose shape is {tuple(input.shape)}; received {axis}")
    text = (_constant_text if is_compiling() else _text)(
        axis,
        renorm=renorm_state is not None,
        virtual_batch_size=virtual_batch_size,
        ragged=ragged,
        virtual_batch_order=virtual_batch_order,
        activation=activation,
        bessel_correction=bessel_correction,
        debias=seen_state is not None,
        skip_nonfinite=skip_nonfinite,
    )
    tensors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    state = calls.state_of(running_mean, running_var, renorm_state, seen_state)
    calls.check_channels(input, axis, tensors)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean and running_var must be tensors when training=False; received None")
        return calls.infer(input, weight, bias, residual, running_mean, running_var, axis, eps, activation)
    calls.check_training(input, axis, eps)
    weights = None if mask is None else align(mask, input, axis)
    y, _ = calls.train(
        input,
        weight,
        bias,
        residual,
        (weights, *calls.adjustment_of(adjustment, input)),
        state,
        None,
        numbers(momentum, renorm_momentum, renorm_clipping),
        text,
        eps,
        update=is_compiling() or torch._C._current_graph_task_id() == -1,
    )
    return y
