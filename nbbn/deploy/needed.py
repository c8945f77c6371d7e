"""Which kernels a layer's calls need, found out without running or compiling any."""

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nbbn.core import dtypes
from nbbn.core.layout import Sizes
from nbbn.engine.base import Step
from nbbn.engine.cpu.engine import CpuEngine
from nbbn.engine.cpu.moments import MERGE
from nbbn.engine.cpu.plan import Plan
from nbbn.engine.dispatcher import Dispatcher
from nbbn.layer.layer import BatchNormalization
from nbbn.state.shapes import derive_shapes
from nbbn.state.variables import Variables, state_names

Kernel = tuple[Any, ...]  # the arguments of steps.compiled()
Kernels = dict[Kernel, None]  # in the order in which calls need them


def kernels(
    layer: BatchNormalization,
    shape: Sequence[int],
    *,
    dtype: Any = "float32",
    training: bool = False,
    gradients: bool = False,
    mask: Any = None,
    residual: bool = False,
    lengths: Any = None,
) -> Kernels:
    """The kernels of `layer(x, training)`, with `gradients` also those of the pullback of `layer.vjp(x, training)`.

    The call is the layer's own, of a copy that has an engine which runs nothing. The arguments are those of
    nbbn.warmup(). Where others share the statistics it is both halves of the call, without what goes to them.
    """
    dtype = layer.options.dtype or dtypes.resolve(dtype)
    if not isinstance(shape, Sequence) or not all(isinstance(n, (int, np.integer)) and n > 0 for n in shape):
        raise ValueError(f"a shape must be a tuple of positive integers; received {shape!r}")
    x, dy, other = (np.empty(shape, dtype) for _ in range(3))  # address space: nobody reads or writes them
    original = layer._dispatcher
    twin, notes = copy.copy(layer), _Notes(original)
    # No kernel depends on numbers: a schedule is not asked for them.
    momentum = None if original.options.momentum is None else 0.0
    options = replace(original.options, momentum=momentum, renorm_momentum=0.0, renorm_clipping=None)
    twin._dispatcher = Dispatcher(options, original.force)
    twin._dispatcher.use(notes)
    if twin._variables is None:
        shapes = derive_shapes(twin.options, x.shape, x.dtype)
        # Without a call of the layer's initializers.
        names = state_names(twin.options.renorm, twin.options.is_debiased)
        twin._variables = Variables(shapes, dict.fromkeys(names, np.ones(shapes.params, shapes.dtype)))
    # NumPy meets whatever is in statistics that nobody has computed.
    with np.errstate(all="ignore"), contextlib.suppress(_Known):
        beside = other if residual else None
        operands = {"mask": mask, "lengths": lengths, "residual": beside, "update_statistics": False}
        if twin._in_halves and twin._uses_batch(training):
            step = twin.start(x, **operands)
            notes.kernels[MERGE] = None
            step.complete(step.moments)
            if gradients:
                notes.last = ("apply_gradient",)
                step.pulled(step.pull(dy)[np.newaxis])
        elif gradients:
            _, pullback = twin.vjp(x, training, **operands)
            notes.last = ("backward", "frozen_backward")
            pullback(dy)
        else:
            twin(x, training, **operands)
    return notes.kernels


class _Known(Exception):
    """All kernels of a call are known: what NumPy would do with their results is not wanted."""


class _Notes(CpuEngine):
    """Notes the kernels of the steps that it is told to run, and runs none."""

    def __init__(self, original: Dispatcher) -> None:
        super().__init__(original.options, original.force)
        self.kernels: Kernels = {}
        self.last: Sequence[str] = ()  # the steps after which _Known is raised

    def bind(self, step: Step, owner: Any, mask_shape: Sizes | None) -> None:
        """Bind nothing: the step has not run."""

    def apply_gradient(self, *arguments: Any) -> tuple[np.ndarray, np.ndarray | None]:
        found = super().apply_gradient(*arguments)
        if "apply_gradient" in self.last:  # of all parts of a virtual batch
            raise _Known
        return found

    def _launch(self, plan: Plan, step: Step) -> None:
        self.kernels[plan.variant()] = None
        if step.name in self.last and step.name != "apply_gradient":
            raise _Known

    def _run_middle(self, name: str, numbers: dict[str, Any], adjusted: bool) -> None:
        variant, _ = self.middle(name, numbers, adjusted)
        self.kernels[variant] = None
