"""What is written element by element: copies between any strides and dtypes, and small arrays of numbers.

Strides are in bytes, and all arguments integers of 64 bits, or tuples of them. There is one thread for each element at
most.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numba.cuda import types

from nbbn.kernels.cuda.elements import element, place, split
from nbbn.kernels.cuda.kernel import Kernel
from nbbn.kernels.cuda.target import SIMULATED, cuda

BLOCKS, THREADS = (1, 4) if SIMULATED else (1024, 128)  # at most
_INT = types.int64


@lru_cache(maxsize=256)
def copy(source_dtype: np.dtype, target_dtype: np.dtype, rank: int) -> Kernel:
    def build() -> Any:
        read, write = element(source_dtype).read, element(target_dtype).write

        def copy(source, source_strides, target, target_strides, shape, size):
            for i in range(cuda.grid(1), size, cuda.gridsize(1)):
                write(place(i, target, shape, target_strides), read(place(i, source, shape, source_strides)))

        return copy

    sizes = types.UniTuple(_INT, rank)
    dtypes = f"{source_dtype.name} to {target_dtype.name}"
    return Kernel("copy", dtypes, (), types.void(_INT, sizes, _INT, sizes, sizes, _INT), build)


@lru_cache(maxsize=16)
def add(dtype: np.dtype) -> Kernel:
    def build() -> Any:
        read, write, itemsize = element(dtype).read, element(dtype).write, dtype.itemsize

        def add(values, total, size):
            """total += values, of arrays without gaps."""
            for i in range(cuda.grid(1), size, cuda.gridsize(1)):
                there = total + i * itemsize
                write(there, read(there) + read(values + i * itemsize))

        return add

    return Kernel("add", dtype.name, (), types.void(_INT, _INT, _INT), build)


@lru_cache(maxsize=16)
def first_steps(dtype: np.dtype) -> Kernel:
    def build() -> Any:
        read, write, itemsize = element(np.dtype(np.int64)).read, element(dtype).write, dtype.itemsize

        def first_steps(lengths, stride, weights, steps, size):
            """Weights of (samples, steps): 1 for the first lengths[n] of sample n, else 0."""
            for i in range(cuda.grid(1), size, cuda.gridsize(1)):
                n, step = split(i, steps)
                counts = step < read(lengths + n * stride)
                write(weights + i * itemsize, np.float32(1) if counts else np.float32(0))

        return first_steps

    return Kernel("first_steps", dtype.name, (), types.void(_INT, _INT, _INT, _INT, _INT), build)


@lru_cache(maxsize=16)
def numbers(count: int) -> Kernel:
    def build() -> Any:
        write = element(np.dtype(np.int64)).write

        def numbers(values, target, size):
            """Write a few numbers of 64 bits, which come as arguments of the launch."""
            for i in range(cuda.grid(1), size, cuda.gridsize(1)):
                write(target + i * 8, values[i])

        return numbers

    return Kernel("numbers", "int64", (), types.void(types.UniTuple(_INT, count), _INT, _INT), build)
