"""Kernels without a compiler: with NUMBA_DISABLE_JIT=1 Python runs the text that Numba would compile.

People set it to see their own functions in a debugger or a coverage report. It counts as it was at the import: what
Numba's decorators give is decided there.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import numba
import numpy as np
from numba import extending

from nbbn.runtime.progress import LOGGER

PLAIN = bool(numba.config.DISABLE_JIT)


def intrinsic(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Numba's decorator for what it can only be told in LLVM's terms. `plain` does the same in Python."""
    return (lambda _: plain) if PLAIN else extending.intrinsic


def run_by_python(function: Callable[..., None]) -> Callable[..., None]:
    """What stands for a compiled kernel: like it, it says nothing of overflows and divisions by zero."""

    @wraps(function)
    def run(*arguments: Any) -> None:
        _say_so()
        with np.errstate(all="ignore"):
            function(*arguments)

    return run


@lru_cache(maxsize=1)
def _say_so() -> None:
    # Not a warning of Python's: where coverage is measured, tests run, which may make errors of those.
    LOGGER.warning("NUMBA_DISABLE_JIT is set: nbbn's kernels run in plain Python, very slowly")
