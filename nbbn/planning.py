"""Which kernels a layer's calls need, found out without running or compiling any."""

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from nbbn import dtypes
from nbbn.dispatcher import Dispatcher, Flags
from nbbn.layers import BatchNormalization
from nbbn.layout import Layout, Sizes
from nbbn.operands import Array
from nbbn.variables import STATISTICS, Variables

Kernel = tuple[Any, ...]  # the arguments of steps.compiled()
Kernels = dict[Kernel, bool]  # in the order in which calls need them; whether they are parallel


def kernels(
    layer: BatchNormalization,
    shape: Sequence[int],
    *,
    dtype: Any = "float32",
    training: bool = False,
    gradients: bool = False,
    mask: Any = None,
    residual: bool = False,
) -> Kernels:
    """The kernels of `layer(x, training)`, with `gradients` also those of the pullback of `layer.vjp(x, training)`.

    The call is the layer's own, of a copy that has a Dispatcher which runs nothing. The arguments are those of
    nbbn.warmup().
    """
    dtype = layer.options.dtype or dtypes.resolve(dtype)
    sizes = _sizes(shape)
    x, dy, other = (np.empty(sizes, dtype) for _ in range(3))  # address space: nobody reads or writes them
    twin, planner = copy.copy(layer), _Planner(layer._dispatcher)
    twin._dispatcher = planner
    if twin._variables is None:
        shapes = twin._check_input(x)
        # Without a call of the layer's initializers; no kernel depends on how many statistics there are.
        twin._variables = Variables(shapes, dict.fromkeys(STATISTICS, np.ones(shapes.params, shapes.dtype)))
    # NumPy meets whatever is in statistics that nobody has computed.
    with np.errstate(all="ignore"), contextlib.suppress(_Planned):
        _, pullback = twin.vjp(x, training, mask, update_statistics=False, residual=other if residual else None)
        if gradients:
            adjusted = layer.adjustment is not None and layer._uses_batch(training)
            planner.last = ("infer",) if adjusted else ("backward", "frozen_backward")
            pullback(dy)
    return planner.kernels


class _Planned(Exception):
    """All kernels of a call are known: what NumPy would do with their results is not wanted."""


class _Planner(Dispatcher):
    """Notes the kernels of the steps that it is told to run, and runs none."""

    def __init__(self, original: Dispatcher) -> None:
        super().__init__(original.options, original.force)
        self.kernels: Kernels = {}
        self.last: Sequence[str] = ()  # the steps after which _Planned is raised

    def remember(self, *args: Any) -> None:
        """Nothing has run."""

    def _run(
        self,
        step: str,
        lay: Layout,
        elements: list[Array | None],
        operands: list[Array | None],
        outputs: list[Array | None],
        flags: Flags,
        *rest: Any,
    ) -> None:
        plan = self.plan(step, lay, elements, operands, outputs, flags)
        twins = (False, True) if plan.parallel else (False,)  # the serial one runs where the pool is taken
        self.kernels |= {plan.variant(parallel): parallel for parallel in twins}
        if step in self.last:
            raise _Planned


def _sizes(shape: Any) -> Sizes:
    if not isinstance(shape, Sequence) or not all(isinstance(n, (int, np.integer)) and n > 0 for n in shape):
        raise ValueError(f"a shape must be a tuple of positive integers; received {shape!r}")
    return tuple(int(n) for n in shape)
