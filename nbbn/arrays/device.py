"""Arrays on a GPU, whichever library they belong to: what the kernels need to know of them."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nbbn.core.layout import Sizes, contiguous_strides


class Library(Protocol):
    """What a module of nbbn.arrays does for its library. `array` is one of the library's own."""

    def __hash__(self) -> int: ...

    def is_device_array(self, value: Any) -> bool:
        """Whether it is in the memory of an NVIDIA GPU."""

    def is_writable(self, array: Any) -> bool:
        """Whether the library lets results be written to an array that somebody else may see."""

    def describe(self, array: Any) -> tuple[int, Sizes, Sizes, np.dtype, int]:
        """Address, shape, strides in bytes, dtype and the device's number."""

    def address(self, array: Any) -> int:
        """Of an array that empty() or empty_like() has made."""

    def empty(self, shape: Sizes, dtype: np.dtype, device: int) -> Any: ...

    def empty_like(self, array: Any) -> Any:
        """Not initialized, with the same strides where the library can."""

    def from_host(self, array: np.ndarray, device: int) -> Any: ...

    def send(self, array: np.ndarray, device: int) -> Any:
        """The same without waiting for what is queued before, where the library can: for what is used in the stream of
        the moment alone."""

    def to_host(self, array: Any) -> np.ndarray: ...

    def stream(self, device: int) -> int:
        """The handle of the stream that the library uses now."""

    def finish(self, device: int) -> None:
        """Called after a step's launches: a library that does not keep the order of a stream waits for them."""

    def astype(self, array: Any, dtype: np.dtype) -> Any: ...

    def copy(self, array: Any, sizes: Sizes, order: Sizes) -> Any:
        """A contiguous copy of the array seen with these sizes and transposed."""

    def assign(self, array: Any, sizes: Sizes, order: Sizes, value: Any) -> None:
        """The other way: `value`, contiguous, has the transposed shape."""


@dataclass(slots=True)
class DeviceArray:
    """An array on a GPU. strides: in bytes. owner: the library's array, which keeps the memory."""

    owner: Any
    library: Library
    address: int
    shape: Sizes
    strides: Sizes
    dtype: np.dtype
    device: int

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def extent(self) -> tuple[int, int]:
        """The addresses from the first byte to behind the last one."""
        ends = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        return self.address + sum(min(0, e) for e in ends), self.address + sum(max(0, e) for e in ends) + self.itemsize


def wrap(array: Any, library: Library) -> DeviceArray:
    address, shape, strides, dtype, device = library.describe(array)
    strides = strides or contiguous_strides(shape, dtype.itemsize)
    return DeviceArray(array, library, address, shape, strides, dtype, device)
