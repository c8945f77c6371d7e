"""How the threads of a block share a task, and what is compiled into a kernel."""

from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import numpy as np

from nbbn.core import rules
from nbbn.kernels import channel
from nbbn.kernels.channel import BATCH_MEAN, COUNT, M2, SQUARES
from nbbn.kernels.cuda.memory import vector
from nbbn.kernels.cuda.target import cuda, device, index_type

AHEAD = 64  # bytes of numbers that a thread reads before it waits for any: enough to hide the latency, few registers
COLUMNS = 32  # threads of a block side by side in rows, at most: a warp reads one piece of a row
# A view of elements: the address of the first, and the strides in bytes.
ADDRESS, S_R0, S_K0, S_R1, S_K1 = range(5)
VIEW_SIZE = 5


@dataclass(frozen=True)
class Variant:
    """What is compiled into a kernel.

    dtype: of the elements. rows: whether statistics lie side by side. width: elements of one access. sums: dtype of the
    sums of a few elements. threads: of a block. state: dtype of the state; None for that of the statistics. short:
    whether r0 counts neighbours, and not r1, where statistics do not lie side by side. Then: which arguments and
    options there are, and whether the statistics are constants. wide: whether indices have 64 bits.
    """

    dtype: np.dtype
    rows: bool
    width: int
    sums: np.dtype
    threads: int
    state: np.dtype | None = None
    short: bool = False
    weights: bool = False
    adjustment: bool = False
    residual: bool = False
    relu: bool = False
    renorm: bool = False
    debias: bool = False
    skip: bool = False
    dz: bool = False
    frozen: bool = False
    wide: bool = False

    @property
    def statistic(self) -> np.dtype:
        return np.dtype(np.float64 if self.dtype.itemsize == 8 else np.float32)

    @property
    def own(self) -> int:
        """Statistics of a thread."""
        return self.width if self.rows else 1

    @property
    def unroll(self) -> int:
        """Accesses to the input that a thread makes before it waits for any."""
        return max(1, AHEAD // (self.width * self.statistic.itemsize))

    @property
    def unroll_beside(self) -> int:
        """The same where there are accesses to other operands at once, which need registers, too."""
        return max(1, self.unroll // 2) if self.residual or self.adjustment else self.unroll


@device
def at(array, r0, k0, r1, k1):
    """The address of an element."""
    return array[ADDRESS] + r0 * array[S_R0] + k0 * array[S_K0] + r1 * array[S_R1] + k1 * array[S_K1]


@device
def output_of(forward, s):
    """Mean, scale, shift, gamma and beta of the output of a thread's statistic; the last two only mean something where
    there is an adjustment."""
    mean, scale, shift = forward[channel.Y_MEAN, s], forward[channel.Y_SCALE, s], forward[channel.Y_SHIFT, s]
    return mean, scale, shift, forward[channel.Y_GAMMA, s], forward[channel.Y_BETA, s]


@device
def is_last(counters, family, blocks):
    """Whether this block is the last of `blocks` to come here; it sees what the others have written before."""
    last = cuda.shared.array(1, np.int32)
    cuda.threadfence()
    cuda.syncthreads()
    if cuda.threadIdx.x == 0 and cuda.threadIdx.y == 0:
        most = np.uint32(blocks - 1)
        last[0] = 1 if cuda.atomic.inc(counters, family, most) == most else 0
    cuda.syncthreads()
    cuda.threadfence()
    return last[0] != 0


@device
def combine_moments(a, i, b, j):
    """Join the moments in column j of b to those in column i of a."""
    own = a[COUNT, i], a[BATCH_MEAN, i], a[M2, i], a[SQUARES, i]
    a[COUNT, i], a[BATCH_MEAN, i], a[M2, i], a[SQUARES, i] = rules.combine(
        *own, b[COUNT, j], b[BATCH_MEAN, j], b[M2, j], b[SQUARES, j]
    )


@lru_cache(maxsize=16)
def block_functions(rows: bool, short: bool, threads: int, wide: bool) -> SimpleNamespace:
    """How the threads of a block share its work."""
    index = index_type(wide)

    @device
    def walk(bounds, width):
        """The first r0 of this thread and its step, the first r1 and its step, and k1; without a column, no r0."""
        x, y, ys = index(cuda.threadIdx.x), index(cuda.threadIdx.y), index(cuda.blockDim.y)
        if rows:
            k1 = index(bounds.k1_begin + x * width)
            first = bounds.r0_begin if k1 < bounds.k1_end else bounds.r0_end
            return first, index(1), index(bounds.r1_begin + y), ys, k1
        across, step = x * width, index(cuda.blockDim.x * width)
        if short:
            return index(bounds.r0_begin + across), step, index(bounds.r1_begin + y), ys, index(0)
        return index(bounds.r0_begin + y), ys, index(bounds.r1_begin + across), step, index(0)

    @device
    def is_writer():
        """Whether this thread writes what the block, or in rows its column, has in common."""
        return cuda.threadIdx.y == 0 and (rows or cuda.threadIdx.x == 0)

    def tree(add):
        """A function that joins `count` values of each of the block's threads, of those of one column in rows, in
        `values`. add(shared, thread, other, count): join those of the other to those of the thread."""

        @device
        def join(values, count):
            shared = cuda.shared.array((4, threads), np.float64)
            x, width = cuda.threadIdx.x, cuda.blockDim.x * cuda.blockDim.y
            thread, least = cuda.threadIdx.y * cuda.blockDim.x + x, cuda.blockDim.x if rows else 1
            for i in range(count):
                shared[i, thread] = values[i]
            cuda.syncthreads()
            step = width // 2
            while step >= least:
                if thread < step:
                    add(shared, thread, thread + step, count)
                cuda.syncthreads()
                step //= 2
            for i in range(count):
                values[i] = shared[i, x if rows else 0]
            cuda.syncthreads()

        return join

    @device
    def add_sums(shared, thread, other, count):
        for i in range(count):
            shared[i, thread] += shared[i, other]

    @device
    def add_moments(shared, thread, other, count):
        combine_moments(shared, thread, shared, other)

    return SimpleNamespace(walk=walk, is_writer=is_writer, block_sum=tree(add_sums), block_moments=tree(add_moments))


@lru_cache(maxsize=256)
def input_functions(v: Variant, needs_x: bool) -> SimpleNamespace:
    """What a thread reads for an element of the output, and the parts of it: None, which is a type to the rules, where
    there is no such operand."""
    elements, width, fused, adjusted = vector(v.dtype, v.width), v.width, v.residual, v.adjustment
    words, fetch, decode = elements.words, elements.fetch, elements.decode
    fetch_operand = vector(v.statistic, width).fetch

    @device
    def fetch_inputs(x, residual, a, b, r0, k0, r1, k1, raw, raw_residual, av, bv, u):
        """The u-th access to each array. a and b have the statistics' dtype: they are values as they are."""
        if needs_x:
            fetch(at(x, r0, k0, r1, k1), raw, u * words)
        if fused:
            fetch(at(residual, r0, k0, r1, k1), raw_residual, u * words)
        if adjusted:
            fetch_operand(at(a, r0, k0, r1, k1), av, u * width)
            fetch_operand(at(b, r0, k0, r1, k1), bv, u * width)

    @device
    def decode_inputs(raw, raw_residual, u, values, rv):
        """What the u-th access has found, as numbers."""
        if needs_x:
            decode(raw, u * words, values)
        if fused:
            decode(raw_residual, u * words, rv)

    of_residual, of_adjustment, of_weights = (
        device((lambda values, i: values[i]) if there else (lambda values, i: None))
        for there in (fused, adjusted, v.weights)
    )
    return SimpleNamespace(
        fetch=fetch_inputs,
        decode=decode_inputs,
        of_residual=of_residual,
        of_adjustment=of_adjustment,
        of_weights=of_weights,
    )
