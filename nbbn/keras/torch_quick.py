"""Training calls like earlier ones by Keras's backend of PyTorch: a step that is kept, on the variables' memory."""

import contextlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from keras.src.backend import in_stateless_scope  # Keras exports the scope, but not whether one is there
from torch import Tensor
from torch.autograd import forward_ad

from nbbn.core.options import Numbers
from nbbn.keras.asked import Beside, checked_numbers, fixed
from nbbn.torch import quick
from nbbn.torch.past import Past
from nbbn.torch.settings import as_text
from nbbn.torch.tensors import DTYPES, MaybeTensor

MAX_STEPS = 256  # geometries that a layer remembers
as_known_text = lru_cache(maxsize=256)(as_text)


class _Kept:
    """The steps of a layer, and its variables as they take them."""

    def __init__(self) -> None:
        self.steps: dict[Any, quick.Step | None] = {}
        self.views: quick.Views | None = None
        self.past = Past()
        self._missing: dict[float, Tensor] = {}

    def full(self, gamma: MaybeTensor, beta: MaybeTensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """gamma and beta, or what stands for them. It is kept, because views of memory do not keep it."""
        return (
            gamma if gamma is not None else self._missing.setdefault(1.0, torch.ones_like(like)),
            beta if beta is not None else self._missing.setdefault(0.0, torch.zeros_like(like)),
        )

    def views_of(self, tensors: Sequence[MaybeTensor], step: quick.Step) -> quick.Views | None:
        """Those of the last call, if all lies where it lay; None where a step cannot use the memory."""
        views = self.views
        if views is None or views.params.dtype != step.statistic or views.where != quick.where(tensors):
            try:
                views = self.views = quick.Views(tensors, step)
            except ValueError:
                return None
        return views


_kept: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()


def train_at_once(layer: Any, x: Tensor, beside: Beside) -> Tensor | None:
    """The output, and the moving statistics changed in their place; None where that takes more than one step."""
    if not (_is_simple(layer, beside) and _is_memory(x) and _nothing_watches()):
        return None
    residual, stride = beside.residual, x.stride()
    if residual is not None and not (_is_memory(residual) and residual.stride() == stride):
        return None
    known = _kept.get(layer)
    if known is None:
        known = _kept[layer] = _Kept()
    numbers = checked_numbers(layer)
    key = residual is not None, x.shape, x.dtype, stride, numbers, *fixed(layer).values()
    step = known.steps[key] if key in known.steps else _prepare(known, key, layer, x, numbers)
    if step is None:
        return None
    gamma, beta = (None if v is None else v.value for v in (layer.gamma, layer.beta))
    state = [v.value for v in layer.state]
    views = known.views_of((*known.full(gamma, beta, state[0]), None, *state), step)
    if views is None:
        return None
    update = torch._C._current_graph_task_id() == -1  # else it is computed again, for a gradient
    y: Tensor = quick.BatchNorm.apply(
        x, gamma, beta, residual, step, views, update, known.past if layer.renorm else None
    )
    if update:
        views.count_one()
    return y


def _is_simple(layer: Any, beside: Beside) -> bool:
    """Whether one step does all, always the same, and there is nothing but a residual beside the input."""
    if beside.mask is not None or beside.lengths is not None or beside.adjustment is not None:
        return False
    if layer.momentum is None or callable(layer.momentum) or not isinstance(layer.axis, int):
        return False
    bounds = layer.renorm_clipping or {}
    return not (layer.renorm and (callable(layer.renorm_momentum) or any(map(callable, bounds.values()))))


def _is_memory(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.is_cpu and not tensor.is_neg()


def _nothing_watches() -> bool:
    """Whether the variables may change in their place, and no mode or transformation has to see operators."""
    if in_stateless_scope() or forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None:
        return False
    return not (torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())


def _prepare(known: _Kept, key: Any, layer: Any, x: Tensor, numbers: Numbers) -> quick.Step | None:
    """The step for calls like this one, kept; None where they need more than a step."""
    options, step = fixed(layer), None
    epsilon = options.pop("epsilon")
    if x.dtype in DTYPES:
        text = as_known_text(layer.axis, **options)
        with contextlib.suppress(ValueError):
            step = quick.Step(x, True, key[0], [n or 0.0 for n in numbers], text, epsilon)
    if len(known.steps) >= MAX_STEPS:
        known.steps.clear()
    known.steps[key] = step
    return step
