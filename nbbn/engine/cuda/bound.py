"""A step with everything decided that the geometry of its arrays decides.

Of a small call on a GPU, what Python does before the driver is asked is the larger part.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from nbbn.arrays.device import DeviceArray, wrap
from nbbn.core.layout import Sizes, contiguous_strides
from nbbn.engine.base import Step
from nbbn.engine.cuda.plan import ALIGNMENT, Plan
from nbbn.kernels.channel import SAVED_ROWS

Array = DeviceArray
_FLOAT64, _BYTES = np.dtype(np.float64), np.dtype(np.uint8)


class BoundStep:
    """A step on arrays of one shape, dtype and memory layout, beside which there is nothing but a residual. Their
    elements lie side by side, so results lie as the input does, whichever library makes them.

    owner: the variables that it is for. hyper: the numbers that the middle stage reads; None for a gradient, which has
    none. All else is as in nbbn.engine.base.BoundStep.
    """

    __slots__ = (
        *("_bytes", "_coefficients", "_counters", "_device", "_dtype", "_hyper", "_library", "_owner", "_params"),
        *("_plan", "_saved", "_scratch_shape", "_shape", "_state", "_strides", "_writes_dz", "gradient", "mask_shape"),
    )

    def __init__(self, plan: Plan, step: Step, owner: Any, hyper: Array | None) -> None:
        x = step.x
        self._plan, self._owner = plan, owner
        self._hyper: Any = hyper
        self._shape, self._dtype, self._strides = x.shape, x.dtype, x.strides
        self._library, self._device = x.library, x.device
        self._writes_dz = step.views.get("dz") is not None
        self._bytes = x.size * x.itemsize
        self._saved = _Kind.of((SAVED_ROWS, step.lay.statistics), _FLOAT64)
        self._state, self._params = (_Kind.of(a.shape, a.dtype) for a in (owner.state, owner.params))
        scratch = plan.scratch
        self._scratch_shape = (0 if scratch is None else scratch.size,)
        parts = {} if scratch is None else scratch.parts
        self._counters, self._coefficients = parts.get("counters", 0), parts.get("coefficients", 0)
        self.mask_shape: Sizes | None = None
        self.gradient: Any = None

    def fits(self, owner: Any, x: Array, out: Any, residual: Any, dy: Any = None) -> bool:
        if owner is not self._owner or x.address % ALIGNMENT:
            return False
        if dy is not None and not self._is_like_input(dy):
            return False
        if residual is not None and not self._is_like_input(residual):
            return False
        if out is None:
            return True
        if not (self._is_like_input(out) and out.library.is_writable(out.owner)):
            return False
        # Elements lie side by side: arrays of this geometry overlap if they begin nearer than one is long.
        return not any(a is not None and abs(out.address - a.address) < self._bytes for a in (x, dy, residual))

    def _is_like_input(self, array: Any) -> bool:
        if type(array) is not DeviceArray or array.address % ALIGNMENT or array.device != self._device:
            return False
        same = array.shape == self._shape and array.strides == self._strides
        return same and (array.dtype is self._dtype or array.dtype == self._dtype)

    def infer(self, x: Array, residual: Array | None, out: Array | None, params: Array, state: Array) -> Any:
        y, address = self._result(x, out)
        memory = (0, 0, params.address, state.address, self._hyper.address, 0, 0, 0, 0, 0, 0)
        self._queue(_views(residual, x=x.address, y=address), memory)
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
    ) -> tuple[Any, Array, Array]:
        y, address = self._result(x, out)
        saved = self._new(self._saved)
        target = self._new(self._state) if new_state is None else new_state
        made = target.address, saved.address, saved.address
        given = params.address, state.address, self._hyper.address, *made
        self._with_scratch(_views(residual, x=x.address, y=address), given, 0)
        return y, target, saved

    def backward(
        self, dy: Array, x: Array, residual: Array | None, out: Array | None, saved: Array, weights: Array | None
    ) -> tuple[Array, Array, Array | None]:
        dx = self._like(x) if out is None else out
        dparams, dz = self._new(self._params), None
        views = _views(residual, x=x.address, dy=dy.address, dx=dx.address)
        if residual is not None and self._writes_dz:
            dz = self._like(x)
            views["dz"] = dz.address
        self._with_scratch(views, (0, 0, 0, 0, saved.address, saved.address), dparams.address)
        if residual is not None and dz is None:
            dz = wrap(dy.library.astype(dy.owner, dy.dtype), dy.library)
        return dx, dparams, dz

    def _with_scratch(self, views: dict[str, int], given: Sequence[int], dparams: int) -> None:
        """given: the addresses from the parameters to saved."""
        scratch = self._library.empty(self._scratch_shape, _BYTES, self._device)
        first = self._library.address(scratch)
        self._queue(views, (first, first + self._counters, *given, first + self._coefficients, 0, dparams))
        del scratch  # not before the launches are queued

    def _queue(self, views: dict[str, int], memory: Sequence[int]) -> None:
        library, device = self._library, self._device
        self._plan.queue(library.stream(device), views, memory)
        library.finish(device)

    def _result(self, x: Array, out: Array | None) -> tuple[Any, int]:
        """An array of the library for the output, and its address."""
        if out is not None:
            return out.owner, out.address
        y = self._library.empty_like(x.owner)
        return y, self._library.address(y)

    def _like(self, x: Array) -> Array:
        made, address = self._result(x, None)
        return DeviceArray(made, self._library, address, self._shape, self._strides, self._dtype, self._device)

    def _new(self, kind: "_Kind") -> Array:
        made, library = self._library.empty(kind.shape, kind.dtype, self._device), self._library
        return DeviceArray(made, library, library.address(made), *kind, self._device)


class _Kind(NamedTuple):
    """Of small arrays that are made in each call."""

    shape: Sizes
    strides: Sizes
    dtype: np.dtype

    @classmethod
    def of(cls, shape: Sizes, dtype: np.dtype) -> Self:
        return cls(shape, contiguous_strides(shape, dtype.itemsize), dtype)


def _views(residual: Array | None, **addresses: int) -> dict[str, int]:
    if residual is not None:
        addresses["residual"] = residual.address
    return addresses
