"""Where arrays lie: in the host's memory, as NumPy arrays, or on a GPU, as DeviceArrays of whichever library.

Inside nbbn an Array is one of these two. They have shape, strides (in bytes), dtype, ndim, size and itemsize in common;
what else a call needs of them is a method of their place.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from nbbn.arrays.host import HOST, Array, Host

if TYPE_CHECKING:  # what is on a GPU is imported when an array of one comes in
    from nbbn.arrays.gpu import DevicePlace

Place: TypeAlias = "Host | DevicePlace"


def place_of(array: Array) -> Place:
    """Where an Array lies."""
    if isinstance(array, np.ndarray):
        return HOST
    from nbbn.arrays.gpu import device_place

    return device_place(array.library, array.device)


def as_array(value: Any, argument: str) -> Array:
    """A user's array of one of nbbn's dtypes, wherever it lies; what is no array becomes NumPy's.

    Raises: TypeError for another dtype.
    """
    if type(value) is not np.ndarray:
        from nbbn.arrays.gpu import check_dtype, find_array

        found = find_array(value)
        if found is not None:
            return check_dtype(found, argument)
    return HOST.take(value, argument)


def as_numpy(value: Any) -> np.ndarray:
    """A user's value on the host, from wherever it lies."""
    if not isinstance(value, np.ndarray):
        from nbbn.arrays.gpu import find_array

        found = find_array(value)
        if found is not None:
            return found.library.to_host(value)
    return np.asarray(value)
