"""How the threads of a block share a task, and what is compiled into a kernel."""

from collections import namedtuple
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import numpy as np

from nbbn.core import rules
from nbbn.kernels import channel
from nbbn.kernels.channel import BATCH_MEAN, COUNT, M2, SQUARES
from nbbn.kernels.cuda.memory import vector
from nbbn.kernels.cuda.target import cuda, device

ELEMENTS = 16  # that a thread reads before it waits for any: enough to hide the latency, few enough for its registers
# What a step is told about its loops. The steps of tasks.py; how many families of tiles there are, which share their
# channels; how many chunks R0 x R1 is cut into, tiles K0 x K1, and pieces R1 and K1; the K0 of one slice of R0.
Grid = namedtuple("Grid", "r0_step r1_step k1_step families chunks tiles r1_pieces k1_pieces slice_k0")
# A view of elements: the address of the first, and the strides in bytes.
ADDRESS, S_R0, S_K0, S_R1, S_K1 = range(5)
VIEW_SIZE = 5


@dataclass(frozen=True)
class Variant:
    """What is compiled into a kernel.

    dtype: of the elements. rows: whether statistics lie side by side. width: elements of one access. sums: dtype of the
    sums of a few elements. threads: of a block. state: dtype of the state; None for that of the statistics. short:
    whether r0 counts neighbours, and not r1, where statistics do not lie side by side. Then: which arguments and
    options there are, and whether the statistics are constants.
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
        return max(1, min(4, ELEMENTS // self.width))

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
def block_functions(rows: bool, short: bool, threads: int) -> SimpleNamespace:
    """How the threads of a block share its work."""

    @device
    def walk(bounds, width):
        """The first r0 of this thread and its step, the first r1 and its step, and k1; without a column, no r0."""
        x, y = np.int64(cuda.threadIdx.x), np.int64(cuda.threadIdx.y)
        if rows:
            k1 = bounds.k1_begin + x * width
            first = bounds.r0_begin if k1 < bounds.k1_end else bounds.r0_end
            return first, np.int64(1), bounds.r1_begin + y, cuda.blockDim.y, k1
        across, step = x * width, np.int64(cuda.blockDim.x * width)
        if short:
            return bounds.r0_begin + across, step, bounds.r1_begin + y, cuda.blockDim.y, np.int64(0)
        return bounds.r0_begin + y, np.int64(cuda.blockDim.y), bounds.r1_begin + across, step, np.int64(0)

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
    read, read_operand = vector(v.dtype, v.width).read, vector(v.statistic, v.width).read
    fused, adjusted = v.residual, v.adjustment

    @device
    def read_inputs(x, residual, a, b, r0, k0, r1, k1, values, rv, av, bv, i):
        """`width` elements of each array to the i-th place of its values."""
        if needs_x:
            read(at(x, r0, k0, r1, k1), values, i)
        if fused:
            read(at(residual, r0, k0, r1, k1), rv, i)
        if adjusted:
            read_operand(at(a, r0, k0, r1, k1), av, i)
            read_operand(at(b, r0, k0, r1, k1), bv, i)

    of_residual, of_adjustment, of_weights = (
        device((lambda values, i: values[i]) if there else (lambda values, i: None))
        for there in (fused, adjusted, v.weights)
    )
    return SimpleNamespace(
        read_inputs=read_inputs, of_residual=of_residual, of_adjustment=of_adjustment, of_weights=of_weights
    )
