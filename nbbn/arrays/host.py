"""NumPy's arrays, which lie in the host's memory."""

from typing import Any

import numpy as np

from nbbn.core import dtypes
from nbbn.core.layout import Sizes
from nbbn.runtime import buffers

Array = Any  # np.ndarray | DeviceArray. A place takes arrays of its own kind


class Host:
    """Where NumPy's arrays lie. What can be done with Arrays there; DevicePlace (gpu.py) has the same methods."""

    name = "cpu"
    in_place = False  # what changes is replaced by a new array: other threads may be reading it

    empty_like = staticmethod(buffers.empty_like)
    give = from_host = to_host = staticmethod(lambda array: array)  # give: what the user gets of an Array

    def __reduce__(self) -> str:
        return "HOST"  # there is one

    def take(self, value: Any, argument: str) -> Array:
        """The Array of what a user has passed, with one of nbbn's dtypes. Raises: TypeError, ValueError."""
        return dtypes.as_float_array(value, argument)

    def take_out(self, value: Any) -> Array:
        """The same for what results are written to. Raises: TypeError, ValueError unless it is a writable array."""
        if not isinstance(value, np.ndarray):
            raise TypeError(f"out must be a NumPy array; received {type(value).__name__}")
        dtypes.refuse_masked(value, "out")
        if not (value.flags.writeable and value.flags.aligned):
            raise ValueError("out must be writable memory of its own; received a read-only or unaligned array")
        return np.asarray(value)  # a subclass sees what is written, and has no say in how

    def take_operand(self, value: Any, argument: str) -> Array | None:
        """The Array of a value of any dtype that lies in a GPU's place; None for all else, which NumPy takes."""
        return None

    def row(self, array: Array, row: int, shape: Sizes) -> Any:
        """A row of an Array as the user gets it, in another shape; a view where the library has views."""
        found = array[row]
        return found if len(shape) == 1 else found.reshape(shape)

    def empty(self, shape: Sizes, dtype: np.dtype) -> Array:
        return np.empty(shape, dtype)

    def astype(self, array: Array, dtype: np.dtype, copy: bool = False) -> Array:
        return array.astype(dtype, copy=copy)

    def reshape(self, array: Array, shape: Sizes) -> Array:
        """A view with dimensions of size 1 inserted."""
        return array.reshape(shape)

    def broadcast(self, array: Array, shape: Sizes) -> Array:
        """A view. Raises: ValueError if the shapes do not fit."""
        return np.broadcast_to(array, shape)

    def overlap(self, a: Array, b: Array) -> bool:
        """Whether the two may share memory."""
        return np.may_share_memory(a, b)

    def address(self, array: Array) -> int:
        found: int = array.__array_interface__["data"][0]
        return found

    def copy(self, array: Array, sizes: Sizes, order: Sizes) -> Array:
        """A contiguous copy of the array seen with these sizes and transposed."""
        return np.ascontiguousarray(array.reshape(sizes).transpose(order))

    def write(self, array: Array, value: Array, sizes: Sizes, order: Sizes) -> None:
        """The other way: `value`, contiguous, has the transposed shape."""
        array.reshape(sizes).transpose(order)[...] = value  # a dimension that is split needs no copy


HOST = Host()
