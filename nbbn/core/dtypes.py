"""Which dtypes are accepted, which one a statistic is stored in, and how 16-bit floats reach Numba."""

import contextlib
import importlib
from functools import lru_cache
from typing import Any

import numpy as np
from numpy import ma  # Numba's first call would import it, in reach of a fork by another thread

NAMES = ("float16", "bfloat16", "float32", "float64")


def resolve(dtype: Any, argument: str = "dtype") -> np.dtype:
    """The native NumPy dtype for a name or dtype; bfloat16 is that of ml_dtypes, imported only when named.

    Raises: TypeError if it is none of float16, bfloat16, float32, float64.
    """
    if isinstance(dtype, str) and dtype == "bfloat16":
        dtype = importlib.import_module("ml_dtypes").bfloat16
    found: np.dtype | None = None
    with contextlib.suppress(TypeError, ValueError, SyntaxError):
        found = np.dtype(dtype)
    if found is None or found.name not in NAMES:
        raise TypeError(f"{argument} must be one of {', '.join(NAMES)}; received {dtype!r}")
    return found.newbyteorder("=")


@lru_cache(maxsize=64)
def _is_accepted(dtype: np.dtype) -> bool:
    return dtype.name in NAMES and dtype.isnative


@lru_cache(maxsize=64)
def statistic(dtype: np.dtype) -> np.dtype:
    """The dtype of parameters, statistics and arithmetic per element: float32 for 16-bit floats, else `dtype`."""
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def as_float_array(value: Any, argument: str) -> np.ndarray:
    """`value` as an aligned array of a supported dtype in native byte order, without a copy where that is what it is.

    Raises: TypeError for a masked array, or a dtype that is not float16, bfloat16, float32 or float64.
    """
    if type(value) is np.ndarray and _is_accepted(value.dtype) and value.flags.aligned:
        return value
    if isinstance(value, ma.MaskedArray):
        raise TypeError(
            f"{argument} must be a plain array; received a masked array (pass its data, and mask=~array.mask)"
        )
    array = np.asarray(value)
    if array.dtype.name not in NAMES:
        raise TypeError(f"{argument} must have a dtype of {', '.join(NAMES)}; received {array.dtype.name}")
    return np.require(array, dtype=array.dtype.newbyteorder("="), requirements="A")


# What Numba types in the place of a 16-bit float.
CARRIERS = {"float16": np.dtype(np.uint16), "bfloat16": np.dtype(np.int16)}


@lru_cache(maxsize=64)
def carrier(dtype: np.dtype) -> np.dtype:
    """The dtype of the same size that Numba types: uint16 stands for float16, int16 for bfloat16."""
    return CARRIERS.get(dtype.name, dtype)
