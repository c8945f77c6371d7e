"""numba.cuda as kernels see it, on a GPU or in Numba's simulator (NUMBA_ENABLE_CUDASIM=1)."""

from typing import Any

import numba.cuda
from numba.cuda import config

SIMULATED = bool(config.ENABLE_CUDASIM)


class _Simulated:
    """The module that belongs to the kernel that runs now. The simulator puts it in the place of the name `cuda` of the
    kernel's own module, and of others only as long as one thread is in their functions."""

    def __getattr__(self, name: str) -> Any:
        from numba.cuda.simulator.kernel import _get_kernel_context

        return getattr(_get_kernel_context(), name)


cuda: Any = _Simulated() if SIMULATED else numba.cuda


def device(function: Any) -> Any:
    """A function that kernels call; it becomes a part of them."""
    return function if SIMULATED else numba.cuda.jit(device=True, forceinline=True)(function)
