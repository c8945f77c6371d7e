"""What is written element by element: copies between any strides and dtypes, and small arrays of numbers.

Strides are in bytes. Numba starts these kernels itself, with one thread for each element at most.
"""

from functools import lru_cache
from typing import Any

import numba.cuda
import numpy as np

from nbbn.kernels.cuda.elements import element, place, split
from nbbn.kernels.cuda.target import SIMULATED, cuda

BLOCKS, THREADS = (1, 4) if SIMULATED else (1024, 128)  # at most


@lru_cache(maxsize=256)
def copy(source_dtype: np.dtype, target_dtype: np.dtype) -> Any:
    read, write = element(source_dtype).read, element(target_dtype).write

    def copy(source, source_strides, target, target_strides, shape, size):
        for i in range(cuda.grid(1), size, cuda.gridsize(1)):
            write(place(i, target, shape, target_strides), read(place(i, source, shape, source_strides)))

    return numba.cuda.jit(copy)


@lru_cache(maxsize=16)
def add(dtype: np.dtype) -> Any:
    read, write, itemsize = element(dtype).read, element(dtype).write, dtype.itemsize

    def add(values, total, size):
        """total += values, of arrays without gaps."""
        for i in range(cuda.grid(1), size, cuda.gridsize(1)):
            there = total + i * itemsize
            write(there, read(there) + read(values + i * itemsize))

    return numba.cuda.jit(add)


@lru_cache(maxsize=16)
def first_steps(dtype: np.dtype) -> Any:
    read, write, itemsize = element(np.dtype(np.int64)).read, element(dtype).write, dtype.itemsize

    def first_steps(lengths, stride, weights, steps, size):
        """Weights of (samples, steps): 1 for the first lengths[n] of sample n, else 0."""
        for i in range(cuda.grid(1), size, cuda.gridsize(1)):
            n, step = split(i, steps)
            counts = step < read(lengths + n * stride)
            write(weights + i * itemsize, np.float32(1) if counts else np.float32(0))

    return numba.cuda.jit(first_steps)


@lru_cache(maxsize=1)
def numbers() -> Any:
    write = element(np.dtype(np.float64)).write

    def numbers(values, target, size):
        """Write a few float64, which come as arguments of the launch."""
        for i in range(cuda.grid(1), size, cuda.gridsize(1)):
            write(target + i * 8, values[i])

    return numba.cuda.jit(numbers)
