"""Where arrays lie: in the host's memory, as NumPy arrays, or on a GPU, as DeviceArrays of whichever library.

Inside nbbn an Array is one of these two. They have shape, strides (in bytes), dtype, ndim, size and itemsize in common;
what else a call needs of them is a method of their place.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from nbbn.arrays.host import HOST, Array, Host, numbers_of
from nbbn.arrays.libraries import find_on_host
from nbbn.core import dtypes

if TYPE_CHECKING:  # what is on a GPU is imported when an array of one comes in
    from nbbn.arrays.gpu import DevicePlace

Place: TypeAlias = "Host | DevicePlace"


@lru_cache(maxsize=1)  # an import costs a third of a microsecond each time
def _gpu() -> Any:
    from nbbn.arrays import gpu

    return gpu


def place_of(array: Array) -> Place:
    """Where an Array lies."""
    return HOST if isinstance(array, np.ndarray) else _gpu().device_place(array.library, array.device)


def beside(array: Array, like: Array) -> Array:
    """The array where `like` is: itself, or a copy of what is on the host."""
    return place_of(like).send(array) if isinstance(array, np.ndarray) else array


def as_array(value: Any, argument: str, floats: bool = True) -> Array:
    """A user's array of one of nbbn's dtypes, wherever it lies; what is no array becomes NumPy's.

    floats: False takes bools and integers, too. Raises: TypeError for another dtype.
    """
    if type(value) is not np.ndarray:
        found = _gpu().find_array(value)
        if found is not None:
            dtypes.check(found.dtype, argument, floats)
            return found
    return HOST.take(value, argument) if floats else numbers_of(value, argument)


def found_on_gpu(value: Any) -> Any:
    """The DeviceArray of an array on a GPU; all else as it is."""
    found = None if value is None else _gpu().find_array(value)
    return value if found is None else found


def as_numpy(value: Any, argument: str) -> np.ndarray:
    """A user's numbers on the host, from wherever they lie: values alone, whatever a library means to differentiate.

    Raises: TypeError for what is none.
    """
    if not isinstance(value, np.ndarray):
        library = _gpu().find_library(value) or find_on_host(value)
        if library is not None:
            value = library.to_host(value)
    return dtypes.as_numbers(value, argument)
