"""What lies between the stages, of several inputs: on the host, where it comes from others or goes to them."""

from functools import lru_cache
from typing import Any

import numpy as np

from nbbn.kernels.channel import MOMENT_ROWS
from nbbn.kernels.cpu.compiling import compiled
from nbbn.runtime import entry_point

Array = np.ndarray
# What compiled() is to be asked for; no dtype but float64 is among its arguments.
MERGE: tuple[Any, ...] = ("merge", "planes", False, *[np.dtype(np.float64)] * 3, True, frozenset())


@lru_cache(maxsize=1)
def _merge() -> Any:
    return entry_point(compiled(*MERGE))


def merge_moments(parts: Array) -> Array:
    """The moments (4, S) of several sets of values together: (P, 4, S) float64, merged in their order.

    So the same parts in the same order give the same bits. Nothing is lost where means are large.

    Source: nbbn.core.rules.combine
    """
    if parts.ndim != 3 or parts.shape[1] != MOMENT_ROWS or not len(parts):
        raise ValueError(f"parts must have shape (parts, {MOMENT_ROWS}, statistics); received {parts.shape}")
    parts = np.ascontiguousarray(parts, np.float64)
    moments = np.empty(parts.shape[1:])
    _merge()(parts, moments)
    return moments


def add_sums(parts: Array) -> Array:
    """The sums (R, S) of the gradient of several inputs, (P, R, S) float64, added in their order."""
    total = np.array(parts[0])
    for part in parts[1:]:
        total += part
    return total
