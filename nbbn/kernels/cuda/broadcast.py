"""The gradient of broadcasting: terms of elements, summed to the shape of what was broadcast against them.

The elements of one sum are cut into chunks, and a chunk is added up by a few threads of a block. The cuts depend on the
shapes alone, so sums are the same to the last bit, whichever block is faster.
"""

from collections import namedtuple
from functools import lru_cache
from typing import Any

import numpy as np
from numba.cuda import types

from nbbn.core import rules
from nbbn.kernels.channel import BATCH_MEAN, RSTD, USED_GAMMA, D, R
from nbbn.kernels.cuda.elements import element, split
from nbbn.kernels.cuda.kernel import Kernel
from nbbn.kernels.cuda.target import cuda, device

# How sums are cut. outputs: how many there are; values: of each; chunk: values of a chunk; chunks: of each sum. across:
# sums that a block has side by side; lanes: threads for each of them, a power of 2; tiles: blocks for all of them.
Cut = namedtuple("Cut", "outputs values chunk chunks across lanes tiles")


@lru_cache(maxsize=256)
def sums(
    name: str,
    dtype: np.dtype,
    weights_dtype: np.dtype | None,
    out_dtype: np.dtype,
    rows: bool,
    threads: int,
    ranks: tuple[int, int],
) -> Kernel:
    """A kernel that sums "scale" or "bias", the terms of the gradient of an adjustment, or "value", the elements
    themselves, which are float64.

    rows: whether neighbours in memory belong to different sums. ranks: how many dimensions have sums of their own, and
    along how many there is one.
    """
    whole, four = types.int64, types.UniTuple(types.int64, 4)
    kept, reduced = (types.UniTuple(whole, rank) for rank in ranks)
    kept_strides, reduced_strides = (types.UniTuple(sizes, 4) for sizes in (kept, reduced))
    cut = types.NamedUniTuple(whole, len(Cut._fields), Cut)
    signature = types.void(four, kept, kept_strides, reduced, reduced_strides, whole, cut, whole)
    choices = name, weights_dtype, out_dtype, rows, threads
    return Kernel("sums", dtype.name, choices, signature, lambda: _sums(name, dtype, *choices[1:]))


def _sums(
    name: str, dtype: np.dtype, weights_dtype: np.dtype | None, out_dtype: np.dtype, rows: bool, threads: int
) -> Any:
    term, write, itemsize = _term(name, dtype, weights_dtype), element(out_dtype).write, out_dtype.itemsize

    def sums(arrays, kept, kept_strides, reduced, reduced_strides, saved_row, cut, out):
        """arrays: the addresses of x, dz, the weights and `saved`. kept, reduced: the sizes of
        dimensions; with the strides of each of the arrays. saved_row: the bytes of a row of `saved`. out: (chunks,
        outputs)."""
        shared = cuda.shared.array(threads, np.float64)
        thread = np.int64(cuda.threadIdx.x)
        a, b = split(thread, cut.across if rows else cut.lanes)
        own, lane = (b, a) if rows else (a, b)
        for task in range(np.int64(cuda.blockIdx.x), cut.tiles * cut.chunks, np.int64(cuda.gridDim.x)):
            chunk, tile = split(task, cut.tiles)
            output, total = tile * cut.across + own, 0.0
            if output < cut.outputs:
                begin = places(output, arrays, kept, kept_strides)
                end = min(cut.values, (chunk + 1) * cut.chunk)
                for i in range(chunk * cut.chunk + lane, end, cut.lanes):
                    total += term(places(i, begin, reduced, reduced_strides), saved_row)
            shared[lane * cut.across + own] = total
            cuda.syncthreads()
            step = cut.lanes >> 1
            while step > 0:
                if lane < step:
                    shared[lane * cut.across + own] += shared[(lane + step) * cut.across + own]
                cuda.syncthreads()
                step >>= 1
            if lane == 0 and output < cut.outputs:
                write(out + (chunk * cut.outputs + output) * itemsize, shared[own])
            cuda.syncthreads()

    return sums


@device
def places(i, starts, shape, strides):
    """The addresses of the i-th element, in the order of `shape`, of each of four arrays."""
    a, b, c, d = starts
    of_a, of_b, of_c, of_d = strides
    last = len(shape) - 1
    for k in range(last):
        i, n = split(i, shape[last - k])
        a, b, c, d = a + n * of_a[last - k], b + n * of_b[last - k], c + n * of_c[last - k], d + n * of_d[last - k]
    return a + i * of_a[0], b + i * of_b[0], c + i * of_c[0], d + i * of_d[0]


def _term(name: str, dtype: np.dtype, weights_dtype: np.dtype | None) -> Any:
    read, read64 = element(dtype).read, element(np.dtype(np.float64)).read
    read_weight = None if weights_dtype is None else element(weights_dtype).read

    @device
    def gradient(places, row):
        """dz * gamma: the gradient of what the adjustment makes."""
        return np.float64(read(places[1])) * read64(places[3] + USED_GAMMA * row)

    @device
    def normalized(places, row):
        """x_hat * r + d, what the adjustment is made of."""
        saved = places[3]
        mean, rstd = read64(saved + BATCH_MEAN * row), read64(saved + RSTD * row)
        r, d = read64(saved + R * row), read64(saved + D * row)
        scale, shift = rules.output_terms(mean, mean, rstd, r, d, 1.0)
        return rules.normalize(np.float64(read(places[0])), mean, scale, shift)

    if read_weight is None:
        left_out = device(lambda places: False)
    else:
        left_out = device(lambda places: rules.is_left_out(np.float64(read(places[0])), read_weight(places[2])))
    of_scale = device(lambda p, row: 0.0 if left_out(p) else gradient(p, row) * normalized(p, row))
    of_bias = device(lambda p, row: 0.0 if left_out(p) else gradient(p, row))
    of_value = device(lambda p, row: read(p[0]))
    return {"scale": of_scale, "bias": of_bias, "value": of_value}[name]
