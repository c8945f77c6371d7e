"""Calls like an earlier one: what the shape, strides and dtype of their arrays decide has been decided.

Of a call of a few microseconds, finding the same answers again would be the larger part.
"""

import math
from typing import Any

import numpy as np

from nbbn.layout import Sizes
from nbbn.plan import Plan
from nbbn.runtime import buffers, entry_point
from nbbn.variables import Array, Shapes


class Repeat:
    """A training or inference step on C-contiguous inputs of one shape and dtype, without other operands.

    shapes: those of the variables that the first call had; the step may be repeated with these alone.
    """

    __slots__ = (
        "_after",
        "_before",
        "_carrier",
        "_dtype",
        "_empty",
        "_hyper",
        "_run",
        "_shape",
        "_statistics",
        "_view",
        "shapes",
    )

    def __init__(
        self,
        plan: Plan,
        shape: Sizes,
        shapes: Shapes,
        statistics: int,
        flags: tuple[bool | None, ...],
        hyper: Array,
    ) -> None:
        self.shapes = shapes
        self._shape, self._dtype, self._statistics, self._hyper = shape, plan.dtype, statistics, hyper
        self._before = (None,) * (4 if plan.step == "train" else 1)  # residual, weights and both of an adjustment
        self._after = *flags, plan.schedule.grid
        self._view = plan.schedule.shape
        self._carrier = plan.carrier
        size = plan.dtype.itemsize * math.prod(shape)
        self._empty = buffers.empty if size >= buffers.SMALLEST else np.empty
        self._run = plan.run if plan.parallel else entry_point(plan.kernel(False))

    def takes(self, out: Any, x: Array) -> bool:
        """Whether `out` may be given to this step on `x`; if not, somebody else has to find out why."""
        if type(out) is not np.ndarray or out.shape != self._shape or out.dtype != self._dtype:
            return False
        flags = out.flags
        fits: bool = flags.c_contiguous and flags.writeable and flags.aligned
        return fits and not np.may_share_memory(out, x)

    def infer(self, x: Array, out: Array | None, params: Array, state: Array) -> Array:
        return self._step(x, out, params, state, self._hyper)

    def train(self, x: Array, out: Array | None, params: Array, state: Array) -> tuple[Array, Array]:
        """The output and the new state."""
        new_state, saved = np.empty(state.shape, state.dtype), np.empty((5, self._statistics))
        return self._step(x, out, params, state, self._hyper, new_state, saved), new_state

    def _step(self, x: Array, out: Array | None, *rest: Array) -> Array:
        y = self._empty(self._shape, self._dtype) if out is None else out
        source, target = x, y
        if self._carrier is not None:
            source, target = x.view(self._carrier), y.view(self._carrier)
        self._run(source.reshape(self._view), *self._before, target.reshape(self._view), *self._after, *rest)
        return y
