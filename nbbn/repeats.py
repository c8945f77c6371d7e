"""Calls like an earlier one: what the shape, strides and dtype of their arrays decide has been decided.

Of a call of a few microseconds, finding the same answers again would be the larger part.
"""

import math
from collections.abc import Callable
from operator import methodcaller
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

    __slots__ = ("_after", "_dtype", "_empty", "_hyper", "_run", "_shape", "_statistics", "_viewed", "shapes")

    def __init__(
        self, plan: Plan, shape: Sizes, shapes: Shapes, statistics: int, flags: tuple[bool | None, ...], hyper: Array
    ) -> None:
        self.shapes = shapes
        self._shape, self._dtype, self._statistics = shape, plan.dtype, statistics
        self._after, self._hyper = (*flags, plan.schedule.grid), hyper
        self._viewed = _view_of(plan)
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

    # None stands for the operands of the kernel that are not there: see steps.py.

    def infer(self, x: Array, out: Array | None, params: Array, state: Array) -> Array:
        y = self._empty(self._shape, self._dtype) if out is None else out
        self._run(self._viewed(x), None, self._viewed(y), *self._after, params, state, self._hyper)
        return y

    def train(self, x: Array, out: Array | None, params: Array, state: Array) -> tuple[Array, Array]:
        """The output and the new state."""
        y = self._empty(self._shape, self._dtype) if out is None else out
        new_state, saved = np.empty(state.shape, state.dtype), np.empty((5, self._statistics))
        self._run(
            self._viewed(x),
            None,
            None,
            None,
            None,
            self._viewed(y),
            *self._after,
            params,
            state,
            self._hyper,
            new_state,
            saved,
        )
        return y, new_state

    def backward(self, dy: Array, x: Array, out: Array | None, params: Array, saved: Array) -> tuple[Array, Array]:
        """The gradients of x, and of gamma and beta as one (2, C) array. dy is like x."""
        dx = self._empty(self._shape, self._dtype) if out is None else out
        dparams, views = np.empty(params.shape, params.dtype), (self._viewed(x), self._viewed(dy))
        self._run(*views, None, None, None, None, self._viewed(dx), None, *self._after, params, saved, dparams)
        return dx, dparams


def _view_of(plan: Plan) -> Callable[[Array], Array]:
    """What makes of a C-contiguous array the view that the kernel takes."""
    view, carrier = plan.schedule.shape, plan.carrier
    if carrier is None:
        return methodcaller("reshape", view)
    return lambda array: array.view(carrier).reshape(view)
