"""The steps of batch normalization as CUDA kernels: reduce and channel in one launch, apply in another, or all in one.

A block of (x, y) threads has one task at a time, a chunk of the values of a tile of statistics (kernels/tasks.py).
Where statistics lie side by side (rows), x runs over them and y over their values; where the values of a statistic do
(planes), x and y both run over them. A thread takes `width` neighbours at once and adds a few of them up before it
adds that to float64 sums, the sums of a block's threads are a tree, and those of the chunks are added in their order,
by whichever block is the last of a family: the tiles that have the same channels. So it does not matter which is when.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba.cuda import types

from nbbn import rules
from nbbn.kernels import channel, tasks
from nbbn.kernels.channel import BATCH_MEAN, BETA, COUNT, GAMMA, MEAN, MOMENTUM, RSTD, VARIANCE, D, R
from nbbn.kernels.cuda.apply import apply_functions
from nbbn.kernels.cuda.blocks import FAMILIES, GRID_SIZE, VIEW_SIZE, Variant, block_functions, is_last
from nbbn.kernels.cuda.memory import matrices
from nbbn.kernels.cuda.reduce import reduce_functions
from nbbn.kernels.cuda.target import cuda, device

# The small arrays of a step, by address: see kernels/channel.py; sums of chunks (chunks, sums, statistics) and shifts
# are float64, counters uint32 and zero. COPY gets the parameters as they are, for a gradient; SEEN counts the batches
# of a cumulative average, (2, C) float64 for mean and variance.
PARTIAL, SHIFTS, COUNTERS, PARAMS, STATE, HYPER, NEW_STATE, SAVED, COEFFICIENTS, DPARAMS, COPY, SEEN = range(12)
MEMORY_SIZE = 12
# The views of each step, by the names that the Dispatcher gives them.
VIEWS = {
    "moments": ("x", "weights"),
    "train_reduce": ("x", "weights"),
    "normalize": ("x", "residual", "a", "b", "y"),
    "train": ("x", "residual", "weights", "a", "b", "y"),
    "infer": ("x", "residual", "y"),
    "freeze": (),
    "backward_reduce": ("x", "dy", "residual", "a", "b"),
    "input_gradient": ("x", "dy", "residual", "weights", "a", "b", "dx", "dresidual"),
    "backward": ("x", "dy", "residual", "weights", "a", "b", "dx", "dresidual"),
}


def signature(step: str, v: Variant) -> Any:
    """Of a kernel: its views, shape, grid, memory, the number of channels and epsilon."""
    view = types.UniTuple(types.int64, VIEW_SIZE)
    sizes = [types.UniTuple(types.int64, n) for n in (4, GRID_SIZE, MEMORY_SIZE)]
    real = types.float64 if v.statistic.itemsize == 8 else types.float32
    return types.void(*[view] * len(VIEWS[step]), *sizes, types.int64, real)


@lru_cache(maxsize=256)
def steps(v: Variant) -> dict[str, Callable[..., None]]:
    """The kernels as Python functions, by name."""
    own, width, renorm, adjusted, relu = v.own, v.width, v.renorm or None, v.adjustment, v.relu
    cumulative = v.cumulative
    a_or_none = 1 if adjusted else None
    reduce, apply = reduce_functions(v), apply_functions(v)
    sum_moments, sum_gradient = reduce.sum_moments, reduce.sum_gradient
    normalize_task, input_gradient_task = apply.normalize, apply.input_gradient
    moment_sums, gradient_sums = 3 if v.weights else 2, 4 if adjusted else 2
    forward_rows, state_rows, real = 5 if adjusted else 3, 5 if v.renorm else 2, v.statistic.type
    array, array64, counters_at = matrices(v.statistic), matrices(np.float64), matrices(np.uint32)
    middle, cuts = channel.functions(device), tasks.functions(device)
    bounds_of, chunks_and_tiles = cuts.bounds_of, cuts.chunks_and_tiles
    add_chunks, batch_moments, train_channel = middle.add_chunks, middle.batch_moments, middle.train
    output_coefficients, backward_channel = middle.output_coefficients, middle.backward
    walk = block_functions(v.rows, v.short).walk

    @device
    def task(shape, grid):
        """This block's chunk, tile, family and how many blocks the family has."""
        chunks, tiles = chunks_and_tiles(shape, grid)
        block = np.int64(cuda.blockIdx.x)
        tile = block % tiles
        return block // tiles, tile, tile % grid[FAMILIES], chunks * (tiles // grid[FAMILIES])

    @device
    def channels_of(family, shape, grid, channels):
        """This thread's first channel of a family, the one after the last, and how far it is to the next one."""
        first, last, bounds = np.int64(0), channels, bounds_of(0, family, shape, grid)
        if grid[FAMILIES] > 1:
            first, last = bounds[1] * shape[3] + bounds[6], bounds[1] * shape[3] + bounds[7]
        thread = cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        return first + thread, last, cuda.blockDim.x * cuda.blockDim.y

    @device
    def thread_statistics(bounds, shape):
        """The first statistic of this thread, and whether it has any: none beside the last column."""
        k1 = walk(bounds, width)[4]
        return bounds[1] * shape[3] + k1, k1 < bounds[7]

    # -- of one task ---------------------------------------------------------------------------------------------------

    @device
    def reduce_moments(x, weights, chunk, tile, shape, grid, memory):
        statistics, bounds = shape[1] * shape[3], bounds_of(chunk, tile, shape, grid)
        partial = array64(memory[PARTIAL], (chunks_and_tiles(shape, grid)[0], moment_sums, statistics))
        first, _ = thread_statistics(bounds, shape)
        sum_moments(x, weights, bounds, first, array64(memory[SHIFTS], (statistics,)), partial)

    @device
    def finish_moments(c, shape, grid, memory, channels):
        """The moments of one channel, in all groups."""
        statistics, values = shape[1] * shape[3], np.float64(shape[0] * shape[2])
        partial = array64(memory[PARTIAL], (chunks_and_tiles(shape, grid)[0], moment_sums, statistics))
        shifts, saved = array64(memory[SHIFTS], (statistics,)), array64(memory[SAVED], (5, statistics))
        for s in range(c, statistics, channels):
            add_chunks(s, s + 1, partial)
            batch_moments(s, s + 1, partial[0], shifts, values, saved)

    @device
    def finish_training(c, shape, grid, memory, channels):
        """From the sums of one channel to the new state and the coefficients of the output."""
        finish_moments(c, shape, grid, memory, channels)
        statistics = shape[1] * shape[3]
        params, copy = array(memory[PARAMS], (2, channels)), array(memory[COPY], (2, channels))
        state, new_state = (
            array(memory[STATE], (state_rows, channels)),
            array(memory[NEW_STATE], (state_rows, channels)),
        )
        saved, coefficients = (
            array64(memory[SAVED], (5, statistics)),
            array(memory[COEFFICIENTS], (forward_rows, statistics)),
        )
        hyper, given = cuda.local.array(7, np.float64), array64(memory[HYPER], (7,))
        for i in range(7):
            hyper[i] = given[i]
        seen = array64(memory[SEEN], (2, channels if cumulative else 0))
        if cumulative:
            hyper[MOMENTUM] = seen[0, c] / (seen[0, c] + 1.0)
        train_channel(c, c + 1, params, state, hyper, a_or_none, renorm, new_state, saved, coefficients)
        if cumulative:
            batches = 0.0
            for s in range(c, statistics, channels):
                batches = 1.0 if saved[COUNT, s] > 0 else batches
            for part in range(2):
                seen[part, c] += batches
        copy[GAMMA, c] = params[GAMMA, c]
        copy[BETA, c] = params[BETA, c]

    @device
    def apply_forward(x, residual, a, b, y, chunk, tile, shape, grid, memory):
        bounds = bounds_of(chunk, tile, shape, grid)
        coefficients = array(memory[COEFFICIENTS], (forward_rows, shape[1] * shape[3]))
        forward = cuda.local.array((5, own), real)
        first, inside = thread_statistics(bounds, shape)
        for s in range(own):
            for row in range(forward_rows):
                forward[row, s] = coefficients[row, first + s] if inside else real(0)
        normalize_task(x, residual, a, b, y, bounds, forward)

    @device
    def forward_of_thread(bounds, shape, memory, channels, forward):
        """The coefficients of the output once more, for the gate of its activation; without one only the mean."""
        own_saved = cuda.local.array((5, own), np.float64)
        params, saved = array(memory[PARAMS], (2, channels)), array64(memory[SAVED], (5, shape[1] * shape[3]))
        first, inside = thread_statistics(bounds, shape)
        for s in range(own if relu else 0):
            c = (first + s) % channels if inside else 0
            for row in range(5):
                own_saved[row, s] = saved[row, first + s] if inside else 0.0
            output_coefficients(s, params[GAMMA, c], params[BETA, c], own_saved, a_or_none, forward)
        for s in range(0 if relu else own):
            forward[0, s] = saved[BATCH_MEAN, first + s] if inside else 0.0

    @device
    def reduce_gradient(x, dy, residual, a, b, chunk, tile, shape, grid, memory, channels):
        statistics, bounds = shape[1] * shape[3], bounds_of(chunk, tile, shape, grid)
        partial = array64(memory[PARTIAL], (chunks_and_tiles(shape, grid)[0], gradient_sums, statistics))
        forward = cuda.local.array((5, own), real)
        forward_of_thread(bounds, shape, memory, channels, forward)
        first, _ = thread_statistics(bounds, shape)
        mean = array64(memory[SAVED], (5, statistics))[BATCH_MEAN]
        sum_gradient(dy, x, residual, a, b, bounds, first, mean, forward, partial)

    @device
    def finish_gradient(c, shape, grid, memory, channels):
        """From the sums of one channel to the gradients of its parameters and the coefficients of dx."""
        statistics = shape[1] * shape[3]
        partial = array64(memory[PARTIAL], (chunks_and_tiles(shape, grid)[0], gradient_sums, statistics))
        for s in range(c, statistics, channels):
            add_chunks(s, s + 1, partial)
        params, dparams = array(memory[PARAMS], (2, channels)), array(memory[DPARAMS], (2, channels))
        saved, coefficients = array64(memory[SAVED], (5, statistics)), array(memory[COEFFICIENTS], (4, statistics))
        backward_channel(c, c + 1, partial[0], params, saved, coefficients, dparams)

    @device
    def apply_gradient(x, dy, residual, weights, a, b, dx, dresidual, chunk, tile, shape, grid, memory, channels):
        bounds = bounds_of(chunk, tile, shape, grid)
        coefficients = array(memory[COEFFICIENTS], (4, shape[1] * shape[3]))
        forward, backward = cuda.local.array((5, own), real), cuda.local.array((4, own), real)
        if relu:
            forward_of_thread(bounds, shape, memory, channels, forward)
        first, inside = thread_statistics(bounds, shape)
        for s in range(own):
            for row in range(4):
                backward[row, s] = coefficients[row, first + s] if inside else real(0)
        input_gradient_task(dy, x, residual, weights, a, b, dx, dresidual, bounds, forward, backward)

    # -- two launches: all blocks reduce, the last one of a family finishes; then all blocks apply ---------------------

    def moments(x, weights, shape, grid, memory, channels, epsilon):
        chunk, tile, family, blocks = task(shape, grid)
        reduce_moments(x, weights, chunk, tile, shape, grid, memory)
        if is_last(counters_at(memory[COUNTERS], (grid[FAMILIES],)), family, blocks):
            first, last, step = channels_of(family, shape, grid, channels)
            for c in range(first, last, step):
                finish_moments(c, shape, grid, memory, channels)

    def train_reduce(x, weights, shape, grid, memory, channels, epsilon):
        chunk, tile, family, blocks = task(shape, grid)
        reduce_moments(x, weights, chunk, tile, shape, grid, memory)
        if is_last(counters_at(memory[COUNTERS], (grid[FAMILIES],)), family, blocks):
            first, last, step = channels_of(family, shape, grid, channels)
            for c in range(first, last, step):
                finish_training(c, shape, grid, memory, channels)

    def normalize(x, residual, a, b, y, shape, grid, memory, channels, epsilon):
        chunk, tile, _, _ = task(shape, grid)
        apply_forward(x, residual, a, b, y, chunk, tile, shape, grid, memory)

    def infer(x, residual, y, shape, grid, memory, channels, epsilon):
        chunk, tile, _, _ = task(shape, grid)
        bounds = bounds_of(chunk, tile, shape, grid)
        params, state = array(memory[PARAMS], (2, channels)), array(memory[STATE], (state_rows, channels))
        forward = cuda.local.array((5, own), real)
        first, inside = thread_statistics(bounds, shape)
        for s in range(own):
            c = first + s if inside else 0
            forward[0, s] = state[MEAN, c]
            forward[1, s] = rules.inference_scale(params[GAMMA, c], state[VARIANCE, c], epsilon)
            forward[2, s] = params[BETA, c]
        normalize_task(x, residual, x, x, y, bounds, forward)

    def freeze(shape, grid, memory, channels, epsilon):
        """What a gradient needs of statistics that are constants, which is what a count of 0 says, and, where there is
        a COPY, the parameters."""
        c = np.int64(cuda.blockIdx.x) * grid[tasks.K1_STEP] + cuda.threadIdx.x
        if c < channels:
            state, saved = array(memory[STATE], (state_rows, channels)), array64(memory[SAVED], (5, channels))
            saved[COUNT, c] = 0.0
            saved[BATCH_MEAN, c] = state[MEAN, c]
            saved[RSTD, c] = 1.0 / rules.stddev(np.float64(state[VARIANCE, c]), np.float64(epsilon))
            saved[R, c] = 1.0
            saved[D, c] = 0.0
            if memory[COPY] != 0:
                params, copy = array(memory[PARAMS], (2, channels)), array(memory[COPY], (2, channels))
                copy[GAMMA, c] = params[GAMMA, c]
                copy[BETA, c] = params[BETA, c]

    def backward_reduce(x, dy, residual, a, b, shape, grid, memory, channels, epsilon):
        chunk, tile, family, blocks = task(shape, grid)
        reduce_gradient(x, dy, residual, a, b, chunk, tile, shape, grid, memory, channels)
        if is_last(counters_at(memory[COUNTERS], (grid[FAMILIES],)), family, blocks):
            first, last, step = channels_of(family, shape, grid, channels)
            for c in range(first, last, step):
                finish_gradient(c, shape, grid, memory, channels)

    def input_gradient(x, dy, residual, weights, a, b, dx, dresidual, shape, grid, memory, channels, epsilon):
        chunk, tile, _, _ = task(shape, grid)
        apply_gradient(x, dy, residual, weights, a, b, dx, dresidual, chunk, tile, shape, grid, memory, channels)

    # -- one launch: a block has a family for itself; a chunk is a whole statistic -------------------------------------

    def train(x, residual, weights, a, b, y, shape, grid, memory, channels, epsilon):
        family, tiles = np.int64(cuda.blockIdx.x), chunks_and_tiles(shape, grid)[1]
        for tile in range(family, tiles, grid[FAMILIES]):
            reduce_moments(x, weights, 0, tile, shape, grid, memory)
        cuda.syncthreads()
        first, last, step = channels_of(family, shape, grid, channels)
        for c in range(first, last, step):
            finish_training(c, shape, grid, memory, channels)
        cuda.syncthreads()
        for tile in range(family, tiles, grid[FAMILIES]):
            apply_forward(x, residual, a, b, y, 0, tile, shape, grid, memory)

    def backward(x, dy, residual, weights, a, b, dx, dresidual, shape, grid, memory, channels, epsilon):
        family, tiles = np.int64(cuda.blockIdx.x), chunks_and_tiles(shape, grid)[1]
        for tile in range(family, tiles, grid[FAMILIES]):
            reduce_gradient(x, dy, residual, a, b, 0, tile, shape, grid, memory, channels)
        cuda.syncthreads()
        first, last, step = channels_of(family, shape, grid, channels)
        for c in range(first, last, step):
            finish_gradient(c, shape, grid, memory, channels)
        cuda.syncthreads()
        for tile in range(family, tiles, grid[FAMILIES]):
            apply_gradient(x, dy, residual, weights, a, b, dx, dresidual, 0, tile, shape, grid, memory, channels)

    found = (moments, train_reduce, normalize, train, infer, freeze, backward_reduce, input_gradient, backward)
    return {f.__name__: f for f in found}
