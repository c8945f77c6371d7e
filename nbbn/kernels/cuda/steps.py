"""The steps of batch normalization as CUDA kernels: reduce and channel in one launch, apply in another, or all in one.

A block of (x, y) threads has one task at a time, a chunk of the values of a tile of statistics (tasks.py).
Where statistics lie side by side (rows), x runs over them and y over their values; where the values of a statistic do
(planes), x and y both run over them. A thread takes `width` neighbours at once and adds a few of them up before it
adds that to float64 sums, the sums of a block's threads are a tree, and those of the chunks are added in their order,
by whichever block is the last of a family: the tiles that have the same channels. So the order in which blocks finish
changes no bit.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba.cuda import types

from nbbn.core import rules
from nbbn.kernels import channel
from nbbn.kernels.cuda import channel as middle
from nbbn.kernels.cuda.apply import apply_functions
from nbbn.kernels.cuda.blocks import VIEW_SIZE, Grid, Variant, block_functions, is_last
from nbbn.kernels.cuda.memory import VECTOR_BYTES, divide, matrices, vector
from nbbn.kernels.cuda.reduce import reduce_functions
from nbbn.kernels.cuda.target import cuda, device
from nbbn.kernels.cuda.tasks import bounds_of

# The small arrays of a step, by address: see kernels/channel.py. Sums or moments of chunks (chunks, 4, statistics) are
# float64; counters are uint32 and zero.
_FORWARD = ("partial", "counters", "params", "state", "hyper", "new_state")
MEMORY = (*_FORWARD, "moments", "saved", "coefficients", "sums", "dparams")
PARTIAL, COUNTERS, PARAMS, STATE, HYPER, NEW_STATE, MOMENTS, SAVED, COEFFICIENTS, SUMS, DPARAMS = range(11)


def signature(step: str, v: Variant) -> Any:
    """Of a kernel: its views, shape, grid, memory, the number of channels and epsilon."""
    view = types.UniTuple(types.int64, VIEW_SIZE)
    grid = types.NamedUniTuple(types.int64, len(Grid._fields), Grid)
    sizes = [types.UniTuple(types.int64, 4), grid, types.UniTuple(types.int64, len(MEMORY))]
    real = types.float64 if v.statistic.itemsize == 8 else types.float32
    return types.void(*[view] * len(VIEWS[step]), *sizes, types.int64, real)


@lru_cache(maxsize=256)
def steps(v: Variant) -> dict[str, Callable[..., None]]:
    """The kernels as Python functions, by name."""
    own, width, relu = v.own, v.width, v.relu
    renorm, debias, skip = v.renorm or None, v.debias or None, v.skip or None
    a_or_none = 1 if v.adjustment else None
    reducing, applying = reduce_functions(v), apply_functions(v)
    sum_moments, sum_gradient_of_task = reducing.sum_moments, reducing.sum_gradient
    normalize_task, input_gradient_task = applying.normalize, applying.input_gradient
    gradient_sums = channel.GRADIENT_ROWS[v.adjustment]
    forward_rows, real = channel.OUTPUT_ROWS[v.adjustment], v.statistic.type
    most, real_size = real(np.finfo(v.statistic).max), v.statistic.itemsize
    piece = min(own, VECTOR_BYTES // real_size)
    read_piece = vector(v.statistic, piece).read
    state_rows = (5 if v.renorm else 2) + (2 if v.debias else 0)
    # What makes an array is no function of its own: Numba's do not return on a GPU what they have made.
    array, array64, counters_at = matrices(v.statistic), matrices(np.float64), matrices(np.uint32)
    state_array = matrices(v.state or v.statistic)
    add_chunks, combine_chunks, train_of, freeze_of = (
        middle.add_chunks,
        middle.combine_chunks,
        middle.train,
        middle.freeze,
    )
    coefficients_of, parameter_gradients = middle.output_coefficients, middle.parameter_gradients
    input_coefficients_of = middle.input_coefficients
    walk = block_functions(v.rows, v.short, v.threads).walk

    @device
    def task(block, grid):
        """A block's chunk, tile, family and how many blocks the family has."""
        chunk, tile = divide(block, grid.tiles)
        _, family = divide(tile, grid.families)
        members, _ = divide(grid.tiles, grid.families)
        return chunk, tile, family, grid.chunks * members

    @device
    def in_order():
        return np.int64(cuda.blockIdx.x)

    @device
    def from_the_end():
        """For what goes over the input once more: the cache still has what was read last."""
        return np.int64(cuda.gridDim.x) - 1 - np.int64(cuda.blockIdx.x)

    @device
    def channels_of(family, shape, grid, channels):
        """This thread's first channel of a family, the one after the last, and how far it is to the next one."""
        first, last, bounds = np.int64(0), channels, bounds_of(0, family, shape, grid)
        if grid.families > 1:
            first, last = bounds.row * shape[3] + bounds.k1_begin, bounds.row * shape[3] + bounds.k1_end
        thread = cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        return first + thread, last, cuda.blockDim.x * cuda.blockDim.y

    @device
    def thread_statistics(bounds, shape):
        """The first statistic of this thread, and whether it has any: none beside the last column."""
        k1 = walk(bounds, width)[4]
        return bounds.row * shape[3] + k1, k1 < bounds.k1_end

    # -- of one task ---------------------------------------------------------------------------------------------------

    @device
    def reduce_moments(x, weights, chunk, tile, shape, grid, memory):
        statistics, bounds = shape[1] * shape[3], bounds_of(chunk, tile, shape, grid)
        partial = array64(memory[PARTIAL], (grid.chunks, channel.MOMENT_ROWS, statistics))
        first, _ = thread_statistics(bounds, shape)
        sum_moments(x, weights, bounds, first, partial)

    @device
    def finish_moments(c, shape, grid, memory, channels):
        """The moments of one channel, in all groups."""
        chunks, statistics = grid.chunks, shape[1] * shape[3]
        partial = array64(memory[PARTIAL], (chunks, channel.MOMENT_ROWS, statistics))
        moments = array64(memory[MOMENTS], (channel.MOMENT_ROWS, statistics))
        s = c
        while s < statistics:
            combine_chunks(s, partial, moments)
            s += channels

    @device
    def train_channel(c, statistics, memory, channels):
        """From the moments of one channel to the new state and the coefficients of the output."""
        params, state = array(memory[PARAMS], (2, channels)), state_array(memory[STATE], (state_rows, channels))
        new_state = state_array(memory[NEW_STATE], (state_rows, channels))
        hyper = array64(memory[HYPER], (channel.HYPER_SIZE,))
        saved = array64(memory[SAVED], (channel.SAVED_ROWS, statistics))
        coefficients = array(memory[COEFFICIENTS], (forward_rows, statistics))
        train_of(c, params, state, hyper, a_or_none, renorm, debias, skip, new_state, saved, coefficients)

    @device
    def finish_training(c, shape, grid, memory, channels):
        """From the sums of one channel to the new state and the coefficients of the output."""
        finish_moments(c, shape, grid, memory, channels)
        train_channel(c, shape[1] * shape[3], memory, channels)

    @device
    def read_coefficients(bounds, shape, memory, rows, coefficients):
        """Those of this thread's statistics; 0 where it has none."""
        statistics, (first, inside) = shape[1] * shape[3], thread_statistics(bounds, shape)
        for row in range(rows):
            address = memory[COEFFICIENTS] + (row * statistics + first) * real_size
            for s in range(0, own, piece):
                if inside:
                    read_piece(address + s * real_size, coefficients[row], s)
                else:
                    for lane in range(piece):
                        coefficients[row, s + lane] = 0

    @device
    def apply_forward(x, residual, a, b, y, chunk, tile, shape, grid, memory):
        bounds = bounds_of(chunk, tile, shape, grid)
        forward = cuda.local.array((5, own), real)
        read_coefficients(bounds, shape, memory, forward_rows, forward)
        normalize_task(x, residual, a, b, y, bounds, forward)

    @device
    def forward_of_thread(bounds, shape, memory, forward):
        """The coefficients of the output once more, for the gate of its activation; without one only the mean."""
        saved = array64(memory[SAVED], (channel.SAVED_ROWS, shape[1] * shape[3]))
        first, inside = thread_statistics(bounds, shape)
        for s in range(own):
            if relu and inside:
                coefficients_of(first + s, s, saved, a_or_none, forward)
            else:
                forward[channel.Y_MEAN, s] = saved[channel.BATCH_MEAN, first + s] if inside else 0.0

    @device
    def reduce_gradient(x, dy, residual, weights, a, b, chunk, tile, shape, grid, memory):
        statistics, bounds = shape[1] * shape[3], bounds_of(chunk, tile, shape, grid)
        partial = array64(memory[PARTIAL], (grid.chunks, gradient_sums, statistics))
        forward = cuda.local.array((5, own), real)
        forward_of_thread(bounds, shape, memory, forward)
        first, _ = thread_statistics(bounds, shape)
        mean = array64(memory[SAVED], (channel.SAVED_ROWS, statistics))[channel.BATCH_MEAN]
        sum_gradient_of_task(dy, x, residual, weights, a, b, bounds, first, mean, forward, partial)

    @device
    def add_up(c, partial, memory, channels):
        """The sums of one channel's gradient, those of its first chunk then, and the gradients of its parameters."""
        statistics = partial.shape[2]
        s = c
        while s < statistics:
            add_chunks(s, partial)
            s += channels
        saved, dparams = array64(memory[SAVED], (channel.SAVED_ROWS, statistics)), array(memory[DPARAMS], (2, channels))
        parameter_gradients(c, partial[0], saved, a_or_none, dparams)

    @device
    def finish_sums(c, shape, grid, memory, channels):
        """The same, and the sums are written."""
        statistics = shape[1] * shape[3]
        partial = array64(memory[PARTIAL], (grid.chunks, gradient_sums, statistics))
        target = array64(memory[SUMS], (gradient_sums, statistics))
        add_up(c, partial, memory, channels)
        s = c
        while s < statistics:
            for row in range(gradient_sums):
                target[row, s] = partial[0, row, s]
            s += channels

    @device
    def input_coefficients(c, sums, memory, channels):
        """From the sums of one channel to the coefficients of dx."""
        statistics = sums.shape[1]
        saved = array64(memory[SAVED], (channel.SAVED_ROWS, statistics))
        input_coefficients_of(c, channels, sums, saved, array(memory[COEFFICIENTS], (4, statistics)))

    @device
    def finish_gradient(c, shape, grid, memory, channels):
        """From the sums of one channel's gradient to the coefficients of dx."""
        statistics = shape[1] * shape[3]
        partial = array64(memory[PARTIAL], (grid.chunks, gradient_sums, statistics))
        add_up(c, partial, memory, channels)
        input_coefficients(c, partial[0], memory, channels)

    @device
    def apply_gradient(x, dy, residual, weights, a, b, dx, dz, chunk, tile, shape, grid, memory):
        bounds = bounds_of(chunk, tile, shape, grid)
        forward, backward = cuda.local.array((5, own), real), cuda.local.array((4, own), real)
        if relu:
            forward_of_thread(bounds, shape, memory, forward)
        read_coefficients(bounds, shape, memory, 4, backward)
        input_gradient_task(dy, x, residual, weights, a, b, dx, dz, bounds, forward, backward)

    # -- two launches: all blocks reduce, the last one of a family finishes; then all blocks apply ---------------------

    @device
    def channels_to_finish(family, blocks, shape, grid, memory, channels):
        """This thread's first channel, the one after the last, and the step; none unless its block is the last one."""
        if is_last(counters_at(memory[COUNTERS], (grid.families,)), family, blocks):
            return channels_of(family, shape, grid, channels)
        return np.int64(0), np.int64(0), 1

    def reduction(finish_channel):
        """A kernel that reduces the input, and then does this with each channel's sums."""

        def kernel(x, weights, shape, grid, memory, channels, epsilon):
            chunk, tile, family, blocks = task(in_order(), grid)
            reduce_moments(x, weights, chunk, tile, shape, grid, memory)
            first, last, step = channels_to_finish(family, blocks, shape, grid, memory, channels)
            c = first
            while c < last:
                finish_channel(c, shape, grid, memory, channels)
                c += step

        return kernel

    def gradient_reduction(finish_channel):
        """The same for the gradient."""

        def kernel(x, dy, residual, weights, a, b, shape, grid, memory, channels, epsilon):
            chunk, tile, family, blocks = task(in_order(), grid)
            reduce_gradient(x, dy, residual, weights, a, b, chunk, tile, shape, grid, memory)
            first, last, step = channels_to_finish(family, blocks, shape, grid, memory, channels)
            c = first
            while c < last:
                finish_channel(c, shape, grid, memory, channels)
                c += step

        return kernel

    def normalize(x, residual, a, b, y, shape, grid, memory, channels, epsilon):
        chunk, tile, _, _ = task(from_the_end(), grid)
        apply_forward(x, residual, a, b, y, chunk, tile, shape, grid, memory)

    def infer(x, residual, y, shape, grid, memory, channels, epsilon):
        chunk, tile, _, _ = task(in_order(), grid)
        bounds = bounds_of(chunk, tile, shape, grid)
        params, state = array(memory[PARAMS], (2, channels)), state_array(memory[STATE], (state_rows, channels))
        forward = cuda.local.array((5, own), real)
        first, inside = thread_statistics(bounds, shape)
        for s in range(own):
            c = first + s if inside else 0
            gamma, mean, variance = params[channel.GAMMA, c], state[channel.MEAN, c], state[channel.VARIANCE, c]
            forward[channel.Y_MEAN, s] = mean if abs(mean) <= most else real(0)  # of a wider state
            scale, shift = rules.inference_terms(mean, forward[channel.Y_MEAN, s], variance, epsilon, gamma)
            forward[channel.Y_SCALE, s] = scale
            forward[channel.Y_SHIFT, s] = shift + params[channel.BETA, c]
        normalize_task(x, residual, x, x, y, bounds, forward)

    def input_gradient(x, dy, residual, weights, a, b, dx, dz, shape, grid, memory, channels, epsilon):
        chunk, tile, _, _ = task(from_the_end(), grid)
        apply_gradient(x, dy, residual, weights, a, b, dx, dz, chunk, tile, shape, grid, memory)

    # -- the middle stage by itself: one thread per channel; shape[3] is the number of statistics ----------------------

    @device
    def own_channel(grid):
        return np.int64(cuda.blockIdx.x) * grid.k1_step + cuda.threadIdx.x

    def finish(shape, grid, memory, channels, epsilon):
        c, statistics = own_channel(grid), shape[3]
        moments = array64(memory[MOMENTS], (channel.MOMENT_ROWS, statistics))
        saved = array64(memory[SAVED], (channel.SAVED_ROWS, statistics))
        if c < channels:
            s = c
            while s < statistics:
                for row in range(channel.MOMENT_ROWS):
                    saved[row, s] = moments[row, s]
                s += channels
            train_channel(c, statistics, memory, channels)

    def freeze(shape, grid, memory, channels, epsilon):
        c = own_channel(grid)
        params, state = array(memory[PARAMS], (2, channels)), state_array(memory[STATE], (state_rows, channels))
        saved = array64(memory[SAVED], (channel.SAVED_ROWS, channels))
        hyper = array64(memory[HYPER], (channel.HYPER_SIZE,))
        if c < channels:
            freeze_of(c, params, state, hyper, saved)
            # As infer() has it, to the bit: the gradient must find the same outputs positive.
            saved[channel.RSTD, c] = rules.reciprocal_stddev(state[channel.VARIANCE, c], epsilon)

    def spread_gradient(shape, grid, memory, channels, epsilon):
        c = own_channel(grid)
        if c < channels:
            input_coefficients(c, array64(memory[SUMS], (gradient_sums, shape[3])), memory, channels)

    # -- what several inputs have, together: a thread per statistic; shape[3] is how many all parts have ---------

    def merge_moments(shape, grid, memory, channels, epsilon):
        s, (parts, _) = own_channel(grid), divide(shape[3], channels)
        if s < channels:
            part = array64(memory[PARTIAL], (parts, channel.MOMENT_ROWS, channels))
            n, mean, m2 = part[0, channel.COUNT, s], part[0, channel.BATCH_MEAN, s], part[0, channel.M2, s]
            squares, p = part[0, channel.SQUARES, s], 1
            while p < parts:
                next_n, next_mean = part[p, channel.COUNT, s], part[p, channel.BATCH_MEAN, s]
                next_m2, next_squares = part[p, channel.M2, s], part[p, channel.SQUARES, s]
                n, mean, m2, squares = rules.combine(n, mean, m2, squares, next_n, next_mean, next_m2, next_squares)
                p += 1
            moments = array64(memory[MOMENTS], (channel.MOMENT_ROWS, channels))
            moments[channel.COUNT, s], moments[channel.BATCH_MEAN, s] = n, mean
            moments[channel.M2, s], moments[channel.SQUARES, s] = m2, squares

    def add_sums(shape, grid, memory, channels, epsilon):
        s, (parts, _) = own_channel(grid), divide(shape[3], channels)
        if s < channels:
            part = array64(memory[PARTIAL], (parts, gradient_sums, channels))
            sums = array64(memory[SUMS], (gradient_sums, channels))
            for row in range(gradient_sums):
                total, p = part[0, row, s], 1
                while p < parts:
                    total += part[p, row, s]
                    p += 1
                sums[row, s] = total

    # -- one launch: a block has a family for itself; a chunk is a whole statistic -------------------------------------

    def train(x, residual, weights, a, b, y, shape, grid, memory, channels, epsilon):
        family, tiles = np.int64(cuda.blockIdx.x), grid.tiles
        tile = family
        while tile < tiles:
            reduce_moments(x, weights, 0, tile, shape, grid, memory)
            tile += grid.families
        cuda.syncthreads()
        first, last, step = channels_of(family, shape, grid, channels)
        c = first
        while c < last:
            finish_training(c, shape, grid, memory, channels)
            c += step
        cuda.syncthreads()
        tile = family
        while tile < tiles:
            apply_forward(x, residual, a, b, y, 0, tile, shape, grid, memory)
            tile += grid.families

    def backward(x, dy, residual, weights, a, b, dx, dz, shape, grid, memory, channels, epsilon):
        family, tiles = np.int64(cuda.blockIdx.x), grid.tiles
        tile = family
        while tile < tiles:
            reduce_gradient(x, dy, residual, weights, a, b, 0, tile, shape, grid, memory)
            tile += grid.families
        cuda.syncthreads()
        first, last, step = channels_of(family, shape, grid, channels)
        c = first
        while c < last:
            finish_gradient(c, shape, grid, memory, channels)
            c += step
        cuda.syncthreads()
        tile = family
        while tile < tiles:
            apply_gradient(x, dy, residual, weights, a, b, dx, dz, 0, tile, shape, grid, memory)
            tile += grid.families

    found = (normalize, train, infer, input_gradient, backward, finish, freeze, spread_gradient)
    return {f.__name__: f for f in (*found, merge_moments, add_sums)} | {
        "reduce": reduction(finish_moments),
        "train_reduce": reduction(finish_training),
        "sum_gradient": gradient_reduction(finish_sums),
        "backward_reduce": gradient_reduction(finish_gradient),
    }


def _views_of(kernel: Callable[..., None]) -> tuple[str, ...]:
    names = tuple(inspect.signature(kernel).parameters)
    return names[: names.index("shape")]


_ANY = Variant(np.dtype(np.float32), rows=True, width=1, sums=np.dtype(np.float64), threads=32)
# The views of each kernel, by their names in the engine: its first arguments, whatever the variant is.
VIEWS = {name: _views_of(kernel) for name, kernel in steps(_ANY).items()}
