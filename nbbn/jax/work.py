"""What a platform is asked to run: one step, with what it reads and writes."""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.lib.stride_tricks import as_strided

from nbbn.core.layout import Layout, Sizes, contiguous_strides
from nbbn.engine.base import Step
from nbbn.engine.dispatcher import Dispatcher
from nbbn.kernels.cpu.compiling import ARGUMENTS, names_of

Arrays = Mapping[str, Any]  # by the names of a kernel's arguments; a tuple stands for rows
Shape = jax.ShapeDtypeStruct


class Work(NamedTuple):
    """One step. lay: None where it has small arrays only. adjusted: see Engine.finish()."""

    name: str
    dispatcher: Dispatcher
    lay: Layout | None = None
    adjusted: bool = False

    def step(self, arrays: Arrays) -> Step:
        """The step on these arrays."""
        assert self.lay is not None
        names = _views_of(self.name)
        numbers = {n: a for n, a in arrays.items() if n not in names}
        return Step(self.name, self.lay, {n: arrays.get(n) for n in names}, numbers)


@cache
def _views_of(step: str) -> tuple[str, ...]:
    """The arrays of the input's shape, the input first."""
    return "x", *(n for n in names_of(step) if is_view(n) and n != "x")


def is_view(name: str) -> bool:
    """Whether an argument is an array of the input's shape."""
    return ARGUMENTS[name] in ("X", "S")


def views_without_memory(arrays: Arrays, shape: Sizes) -> dict[str, np.ndarray]:
    """The arrays of this shape for a plan to look at: dense, or repeating their values to get it."""
    return {name: _fake(a, shape) for name, a in arrays.items() if is_view(name)}


def _fake(array: Any, shape: Sizes) -> np.ndarray:
    dtype = np.dtype(array.dtype)
    own = as_strided(np.empty(1, dtype), array.shape, contiguous_strides(array.shape, dtype.itemsize))
    return own if array.shape == shape else np.broadcast_to(own, shape)
