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
    """A step (infer, train, backward) on C-contiguous arrays of one shape and dtype, without other operands.

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
        before: tuple[Any, ...],
        after: tuple[Any, ...],
        hyper: Array,
    ) -> None:
        """before, after: what the kernel takes before its output, but for the inputs, and after it."""
        self.shapes = shapes
        self._shape, self._dtype, self._statistics = shape, plan.dtype, statistics
        self._before, self._after, self._hyper = before, after, hyper
        self._view, self._carrier = plan.schedule.shape, plan.carrier
        size = plan.dtype.itemsize * math.prod(shape)
        self._empty = buffers.empty if size >= buffers.SMALLEST else np.empty
        self._run = plan.run if plan.parallel else entry_point(plan.kernel(False))

    def takes(self, out: Any, *inputs: Array) -> bool:
        """Whether `out` may be given to this step on the inputs; if not, somebody else has to find out why."""
        if type(out) is not np.ndarray or out.shape != self._shape or out.dtype != self._dtype:
            return False
        flags = out.flags
        fits: bool = flags.c_contiguous and flags.writeable and flags.aligned
        return fits and not any(np.may_share_memory(out, x) for x in inputs)

    def infer(self, x: Array, out: Array | None, params: Array, state: Array) -> Array:
        return self._step(x, self._before, out, params, state, self._hyper)

    def train(self, x: Array, out: Array | None, params: Array, state: Array) -> tuple[Array, Array]:
        """The output and the new state."""
        new_state, saved = np.empty(state.shape, state.dtype), np.empty((5, self._statistics))
        return self._step(x, self._before, out, params, state, self._hyper, new_state, saved), new_state

    def backward(self, dy: Array, x: Array, out: Array | None, params: Array, saved: Array) -> tuple[Array, Array]:
        """The gradients of x, and of gamma and beta as one (2, C) array. dy is like x."""
        dparams = np.empty(params.shape, params.dtype)
        return self._step(x, (self._viewed(dy), *self._before), out, params, saved, dparams), dparams

    def _step(self, x: Array, before: tuple[Any, ...], out: Array | None, *rest: Array) -> Array:
        y = self._empty(self._shape, self._dtype) if out is None else out
        self._run(self._viewed(x), *before, self._viewed(y), *self._after, *rest)
        return y

    def _viewed(self, array: Array) -> Array:
        """As the kernel takes it."""
        return (array if self._carrier is None else array.view(self._carrier)).reshape(self._view)
