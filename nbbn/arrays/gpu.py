"""A GPU as the place of arrays, and how an array there is found."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any, cast

import numpy as np

from nbbn.arrays.device import DeviceArray, Library, wrap
from nbbn.arrays.host import Array
from nbbn.arrays.libraries import load, module_of
from nbbn.core import dtypes
from nbbn.core.layout import Sizes, contiguous_strides, is_contiguous


@lru_cache(maxsize=1)
def _moving() -> Any:
    """It needs numba.cuda, which this module must not load to tell that an array is none of a GPU."""
    from nbbn.arrays import moving

    return moving


@dataclass(frozen=True)
class DevicePlace:
    """One GPU, and the library whose arrays are made there. Its methods are those of Host, where they are described."""

    library: Library
    device: int
    in_place = True  # why: nbbn/state/variables.py

    @property
    def name(self) -> str:
        return f"cuda:{self.device}"

    def __reduce__(self) -> tuple[Any, ...]:
        name = cast(ModuleType, self.library).__name__.rpartition(".")[2]
        return _restored_place, (name, self.device)

    def take(self, value: Any, argument: str) -> Array:
        found = self._take(value, argument)
        dtypes.check(found.dtype, argument, floats=True)
        return found

    def take_out(self, value: Any) -> Array:
        out = self._take(value, "out")
        if not out.library.is_writable(out.owner):
            raise ValueError(f"out must be an array that may change; received one of {type(out.owner).__module__}")
        return out

    def _take(self, value: Any, argument: str) -> Array:
        found = self.take_operand(value, argument)
        if found is None:
            raise TypeError(f"{argument} must be on the GPU, as the input is; received {type(value).__name__}")
        return found

    def take_operand(self, value: Any, argument: str) -> Array | None:
        found = find_array(value)
        if found is not None and found.device != self.device:
            raise ValueError(
                f"{argument} must be on the input's GPU, cuda:{self.device}; received one on cuda:{found.device}"
            )
        return found

    def give(self, array: Array) -> Any:
        return array.owner

    def empty(self, shape: Sizes, dtype: np.dtype) -> Array:
        return wrap(self.library.empty(shape, dtype, self.device), self.library)

    def empty_like(self, array: Array) -> Array:
        return wrap(array.library.empty_like(array.owner), array.library)

    def astype(self, array: Array, dtype: np.dtype, copy: bool = False) -> Array:
        if dtype == array.dtype and not copy:
            return array
        return wrap(array.library.astype(array.owner, dtype), array.library)

    def from_host(self, array: np.ndarray) -> Array:
        return wrap(self.library.from_host(np.ascontiguousarray(array), self.device), self.library)

    def send(self, array: np.ndarray) -> Array:
        return wrap(self.library.send(np.asarray(array, order="C"), self.device), self.library)

    def to_host(self, array: Array) -> np.ndarray:
        found: np.ndarray = array.library.to_host(array.owner)
        return found

    def row(self, array: Array, row: int, shape: Sizes) -> Any:
        found = array.owner[row]
        return found if len(shape) == 1 else found.reshape(shape)

    def reshape(self, array: Array, shape: Sizes) -> Array:
        if math.prod(shape) == array.size and is_contiguous(array.shape, array.strides, array.itemsize):
            return replace(array, shape=shape, strides=contiguous_strides(shape, array.itemsize))
        there = iter([(n, s) for n, s in zip(array.shape, array.strides, strict=True) if n != 1])
        return replace(array, shape=shape, strides=tuple(0 if n == 1 else next(there)[1] for n in shape))

    def broadcast(self, array: Array, shape: Sizes) -> Array:
        missing = len(shape) - array.ndim
        if missing < 0 or any(n not in (1, s) for n, s in zip(array.shape, shape[missing:], strict=True)):
            raise ValueError(f"an array of shape {array.shape} does not broadcast to {shape}")
        inner = tuple(0 if n == 1 else s for n, s in zip(array.shape, array.strides, strict=True))
        return replace(array, shape=shape, strides=(0,) * missing + inner)

    def part(self, array: Array, start: int, shape: Sizes, strides: Sizes) -> Array:
        return replace(array, address=array.address + start * array.strides[0], shape=shape, strides=strides)

    def cut(self, array: Array, rows: slice, columns: slice = slice(None)) -> Array:
        (first, last, _), shape = rows.indices(array.shape[0]), array.shape[1:]
        address = array.address + first * array.strides[0]
        if columns != slice(None):
            begin, end, _ = columns.indices(shape[0])
            address, shape = address + begin * array.strides[1], (end - begin, *shape[1:])
        return replace(array, address=address, shape=(last - first, *shape))

    def put(self, array: Array, value: Array) -> None:
        _moving().copy(self.broadcast(value, array.shape), array)

    def add(self, array: Array, value: Array) -> None:
        _moving().add(value, array)

    def first_steps(self, lengths: Array, steps: int, dtype: np.dtype) -> Array:
        weights = self.empty((lengths.shape[0], steps), dtype)
        _moving().first_steps(lengths, weights)
        return weights

    def overlap(self, a: Array, b: Array) -> bool:
        """Whether the bytes from the first to the last do."""
        if not (a.size and b.size) or a.device != b.device:
            return False
        (first, last), (begin, end) = a.extent(), b.extent()
        return bool(first < end and begin < last)

    def address(self, array: Array) -> int:
        return int(array.address)

    def copy(self, array: Array, sizes: Sizes, order: Sizes) -> Array:
        if array.shape == tuple(getattr(array.owner, "shape", ())):
            return wrap(array.library.copy(array, sizes, order), array.library)
        found = self.empty(tuple(sizes[i] for i in order), array.dtype)  # of a view the library knows nothing
        _moving().copy(_moving().transposed(array, sizes, order), found)
        return found

    def write(self, array: Array, value: Array, sizes: Sizes, order: Sizes) -> None:
        array.library.assign(array, sizes, order, value.owner)


@lru_cache(maxsize=64)
def device_place(library: Library, device: int) -> DevicePlace:
    return DevicePlace(library, device)


def _restored_place(library: str, device: int) -> DevicePlace:
    return device_place(load(library), device)


def find_array(value: Any) -> DeviceArray | None:
    """The DeviceArray of a GPU's array, of which it may be one; None for anything else."""
    if type(value) is DeviceArray:
        return value
    library = find_library(value)
    return None if library is None else wrap(value, library)


_CUDA = 2  # DLPack's kDLCUDA


def find_library(value: Any) -> Library | None:
    """The module for the library of an array on a GPU; None for anything else.

    Arrays of libraries without a module of their own are taken for what __cuda_array_interface__ or DLPack's methods
    say of them.
    """
    name = module_of(type(value))  # type: ignore[arg-type]  # a type is hashable
    if name is not None:
        library: Library = load(name)
        return library if library.is_device_array(value) else None
    device = getattr(value, "__dlpack_device__", None)
    if (device is None or device()[0] != _CUDA) and getattr(value, "__cuda_array_interface__", None) is None:
        return None
    interface: Library = load("interface")
    return interface
