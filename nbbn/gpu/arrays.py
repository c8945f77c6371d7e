"""Arrays on a GPU, whichever library they belong to: what the kernels need to know of them."""

import importlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, cast

import numpy as np

from nbbn import dtypes
from nbbn.gpu import availability
from nbbn.layout import Sizes, contiguous_strides


class Library(Protocol):
    """What an adapter of nbbn.adapters does for its library. `array` is one of the library's own."""

    def is_device_array(self, value: Any) -> bool:
        """Whether it is in the memory of an NVIDIA GPU."""

    def is_writable(self, array: Any) -> bool:
        """Whether the library lets results be written to an array that somebody else may see."""

    def describe(self, array: Any) -> tuple[int, Sizes, Sizes, np.dtype, int]:
        """Address, shape, strides in bytes, dtype and the device's number."""

    def empty(self, shape: Sizes, dtype: np.dtype, device: int) -> Any: ...

    def empty_like(self, array: Any) -> Any:
        """Not initialized, with the same strides where the library can."""

    def from_host(self, array: np.ndarray, device: int) -> Any: ...

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

    def astype(self, dtype: np.dtype, copy: bool = False) -> "DeviceArray":
        """An array of another dtype; itself where it has that one and no copy is asked for."""
        if dtype == self.dtype and not copy:
            return self
        return wrap(self.library.astype(self.owner, dtype), self.library)

    def broadcast_to(self, shape: Sizes) -> "DeviceArray":
        """A view. Raises: ValueError if the shapes do not fit."""
        missing = len(shape) - self.ndim
        if missing < 0 or any(n not in (1, s) for n, s in zip(self.shape, shape[missing:], strict=True)):
            raise ValueError(f"an array of shape {self.shape} does not broadcast to {shape}")
        inner = tuple(0 if n == 1 else s for n, s in zip(self.shape, self.strides, strict=True))
        return replace(self, shape=shape, strides=(0,) * missing + inner)

    def overlaps(self, other: "DeviceArray") -> bool:
        """Whether the two may share memory: whether the bytes from the first to the last do."""
        if not (self.size and other.size) or self.device != other.device:
            return False
        (a, b), (c, d) = self._extent(), other._extent()
        return a < d and c < b

    def _extent(self) -> tuple[int, int]:
        ends = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        return self.address + sum(min(0, e) for e in ends), self.address + sum(max(0, e) for e in ends) + self.itemsize


def wrap(array: Any, library: Library) -> DeviceArray:
    address, shape, strides, dtype, device = library.describe(array)
    return DeviceArray(
        array, library, address, shape, strides or contiguous_strides(shape, dtype.itemsize), dtype, device
    )


# Where the class of an array, or a base of it, is defined, and its adapter.
_ADAPTERS = {"torch": "torch", "cupy": "cupy", "jax": "jax", "jaxlib": "jax", "numba.cuda": "numba_cuda"}
_CUDA = 2  # DLPack's kDLCUDA


def find_library(value: Any) -> Library | None:
    """The adapter of an array on a GPU; None for anything else.

    Arrays of libraries without an adapter of their own are taken for what __cuda_array_interface__ or DLPack's methods
    say of them.
    """
    name = _adapter_of(type(value))  # type: ignore[arg-type]  # a type is hashable
    if name is not None:
        library = _adapter(name)
        return library if library.is_device_array(value) else None
    device = getattr(value, "__dlpack_device__", None)
    if device is not None and device()[0] == _CUDA:
        return _adapter("interface")
    if getattr(value, "__cuda_array_interface__", None) is not None:
        return _adapter("interface")
    return None


@lru_cache(maxsize=256)
def _adapter_of(kind: type) -> str | None:
    modules = [base.__module__ + "." for base in kind.__mro__]
    return next((a for m in modules for root, a in _ADAPTERS.items() if m.startswith(root + ".")), None)


@lru_cache(maxsize=16)
def _adapter(name: str) -> Library:
    if name == "interface":  # needs Numba's CUDA target to read what is there
        availability.require("an array on a GPU")
    return cast(Library, importlib.import_module(f"nbbn.adapters.{name}"))


def as_device_array(value: Any, argument: str) -> DeviceArray:
    """Raises: TypeError for a dtype that is not one of nbbn's."""
    library = find_library(value)
    if library is None:
        raise TypeError(f"{argument} must be on the GPU, as the input is; received {type(value).__name__}")
    found = wrap(value, library)
    if found.dtype.name not in dtypes.NAMES:
        raise TypeError(f"{argument} must have a dtype of {', '.join(dtypes.NAMES)}; received {found.dtype.name}")
    return found
