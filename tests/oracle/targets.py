"""The machines that run the stages, behind one face (face.py): all that the tests of every target know of them."""

import os
from importlib.util import find_spec
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from nbbn.core import dtypes
from nbbn.kernels.cpu.lanes import LANES, load, over, store, traced
from nbbn.runtime import PLAIN, run_by_python
from tests.oracle.face import Target

Array = NDArray[Any]


class Cpu(Target):
    """nbbn/kernels/cpu."""

    kind = "cpu"

    def kernels(self) -> list[tuple[str, str, bool, bool]]:
        """Step, loops, whether it is one pass, and whether results go past the caches: of all that has run."""
        return [
            (p.step, p.schedule.loops, p.schedule.one_pass, bool(p.schedule.grid.streamed))
            for p in self.engine.plans.values()
        ]


def compiled(function: Any) -> Any:
    """A function as the kernels are: by Numba, or as it is where there is no compiler."""
    return run_by_python(function) if PLAIN else numba.njit(function)


def carried(stored: Array) -> Array:
    """As the loops get it."""
    return stored if PLAIN else stored.view(dtypes.carrier(stored.dtype))


@traced
def copy_elements(source: Any, target: Any) -> None:
    """Read elements and write them, sixteen at a time and then those that are left."""
    over(0, source.size, lambda i, n, _: store(target, i, load(source, i, n), n))


@compiled
def _convert(source, target, piece):
    for i in range(0, source.size, piece):
        copy_elements(source[i : i + piece], target[i : i + piece])


class CpuConversion:
    """How a target reads and writes the elements of one 16-bit dtype: sixteen at a time, and fewer."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)

    def read(self, stored: Array) -> Array:
        """float32 values of (n,) elements."""
        return self._in_vectors_and_parts(stored, np.dtype(np.float32))

    def write(self, values: Array) -> Array:
        """(n,) elements for float32 values."""
        return self._in_vectors_and_parts(values, self.dtype)

    def _in_vectors_and_parts(self, source: Array, dtype: np.dtype[Any]) -> Array:
        whole, parts = np.empty(source.shape, dtype), np.empty(source.shape, dtype)
        for target, piece in ((whole, source.size), (parts, LANES - 1)):
            _convert(carried(source), carried(target), piece)
        np.testing.assert_array_equal(whole.view(np.uint8), parts.view(np.uint8))
        return whole


SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


def _has_gpu() -> bool:
    if find_spec("numba_cuda") is None:
        return False
    from numba import cuda

    return bool(cuda.is_available())


# name: (runs the steps, converts elements). The simulator's session is for what it simulates.
TARGETS: dict[str, tuple[type[Any], type[Any]]] = {}
if not SIMULATED:
    TARGETS["cpu"] = (Cpu, CpuConversion)
if SIMULATED or _has_gpu():
    from tests.oracle.targets_cuda import Cuda, CudaConversion

    TARGETS["cuda"] = (Cuda, CudaConversion)
