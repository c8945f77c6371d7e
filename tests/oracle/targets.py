"""The machines that run the stages, behind one face: all that tests/test_kernels.py knows of them.

A target takes and returns NumPy arrays. Its methods are the Dispatcher's, with every choice made by hand.
"""

import os
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from nbbn import Dispatcher, Force, Options, dtypes
from nbbn.kernels.cpu.memory import STREAMED
from nbbn.kernels.cpu.scalars import load, store
from nbbn.kernels.tasks import STORE

Array = NDArray[Any]


class Cpu:
    """nbbn/kernels/cpu."""

    def __init__(
        self,
        options: dict[str, Any],
        schedule: str | None = None,
        parallel: bool | None = None,
        one_pass: bool | None = None,
    ) -> None:
        self.dispatcher = Dispatcher(Options(**options), Force(schedule, parallel, one_pass))

    def train(self, x: Array, params: Array, state: Array, **operands: Any) -> tuple[Array, Array, Array]:
        """y, the new state and saved; operands are residual, weights, adjustment (a pair) and out."""
        hyper = self.dispatcher.hyper(x.ndim, x.dtype)
        return self.dispatcher.train(x, params, state, hyper, **operands)

    def infer(self, x: Array, params: Array, state: Array, **operands: Any) -> Array:
        """y; operands are residual and out."""
        return self.dispatcher.infer(x, params, state, **operands)

    def backward(
        self, dy: Array, x: Array, params: Array, saved: Array, **operands: Any
    ) -> tuple[Array, Array, Array | None]:
        """dx, the gradients of gamma and beta as one (2, C) array, and what the activation lets through of dy."""
        return self.dispatcher.backward(dy, x, params, saved, training=True, activated=True, **operands)

    def frozen_backward(
        self, dy: Array, x: Array, params: Array, state: Array, **operands: Any
    ) -> tuple[Array, Array, Array | None]:
        saved = self.dispatcher.saved_of(state)
        return self.dispatcher.backward(dy, x, params, saved, training=False, activated=True, **operands)

    def kernels(self) -> list[tuple[str, str, bool, bool]]:
        """Step, loops, whether it is one pass, and whether results go past the caches: of all that has run."""
        return [
            (p.step, p.schedule.loops, p.schedule.one_pass, p.schedule.grid[STORE] == STREAMED)
            for p in self.dispatcher._plans.values()
        ]

    def moments(self, x: Array, weights: Array | None = None) -> Array:
        """Count, mean and biased variance, (3, C)."""
        return self.dispatcher.moments(x, weights)


class CpuScalars:
    """How a target reads and writes the elements of one 16-bit dtype."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)

    @cached_property
    def _loops(self) -> Any:
        @numba.njit
        def read(stored, values):
            for i in range(stored.size):
                values[i] = load(stored, i)

        @numba.njit
        def write(values, stored):
            for i in range(stored.size):
                store(stored, i, values[i])

        return read, write

    def read(self, stored: Array) -> Array:
        """float32 values of (n,) elements."""
        values = np.empty(stored.shape, np.float32)
        self._loops[0](stored.view(dtypes.carrier(stored.dtype)), values)
        return values

    def write(self, values: Array) -> Array:
        """(n,) elements for float32 values."""
        stored = np.empty(values.shape, self.dtype)
        self._loops[1](values, stored.view(dtypes.carrier(stored.dtype)))
        return stored


SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


def _has_gpu() -> bool:
    if find_spec("numba_cuda") is None:
        return False
    from numba import cuda

    return bool(cuda.is_available())


# name: (runs the steps, converts elements). The simulator's session is for what it simulates.
TARGETS: dict[str, tuple[type[Any], type[Any]]] = {}
if not SIMULATED:
    TARGETS["cpu"] = (Cpu, CpuScalars)
if SIMULATED or _has_gpu():
    from tests.oracle.targets_cuda import Cuda, CudaScalars

    TARGETS["cuda"] = (Cuda, CudaScalars)
