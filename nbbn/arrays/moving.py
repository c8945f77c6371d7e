"""What nbbn's own kernels do with arrays of a GPU, of any library, strides and dtypes: copies, casts and small numbers.

Everything is queued in the stream that the array's library uses now, and nothing waits.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from nbbn.arrays.device import DeviceArray
from nbbn.core.layout import Sizes, merged
from nbbn.kernels.cuda import strided
from nbbn.kernels.cuda.kernel import Kernel
from nbbn.streams.driver import primary_context
from nbbn.streams.launching import launch_once


def start(kernel: Kernel, like: DeviceArray, blocks: int, threads: int, *arguments: Any) -> None:
    """Launch a kernel in the present stream of an array's library. arguments: as in launch_once()."""
    with primary_context(like.device):
        launch_once(kernel, like.device, blocks, threads, like.library.stream(like.device), arguments)
    like.library.finish(like.device)


def start_over(kernel: Kernel, like: DeviceArray, size: int, *arguments: Any) -> None:
    """The same for one of kernels.cuda.strided, which gets the number of elements last."""
    if size:
        blocks = min(strided.BLOCKS, -(-size // strided.THREADS))
        start(kernel, like, blocks, strided.THREADS, *arguments, size)


def copy(source: DeviceArray, target: DeviceArray) -> None:
    """Write the elements of `source` to `target`, an array of the same shape on the same GPU, which has no memory in
    common with it. target: of floats or of int64, or of the source's dtype."""
    same = source.dtype == target.dtype
    pair = (_carrier(source.dtype),) * 2 if same else (source.dtype, target.dtype)
    sizes, (of_source, of_target) = merged(target.shape, [source.strides, target.strides])
    kernel = strided.copy(*pair, len(sizes))
    start_over(kernel, target, target.size, source.address, of_source, target.address, of_target, sizes)


def transposed(array: DeviceArray, sizes: Sizes, order: Sizes) -> DeviceArray:
    """The array seen with these sizes, which may divide the first dimension, and transposed."""
    strides = array.strides if len(sizes) == array.ndim else (array.strides[0] * sizes[1], *array.strides)
    return replace(array, shape=tuple(sizes[i] for i in order), strides=tuple(strides[i] for i in order))


def add(values: DeviceArray, total: DeviceArray) -> None:
    """total += values, of float32 or float64 without gaps."""
    start_over(strided.add(total.dtype), total, total.size, values.address, total.address)


def first_steps(lengths: DeviceArray, weights: DeviceArray) -> None:
    """Write weights (samples, steps): 1 for as many steps of each sample as `lengths` say, else 0."""
    kernel, steps = strided.first_steps(weights.dtype), weights.shape[1]
    start_over(kernel, weights, weights.size, lengths.address, lengths.strides[0], weights.address, steps)


def numbers(values: np.ndarray, target: DeviceArray) -> None:
    """Write a few float64, which travel with the launch."""
    bits = tuple(values.view(np.int64).tolist())
    start_over(strided.numbers(len(bits)), target, target.size, bits, target.address)


@lru_cache(maxsize=64)
def _carrier(dtype: np.dtype) -> np.dtype:
    """An integer of the same size: what is not computed with goes through as it is."""
    return np.dtype(f"u{dtype.itemsize}")
