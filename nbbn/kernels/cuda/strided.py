"""Copies between memory with strides and dense memory. Strides are in elements."""

import numba.cuda

from nbbn.kernels.cuda.target import cuda, device


@device
def place(i, start, shape, strides):
    """Where the i-th element in the order of `shape` lies."""
    for k in range(len(shape)):
        d = len(shape) - 1 - k
        start += i % shape[d] * strides[d]
        i //= shape[d]
    return start


def gather(memory, start, shape, strides, dense):
    for i in range(cuda.grid(1), dense.size, cuda.gridsize(1)):
        dense[i] = memory[place(i, start, shape, strides)]


def scatter(memory, start, shape, strides, dense):
    for i in range(cuda.grid(1), dense.size, cuda.gridsize(1)):
        memory[place(i, start, shape, strides)] = dense[i]


gather, scatter = numba.cuda.jit(gather), numba.cuda.jit(scatter)
