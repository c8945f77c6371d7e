"""Which dtypes are accepted, which one a statistic is stored in, and how 16-bit floats reach Numba."""

import contextlib
import importlib
import reprlib
from functools import lru_cache
from typing import Any

import numpy as np
from numpy import ma  # Numba's first call would import it, in reach of a fork by another thread

NAMES = ("float16", "bfloat16", "float32", "float64")


def resolve(dtype: Any) -> np.dtype:
    """The native NumPy dtype for a name or dtype; bfloat16 is that of ml_dtypes, imported only when named.

    Raises: TypeError if it is none of float16, bfloat16, float32, float64; ModuleNotFoundError for bfloat16 without
        ml_dtypes.
    """
    if isinstance(dtype, str) and dtype == "bfloat16":
        try:
            dtype = importlib.import_module("ml_dtypes").bfloat16
        except ModuleNotFoundError as error:
            message = "dtype='bfloat16' needs the package ml_dtypes: pip install ml_dtypes"
            raise ModuleNotFoundError(message, name=error.name) from None
    found: np.dtype | None = None
    with contextlib.suppress(TypeError, ValueError, SyntaxError):
        found = np.dtype(dtype)
    if found is None or found.name not in NAMES:
        raise TypeError(f"dtype must be one of {', '.join(NAMES)}; received {dtype!r}")
    return found.newbyteorder("=")


@lru_cache(maxsize=64)
def _is_accepted(dtype: np.dtype) -> bool:
    return dtype.name in NAMES and dtype.isnative


@lru_cache(maxsize=64)
def statistic(dtype: np.dtype) -> np.dtype:
    """The dtype of parameters, statistics and arithmetic per element: float32 for 16-bit floats, else `dtype`."""
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def describe(dtype: np.dtype) -> str:
    """A dtype as messages show it."""
    name = {"U": "str", "S": "bytes"}.get(dtype.kind, dtype.name)
    return f"dtype {name}" if dtype.isnative else f"dtype {name} in foreign byte order ({dtype.str})"


def check(dtype: np.dtype, argument: str, floats: bool, received: str | None = None) -> None:
    """Raises: TypeError unless it is one of NAMES or, where not only floats will do, of bools or integers."""
    if dtype.name not in NAMES and (floats or dtype.kind not in "biuf"):
        accepted = ", ".join(NAMES) if floats else "bools, integers or floats"
        raise TypeError(f"{argument} must be an array of {accepted}; received {received or describe(dtype)}")


def as_numbers(value: Any, argument: str, floats: bool = False) -> np.ndarray:
    """Whatever a user passes as an array on the host, as a plain, aligned one in native byte order.

    Without a copy where that is what it is. floats: whether it must be of a supported dtype, or bools and integers
    will do, too.

    Raises: TypeError for a masked array, and for what has no such dtype. What an array of another library says to its
        conversion is left as it is.
    """
    refuse_masked(value, argument)
    try:
        array = np.asarray(value)
    except ValueError as error:  # nested lists of different lengths
        raise TypeError(f"{argument} must be an array of numbers; received {reprlib.repr(value)}") from error
    speaks_for_itself = hasattr(value, "dtype") or array.dtype.kind in "biufc"
    check(array.dtype, argument, floats, None if speaks_for_itself else reprlib.repr(value))
    return np.require(array, dtype=array.dtype.newbyteorder("="), requirements="A")


def refuse_masked(value: Any, argument: str) -> None:
    """Raises: TypeError for a masked array: what knows nothing of its mask would count what it excludes."""
    if isinstance(value, ma.MaskedArray):
        raise TypeError(
            f"{argument} must be a plain array; received a masked array (pass its data; the mask of a layer's call "
            "says what counts, as ~array.mask does)"
        )


def as_float_array(value: Any, argument: str) -> np.ndarray:
    """as_numbers() for what must be of a supported dtype."""
    if type(value) is np.ndarray and _is_accepted(value.dtype) and value.flags.aligned:
        return value
    return as_numbers(value, argument, floats=True)


# What Numba types in the place of a 16-bit float.
CARRIERS = {"float16": np.dtype(np.uint16), "bfloat16": np.dtype(np.int16)}


@lru_cache(maxsize=64)
def carrier(dtype: np.dtype) -> np.dtype:
    """The dtype of the same size that Numba types: uint16 stands for float16, int16 for bfloat16."""
    return CARRIERS.get(dtype.name, dtype)
