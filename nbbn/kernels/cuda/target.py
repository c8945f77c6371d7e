"""numba.cuda as kernels see it, on a GPU or in Numba's simulator (NUMBA_ENABLE_CUDASIM=1)."""

import sys
from typing import Any

import numba.cuda
import numpy as np
from numba.cuda import config

SIMULATED = bool(config.ENABLE_CUDASIM)


class _Simulated:
    """The module that belongs to the kernel that runs now. The simulator puts it in the place of the name `cuda` of the
    kernel's own module, and of others only as long as one thread is in their functions."""

    def __getattr__(self, name: str) -> Any:
        from numba.cuda.simulator.kernel import _get_kernel_context

        found = getattr(_get_kernel_context(), name)
        return _SimulatedShared(found) if name == "shared" else found


class _SimulatedShared:
    """Shared memory, which is found by the line that asks for it. The simulator itself can give different arrays to
    threads that ask at once, and first."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def array(self, shape: Any, dtype: Any) -> np.ndarray:
        caller = sys._getframe(1)
        place = caller.f_code.co_filename, caller.f_lineno
        found: np.ndarray = self.own._allocations.setdefault(place, np.empty(shape, dtype))
        return found


cuda: Any = _Simulated() if SIMULATED else numba.cuda


def device(function: Any) -> Any:
    """A function that kernels call; it becomes a part of them."""
    return function if SIMULATED else numba.cuda.jit(device=True, forceinline=True)(function)


def index_type(wide: bool) -> Any:
    """What makes a number the index of an element, of 64 or 32 bits: a product of two of 32 takes one instruction."""
    return int if SIMULATED else np.int64 if wide else np.int32
