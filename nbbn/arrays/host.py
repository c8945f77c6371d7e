"""NumPy's arrays, which lie in the host's memory, and those of other libraries there, as NumPy sees them."""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from nbbn.arrays.libraries import view
from nbbn.core import dtypes
from nbbn.core.layout import Sizes
from nbbn.runtime import buffers

Array = Any  # np.ndarray | DeviceArray. A place takes arrays of its own kind


class Host:
    """Where NumPy's arrays lie. What can be done with Arrays there; DevicePlace (gpu.py) has the same methods."""

    name = "cpu"
    in_place = False  # what changes is replaced by a new array: other threads may be reading it

    empty_like = staticmethod(buffers.empty_like)
    # give: what the user gets of an Array. send: from_host() for the stream of the moment alone, without waiting.
    give = from_host = send = to_host = staticmethod(lambda array: array)

    def __reduce__(self) -> str:
        return "HOST"  # there is one

    def take(self, value: Any, argument: str) -> Array:
        """The Array of what a user has passed, with one of nbbn's dtypes. Raises: TypeError, ValueError."""
        return dtypes.as_float_array(view(value), argument)

    def take_out(self, value: Any) -> Array:
        """The same for what results are written to. Raises: TypeError, ValueError unless it is a writable array."""
        value = view(value)
        if not isinstance(value, np.ndarray):
            raise TypeError(
                f"out must be a NumPy array, or a tensor of PyTorch on the CPU; received {type(value).__name__}"
            )
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
        """A view with dimensions of size 1 inserted, or any view of a contiguous array."""
        return array.reshape(shape)

    def broadcast(self, array: Array, shape: Sizes) -> Array:
        """A view. Raises: ValueError if the shapes do not fit."""
        return np.broadcast_to(array, shape)

    def part(self, array: Array, start: int, shape: Sizes, strides: Sizes) -> Array:
        """A view with this shape and strides that begins at a sample; for kernels: a GPU's is no array of a library."""
        return as_strided(array[start:], shape, strides)

    def cut(self, array: Array, rows: slice, columns: slice = slice(None)) -> Array:
        """A view of some rows, and of some columns of them; for kernels, as part()."""
        return array[rows] if columns == slice(None) else array[rows, columns]

    def put(self, array: Array, value: Array) -> None:
        """Write what broadcasts against the array, cast to its dtype."""
        array[...] = value

    def add(self, array: Array, value: Array) -> None:
        """The same for a sum; both are float32 or float64 and contiguous."""
        array += value

    def first_steps(self, lengths: Array, steps: int, dtype: np.dtype) -> Array:
        """Weights (N, steps): 1 for the first lengths[n] steps of sample n, else 0."""
        return (np.arange(steps) < lengths[:, None]).astype(dtype)

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


def numbers_of(value: Any, argument: str) -> np.ndarray:
    """Bools, integers or floats that a user has passed for the host. Raises: TypeError, ValueError."""
    return dtypes.as_numbers(view(value), argument)


class _Rows:
    """Two rows that lie apart, for NumPy, whose view of them keeps both."""

    def __init__(self, first: np.ndarray, second: np.ndarray, apart: int) -> None:
        self.rows = first, second
        self.__array_interface__ = first.__array_interface__ | {
            "shape": (2, *first.shape),
            "strides": (apart, first.itemsize),
        }


def beside(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Two rows (C,) of one dtype, which may lie anywhere, as one (2, C) view: parameters or a state without a copy.

    For kernels. NumPy must not copy or compute with the view as a whole, only with its rows: where the memory of a
    result lies between them, it takes the two for overlapping, and copies to ever new memory until the stack is full.

    Raises: ValueError for rows of different shapes, dtypes or with gaps.
    """
    for row in (first, second):
        if row.shape != first.shape or row.ndim != 1 or row.dtype != first.dtype:
            raise ValueError(f"rows must have one shape (C,) and dtype; received {row.shape} {row.dtype}")
        if not (row.flags.c_contiguous and row.flags.aligned):
            raise ValueError(f"rows must be contiguous and aligned; received strides {row.strides}")
    return np.asarray(_Rows(first, second, HOST.address(second) - HOST.address(first)))
