"""The machines that run the stages, behind one face (face.py): all that the tests of every target know of them."""

import os
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from nbbn.core import dtypes
from nbbn.kernels.cpu.memory import STREAMED
from nbbn.kernels.cpu.scalars import load, store
from nbbn.runtime import PLAIN, run_by_python
from tests.oracle.face import Target

Array = NDArray[Any]


class Cpu(Target):
    """nbbn/kernels/cpu."""

    kind = "cpu"

    def kernels(self) -> list[tuple[str, str, bool, bool]]:
        """Step, loops, whether it is one pass, and whether results go past the caches: of all that has run."""
        return [
            (p.step, p.schedule.loops, p.schedule.one_pass, p.schedule.grid.store == STREAMED)
            for p in self.engine.plans.values()
        ]


def _compiled(function: Any) -> Any:
    return run_by_python(function) if PLAIN else numba.njit(function)


def _carried(stored: Array) -> Array:
    """As the loops get it."""
    return stored if PLAIN else stored.view(dtypes.carrier(stored.dtype))


class CpuScalars:
    """How a target reads and writes the elements of one 16-bit dtype."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)

    @cached_property
    def _loops(self) -> Any:
        @_compiled
        def read(stored, values):
            for i in range(stored.size):
                values[i] = load(stored, i)

        @_compiled
        def write(values, stored):
            for i in range(stored.size):
                store(stored, i, values[i])

        return read, write

    def read(self, stored: Array) -> Array:
        """float32 values of (n,) elements."""
        values = np.empty(stored.shape, np.float32)
        self._loops[0](_carried(stored), values)
        return values

    def write(self, values: Array) -> Array:
        """(n,) elements for float32 values."""
        stored = np.empty(values.shape, self.dtype)
        self._loops[1](values, _carried(stored))
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
