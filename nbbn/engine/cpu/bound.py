"""A step with everything decided that the geometry of its arrays decides.

Of a call of a few microseconds, finding the same answers again would be the larger part.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from nbbn.core.layout import Sizes, order_in_memory
from nbbn.engine.base import Step
from nbbn.engine.cpu.plan import Plan
from nbbn.kernels.channel import SAVED_ROWS
from nbbn.runtime import buffers

Array = np.ndarray


# By the name of a step: the arguments that differ between its calls, in their order.
LAST_ARGUMENTS = {
    "infer": ("residual", "x", "y", "params", "state"),
    "train": ("residual", "x", "y", "params", "state", "new_state", "saved"),
    "backward": ("dz", "residual", "x", "dy", "dx", "saved", "dparams"),
}


def _overlap(a: Array, a_owns: bool, b: Array, b_owns: bool) -> bool:
    """Whether arrays may share memory. Two that own theirs do not: to ask NumPy costs 5 us where caches are cold."""
    return a is b if a_owns and b_owns else np.may_share_memory(a, b)


class BoundStep:
    """A step on C-contiguous arrays of one shape and dtype, beside which there is nothing but a residual and weights.

    owner: the variables that it is for. All else is as in nbbn.engine.base.BoundStep.
    """

    __slots__ = (
        *("_dtype", "_empty", "_owner", "_params_dtype", "_params_shape", "_run", "_saved_shape", "_shape"),
        *("_state_shape", "_view", "_writes_dz", "gradient", "mask_shape"),
    )

    def __init__(self, plan: Plan, step: Step, owner: Any, mask_shape: Sizes | None = None) -> None:
        self._shape, self._dtype = step.x.shape, plan.dtype
        self._saved_shape = SAVED_ROWS, step.lay.statistics
        self._owner, self._state_shape = owner, owner.state.shape
        self._params_shape, self._params_dtype = owner.params.shape, owner.params.dtype
        self._empty = buffers.empty if step.x.nbytes >= buffers.SMALLEST else np.empty
        self._view = None if mask_shape is None else plan.view_of_weights()
        operands = () if mask_shape is None else ("weights", "a", "b")
        self._run = plan.bind(step.numbers, (*operands, *LAST_ARGUMENTS[step.name]))
        self._writes_dz = step.views.get("dz") is not None
        self.mask_shape = mask_shape
        self.gradient: BoundStep | None = None

    def fits(self, owner: Any, x: Array, out: Any, residual: Any, dy: Any = None) -> bool:
        flags = x.flags
        if owner is not self._owner or not (flags.c_contiguous and flags.aligned):
            return False
        if dy is not None and not self._is_like_input(dy):
            return False
        if residual is not None and not self._is_like_input(residual):
            return False
        if out is None:
            return True
        if not self._has_geometry(out):
            return False
        given = out.flags
        owned = given.owndata
        # `carray` says at once that memory is contiguous, aligned and writable
        if not given.carray or _overlap(out, owned, x, flags.owndata):
            return False
        if dy is not None and _overlap(out, owned, dy, dy.flags.owndata):
            return False
        return residual is None or not _overlap(out, owned, residual, residual.flags.owndata)

    def _has_geometry(self, array: Any) -> bool:
        if type(array) is not np.ndarray or array.shape != self._shape:
            return False
        dtype = array.dtype
        return dtype is self._dtype or dtype == self._dtype

    def _is_like_input(self, array: Any) -> bool:
        if not self._has_geometry(array):
            return False
        flags = array.flags
        return bool(flags.c_contiguous and flags.aligned)

    def _beside(self, weights: Array) -> Callable[..., None]:
        """The step as a function of its last arguments. weights: as operands.own_weights() makes them."""
        assert self._view is not None, "the step is for inputs without weights"
        return partial(self._run, self._view(weights), None, None)

    def infer(self, x: Array, residual: Array | None, out: Array | None, params: Array, state: Array) -> Array:
        y = self._empty(self._shape, self._dtype) if out is None else out
        self._run(residual, x, y, params, state)
        return y

    def train(
        self,
        x: Array,
        residual: Array | None,
        out: Array | None,
        params: Array,
        state: Array,
        weights: Array | None,
        new_state: Array | None,
    ) -> tuple[Array, Array, Array]:
        y = self._empty(self._shape, self._dtype) if out is None else out
        saved = np.empty(self._saved_shape)
        if new_state is None:
            new_state = np.empty(self._state_shape, state.dtype)
        run = self._run if weights is None else self._beside(weights)
        run(residual, x, y, params, state, new_state, saved)
        return y, new_state, saved

    def backward(
        self, dy: Array, x: Array, residual: Array | None, out: Array | None, saved: Array, weights: Array | None
    ) -> tuple[Array, Array, Array | None]:
        dx = self._empty(self._shape, self._dtype) if out is None else out
        # np.empty_like() goes through NumPy's dispatch of functions.
        dparams = np.empty(self._params_shape, self._params_dtype)
        run = self._run if weights is None else self._beside(weights)
        if residual is None:
            run(None, None, x, dy, dx, saved, dparams)
            return dx, dparams, None
        dz = np.empty_like(x) if self._writes_dz else dy.copy(order="K")
        run(dz if self._writes_dz else None, residual, x, dy, dx, saved, dparams)
        return dx, dparams, dz


class StridedStep(BoundStep):
    """The same on an input that lies in another way, with gaps or with its dimensions in another order, beside arrays
    that lie as results do."""

    __slots__ = ("_of_results",)

    def __init__(self, plan: Plan, step: Step, owner: Any, mask_shape: Sizes | None = None) -> None:
        super().__init__(plan, step, owner, mask_shape)
        names, run, empty = LAST_ARGUMENTS[step.name], self._run, self._empty
        result: Any = step.views["dx" if step.name == "backward" else "y"]
        order, back = order_in_memory(step.x.shape, step.x.strides, step.x.itemsize)
        ordered = tuple(self._shape[i] for i in order)
        self._of_results = result.strides
        self._empty = lambda shape, dtype: empty(ordered, dtype).transpose(back)
        if not plan.contiguous:
            views = [plan.view_of(n) if n in plan.strides else None for n in names]
            self._run = lambda *given: run(*[a if v is None else v(a) for v, a in zip(views, given, strict=True)])

    def fits(self, owner: Any, x: Array, out: Any, residual: Any, dy: Any = None) -> bool:
        """As for a BoundStep, on `x` that has its strides, too."""
        if owner is not self._owner or not x.flags.aligned:
            return False
        beside = [a for a in (dy, residual) if a is not None]
        if not all(map(self._is_like_result, beside)):
            return False
        if out is None:
            return True
        fitting = self._is_like_result(out) and out.flags.writeable
        return fitting and not any(np.may_share_memory(out, a) for a in (x, *beside))

    def _is_like_result(self, array: Any) -> bool:
        return self._has_geometry(array) and array.strides == self._of_results and array.flags.aligned
