"""Training calls by Keras's backend of PyTorch, also under torch.compile."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from nbbn.core.layout import Sizes, steps_dimension
from nbbn.keras.asked import Beside, checked_numbers, fixed
from nbbn.keras.torch_quick import as_known_text, train_at_once
from nbbn.torch import calls
from nbbn.torch.settings import as_text
from nbbn.torch.tensors import align

_of_program = torch._C._dynamo.eval_frame.get_eval_frame_callback
Change = Callable[[Tensor], Tensor]


def train(layer: Any, x: Tensor, beside: Beside) -> Tensor:
    """The output; the moving statistics are assigned."""
    # A program may be compiled, and this part of it not: then its frames would be looked at one by one.
    if not is_compiling() and _of_program() is None and (y := train_at_once(layer, x, beside)) is not None:
        return y
    variables, kept = layer.state, layer.kept(x.dim())
    axis, merged, parted = (kept[0], _same, _same) if len(kept) == 1 else (-1, *_merging(x.shape, kept))
    equal, given = layer.momentum is None, checked_numbers(layer)
    options = fixed(layer) | {"debias": layer.debias or equal}
    epsilon = options.pop("epsilon")
    own, mask = merged(x), _weights(beside, x, kept)
    if mask is not None:
        mask = align(merged(mask) if mask.dim() == x.dim() else mask, own, axis)
    a, b = (None if t is None else merged(t) for t in calls.adjustment_of(beside.adjustment, x))
    gamma, beta = (None if v is None else v.value.reshape(-1) for v in (layer.gamma, layer.beta))
    old = [v.value.detach().reshape(-1) for v in variables]
    state, number = _with_shares(old) if equal else ([t.clone() for t in old], None)
    update = is_compiling() or torch._C._current_graph_task_id() == -1  # else it is computed again, for a gradient
    y, _ = calls.train(
        own,
        gamma,
        beta,
        None if beside.residual is None else merged(beside.residual),
        (mask, a, b),
        state,
        None if number is None else number.clone(),  # it is counted up
        [given.momentum or 0.0, *given[1:]],
        (as_text if is_compiling() else as_known_text)(axis, **options),
        epsilon,
        update=update,
        equal=equal,
    )
    if update:
        new_state = state if number is None else _with_counts(state, old, number)
        for variable, value in zip(variables, new_state, strict=True):
            variable.assign(value.reshape(variable.shape))
    return parted(y)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _merging(shape: Sizes, kept: Sizes) -> tuple[Change, Change]:
    """Several feature axes as one, which comes last; and back."""
    order = (*(i for i in range(len(shape)) if i not in kept), *kept)
    back = [order.index(i) for i in range(len(shape))]
    ordered = [shape[i] for i in order]
    sizes = *ordered[: -len(kept)], math.prod(ordered[-len(kept) :])

    def merged(tensor: Tensor) -> Tensor:
        return tensor.expand(shape).permute(order).reshape(sizes)

    def parted(tensor: Tensor) -> Tensor:
        return tensor.reshape(ordered).permute(back)

    return merged, parted


def _weights(beside: Beside, x: Tensor, kept: Sizes) -> Tensor | None:
    """The mask, or the one that lengths stand for. Raises: TypeError, ValueError for other lengths."""
    lengths = beside.lengths
    if lengths is None:
        return beside.mask
    steps = steps_dimension(tuple(i in kept for i in range(x.dim())))
    if lengths.is_floating_point() or lengths.dtype is torch.bool or lengths.shape != x.shape[:1]:
        raise ValueError(
            f"lengths must be integers of shape {tuple(x.shape[:1])}, one for each sample; received "
            f"{lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    if not is_compiling() and lengths.numel():  # whose values a program does not look at
        least, most = int(lengths.min()), int(lengths.max())
        if not 0 <= least <= most <= x.shape[steps]:
            raise ValueError(
                f"lengths must be from 0 to {x.shape[steps]}, the size of dimension {steps} of the input; received "
                f"values from {least} to {most}"
            )
    found = torch.arange(x.shape[steps], device=x.device) < lengths[:, None]
    return found.reshape([n if i in (0, steps) else 1 for i, n in enumerate(x.shape)])


def _with_shares(state: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The state as the operator takes it where all batches weigh the same, and a number: in the place of the counts are
    their shares of it. It is more than twice any count, so that a batch more makes a share larger."""
    number = 2 * torch.stack(state[-2:]).max().to(torch.int64) + 2
    return [*(t.clone() for t in state[:-2]), *(t / number for t in state[-2:])], number


def _with_counts(state: list[Tensor], old: list[Tensor], number: Tensor) -> list[Tensor]:
    """The new state with counts again: of a channel that the batch has not reached the share is as it was."""
    shares = zip(state[-2:], old[-2:], strict=True)
    return [*state[:-2], *(torch.where(new > count / number, count + 1, count) for new, count in shares)]
