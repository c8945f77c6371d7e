"""The steps of batch normalization as CUDA kernels: reduce and channel in one launch, apply in another, or all in one.

A block of (x, y) threads has one task at a time, a chunk of the values of a tile of statistics (tasks.py).
Where statistics lie side by side (rows), x runs over them and y over their values; where the values of a statistic do
(planes), x and y both run over them. A thread takes `width` neighbours at once and adds a few of them up before it
adds that to float64 sums, the sums of a block's threads are a tree, and those of the chunks are added in their order,
by whichever block is the last of a group of them, and those of the groups by the last one of a family: the tiles that
have the same channels. So the order in which blocks finish changes no bit.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba.cuda import types

from nbbn.core import rules
from nbbn.kernels import channel
from nbbn.kernels.channel import SAVED_ROWS
from nbbn.kernels.cuda import channel as middle
from nbbn.kernels.cuda.apply import apply_functions
from nbbn.kernels.cuda.blocks import COLUMNS, VIEW_SIZE, Variant, block_functions, is_last
from nbbn.kernels.cuda.kernel import Kernel
from nbbn.kernels.cuda.memory import VECTOR_BYTES, matrices, vector
from nbbn.kernels.cuda.reduce import reduce_functions
from nbbn.kernels.cuda.target import cuda, device
from nbbn.kernels.cuda.tasks import Grid, divide, task_functions

# The small arrays of a step, by address: see kernels/channel.py. Sums or moments of chunks (chunks, 4, statistics) are
# float64; counters are uint32 and zero.
_FORWARD = ("partial", "counters", "params", "state", "hyper", "new_state")
MEMORY = (*_FORWARD, "moments", "saved", "coefficients", "sums", "dparams")
PARTIAL, COUNTERS, PARAMS, STATE, HYPER, NEW_STATE, MOMENTS, SAVED, COEFFICIENTS, SUMS, DPARAMS = range(11)

_WHOLE = 0, 1, 1  # chunks: where the only one is all of a statistic


def signature(step: str, v: Variant) -> Any:
    """Of a kernel: its views, shape, grid, memory, the number of channels and epsilon."""
    index = types.int64 if v.wide else types.int32
    view = types.Tuple([types.int64, *[index] * (VIEW_SIZE - 1)])
    grid = types.NamedUniTuple(types.int64, len(Grid._fields), Grid)
    sizes = [types.UniTuple(index, 4), grid, types.UniTuple(types.int64, len(MEMORY))]
    real = types.float64 if v.statistic.itemsize == 8 else types.float32
    return types.void(*[view] * len(VIEWS[step]), *sizes, types.int64, real)


@lru_cache(maxsize=1024)
def kernel(step: str, v: Variant) -> Kernel:
    return Kernel(step, v.dtype.name, (v,), signature(step, v), lambda: steps(v)[step])


@lru_cache(maxsize=256)
def steps(v: Variant) -> dict[str, Callable[..., None]]:
    """The kernels as Python functions, by name."""
    rows, own, width, relu = v.rows, v.own, v.width, v.relu
    renorm, debias, skip = v.renorm or None, v.debias or None, v.skip or None
    a_or_none = 1 if v.adjustment else None
    reducing, applying = reduce_functions(v), apply_functions(v)
    sum_moments, sum_gradient_of_task = reducing.sum_moments, reducing.sum_gradient
    normalize_task, input_gradient_task = applying.normalize, applying.input_gradient
    gradient_sums = channel.GRADIENT_ROWS[v.adjustment]
    forward_rows, real = channel.OUTPUT_ROWS[v.adjustment], v.statistic.type
    most, real_size = real(np.finfo(v.statistic).max), v.statistic.itemsize
    threads, most_columns = v.threads, COLUMNS * v.width
    columns_per_thread = -(-most_columns // threads)
    piece = min(own, VECTOR_BYTES // real_size)
    fetch_piece = vector(v.statistic, piece).fetch
    state_rows = (5 if v.renorm else 2) + (2 if v.debias else 0)
    # What makes an array is no function of its own: Numba's do not return on a GPU what they have made.
    array, array64, counters_at = matrices(v.statistic), matrices(np.float64), matrices(np.uint32)
    state_array = matrices(v.state or v.statistic)
    add_chunks, combine_chunks, freeze_of = middle.add_chunks, middle.combine_chunks, middle.freeze
    train_statistic, train_channel = middle.train_statistic, middle.train_channel
    coefficients_of, parameter_gradients = middle.output_coefficients, middle.parameter_gradients
    input_coefficients_of = middle.input_coefficients
    walk, bounds_of = block_functions(v.rows, v.short, v.threads, v.wide).walk, task_functions(v.wide)

    @device
    def task(block, grid):
        """A block's chunk, tile and family."""
        chunk, tile = divide(block, grid.tiles, grid.by_tiles)
        _, family = divide(tile, grid.families, grid.by_families)
        return chunk, tile, family

    @device
    def in_order():
        return np.int64(cuda.blockIdx.x)

    @device
    def from_the_end():
        """For what goes over the input once more: the cache still has what was read last."""
        return np.int64(cuda.gridDim.x) - 1 - np.int64(cuda.blockIdx.x)

    @device
    def channels_of(family, shape, grid, channels):
        """The first channel of a family, and the one after its last."""
        if grid.families == 1:
            return np.int64(0), channels
        bounds = bounds_of(0, family, shape, grid)
        return bounds.row * shape[3] + bounds.k1_begin, bounds.row * shape[3] + bounds.k1_end

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
    def read_coefficients(bounds, shape, memory, rows, coefficients):
        """Those of this thread's statistics; 0 where it has none."""
        statistics, (first, inside) = shape[1] * shape[3], thread_statistics(bounds, shape)
        for row in range(rows):
            address = memory[COEFFICIENTS] + (row * statistics + first) * real_size
            for s in range(0, own, piece):
                if inside:
                    fetch_piece(address + s * real_size, coefficients[row], s)
                else:
                    for lane in range(piece):
                        coefficients[row, s + lane] = 0

    @device
    def apply_forward(x, residual, a, b, y, chunk, tile, shape, grid, memory):
        bounds = bounds_of(chunk, tile, shape, grid)
        forward = cuda.local.array((5, own), real)
        read_coefficients(bounds, shape, memory, forward_rows, forward)
        normalize_task(x, residual, a, b, y, bounds, forward)

    def by_columns(make, count):
        """A function that fills `count` rows of coefficients, those of a thread's statistics. make(statistic, target,
        column, statistics, memory, given) does so for one.

        In rows the threads of a column need the same ones, and each of the block makes a part: a root and a division
        take more instructions than all elements of a thread.
        """

        @device
        def fill(bounds, shape, memory, given, coefficients):
            statistics = shape[1] * shape[3]
            first, inside = thread_statistics(bounds, shape)
            if not rows:
                make(first if inside else 0, coefficients, 0, statistics, memory, given)
                return
            shared = cuda.shared.array((count, most_columns), real)
            thread, begin = cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x, bounds.k1_begin
            cuda.syncthreads()  # the tile before this one may still be read
            for part in range(columns_per_thread):
                i = thread + part * threads
                if i < cuda.blockDim.x * width and begin + i < bounds.k1_end:
                    make(bounds.row * shape[3] + begin + i, shared, i, statistics, memory, given)
            cuda.syncthreads()
            for row in range(count):
                for s in range(own):
                    coefficients[row, s] = shared[row, cuda.threadIdx.x * width + s] if inside else real(0)

        return fill

    @device
    def output_of_training(s, target, column, statistics, memory, given):
        saved = array64(memory[SAVED], (SAVED_ROWS, statistics))
        coefficients_of(s, column, saved, a_or_none, target)

    @device
    def output_of_inference(c, target, column, channels, memory, epsilon):
        params, state = array(memory[PARAMS], (2, channels)), state_array(memory[STATE], (state_rows, channels))
        gamma, mean, variance = params[channel.GAMMA, c], state[channel.MEAN, c], state[channel.VARIANCE, c]
        used = mean if abs(mean) <= most else real(0)  # of a wider state
        scale, shift = rules.inference_terms(mean, used, variance, epsilon, gamma)
        target[channel.Y_MEAN, column], target[channel.Y_SCALE, column] = used, scale
        target[channel.Y_SHIFT, column] = shift + params[channel.BETA, c]

    gate_coefficients = by_columns(output_of_training, forward_rows)
    inference_coefficients = by_columns(output_of_inference, 3)

    @device
    def forward_of_thread(bounds, shape, memory, forward):
        """The coefficients of the output once more, for the gate of its activation; without one only the mean."""
        if relu:
            gate_coefficients(bounds, shape, memory, 0, forward)
            return
        saved = array64(memory[SAVED], (SAVED_ROWS, shape[1] * shape[3]))
        first, inside = thread_statistics(bounds, shape)
        for s in range(own):
            forward[channel.Y_MEAN, s] = saved[channel.BATCH_MEAN, first + s] if inside else 0.0

    @device
    def reduce_gradient(x, dy, residual, weights, a, b, chunk, tile, shape, grid, memory):
        statistics, bounds = shape[1] * shape[3], bounds_of(chunk, tile, shape, grid)
        partial = array64(memory[PARTIAL], (grid.chunks, gradient_sums, statistics))
        forward = cuda.local.array((5, own), real)
        forward_of_thread(bounds, shape, memory, forward)
        first, _ = thread_statistics(bounds, shape)
        mean = array64(memory[SAVED], (SAVED_ROWS, statistics))[channel.BATCH_MEAN]
        sum_gradient_of_task(dy, x, residual, weights, a, b, bounds, first, mean, forward, partial)

    @device
    def apply_gradient(x, dy, residual, weights, a, b, dx, dz, chunk, tile, shape, grid, memory):
        bounds = bounds_of(chunk, tile, shape, grid)
        forward, backward = cuda.local.array((5, own), real), cuda.local.array((4, own), real)
        if relu:
            forward_of_thread(bounds, shape, memory, forward)
        read_coefficients(bounds, shape, memory, 4, backward)
        input_gradient_task(dy, x, residual, weights, a, b, dx, dz, bounds, forward, backward)

    # -- the middle stage of a family: work of all threads of a block, which comes here as a whole ---------------------

    @device
    def thread_of_block():
        """Its number, and how many there are."""
        return np.int64(cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x), cuda.blockDim.x * cuda.blockDim.y

    def over_statistics(work):
        """A function that does this with each statistic s of a family, of channel c, from the first thread on. chunks:
        whose sums are joined: the first, the one after the last, and the step."""

        @device
        def each(family, chunks, shape, grid, memory, channels):
            first, last = channels_of(family, shape, grid, channels)
            i, step = thread_of_block()
            while True:
                group, column = divide(i, grid.columns, grid.by_columns)
                if group * channels >= shape[1] * shape[3]:
                    break
                c = first + column
                if c < last:
                    work(c, group * channels + c, chunks, shape, grid, memory, channels)
                i += step

        return each

    def over_channels(work):
        """The same with each channel, from the last thread on: the first ones go on to what comes after."""

        @device
        def each(family, shape, grid, memory, channels):
            first, last = channels_of(family, shape, grid, channels)
            thread, step = thread_of_block()
            c = first + step - 1 - thread
            while c < last:
                work(c, shape, grid, memory, channels)
                c += step

        return each

    def joining(join, row_count, place):
        """A function that writes the sums of chunks to an array of the memory, or in the place of the first one's."""

        @device
        def of_statistic(c, s, chunks, shape, grid, memory, channels):
            first, last, step = chunks
            statistics = shape[1] * shape[3]
            partial = array64(memory[PARTIAL], (grid.chunks, row_count, statistics))
            target = partial[first] if place == PARTIAL else array64(memory[place], (row_count, statistics))
            join(s, partial, first, last, step, target, s)

        return over_statistics(of_statistic)

    @device
    def train_from(c, s, own, statistics, memory, channels):
        """From the moments of one statistic to what depends on no other."""
        params, hyper = array(memory[PARAMS], (2, channels)), array64(memory[HYPER], (channel.HYPER_SIZE,))
        saved = array64(memory[SAVED], (SAVED_ROWS, statistics))
        coefficients = array(memory[COEFFICIENTS], (forward_rows, statistics))
        train_statistic(s, c, own, params, hyper, a_or_none, renorm, saved, coefficients)

    @device
    def train_one(c, s, chunks, shape, grid, memory, channels):
        first, last, step = chunks
        statistics, own = shape[1] * shape[3], cuda.local.array((SAVED_ROWS, 1), np.float64)
        partial = array64(memory[PARTIAL], (grid.chunks, channel.MOMENT_ROWS, statistics))
        combine_chunks(s, partial, first, last, step, own, 0)
        train_from(c, s, own, statistics, memory, channels)

    @device
    def update_channel(c, shape, grid, memory, channels):
        """The new state of one channel."""
        state = state_array(memory[STATE], (state_rows, channels))
        new_state = state_array(memory[NEW_STATE], (state_rows, channels))
        hyper = array64(memory[HYPER], (channel.HYPER_SIZE,))
        saved = array64(memory[SAVED], (SAVED_ROWS, shape[1] * shape[3]))
        train_channel(c, channels, state, hyper, renorm, debias, skip, new_state, saved)

    @device
    def renormalize(c, s, chunks, shape, grid, memory, channels):
        """The coefficients of the output of one statistic, once r and d of its channel are there."""
        saved = array64(memory[SAVED], (SAVED_ROWS, shape[1] * shape[3]))
        coefficients_of(s, s, saved, a_or_none, array(memory[COEFFICIENTS], (forward_rows, shape[1] * shape[3])))

    train_all, renormalize_all = over_statistics(train_one), over_statistics(renormalize)
    update_all, finish_moments = over_channels(update_channel), joining(combine_chunks, channel.MOMENT_ROWS, MOMENTS)

    @device
    def finish_training(family, chunks, shape, grid, memory, channels):
        """From the sums of a family to the coefficients of the output and the new state."""
        train_all(family, chunks, shape, grid, memory, channels)
        cuda.syncthreads()
        update_all(family, shape, grid, memory, channels)
        if renorm is not None:
            cuda.syncthreads()
            renormalize_all(family, chunks, shape, grid, memory, channels)
            cuda.syncthreads()

    def finishing_gradient(place, applied):
        """From the sums of a family's gradient, which are written to this array of the memory, to the gradients of the
        parameters, and to the coefficients of dx where it is applied."""

        @device
        def of_statistic(c, s, chunks, shape, grid, memory, channels):
            first, last, step = chunks
            statistics, own = shape[1] * shape[3], cuda.local.array((gradient_sums, 1), np.float64)
            partial = array64(memory[PARTIAL], (grid.chunks, gradient_sums, statistics))
            add_chunks(s, partial, first, last, step, own, 0)
            if applied:
                input_coefficients(s, own[channel.SUM_DYA, 0], own[channel.SUM_DYA_X, 0], statistics, memory)
            sums = array64(memory[place], (gradient_sums, statistics))
            for row in range(gradient_sums):
                sums[row, s] = own[row, 0]

        @device
        def of_channel(c, shape, grid, memory, channels):
            statistics = shape[1] * shape[3]
            sums = array64(memory[place], (gradient_sums, statistics))
            saved = array64(memory[SAVED], (SAVED_ROWS, statistics))
            parameter_gradients(c, sums, saved, a_or_none, array(memory[DPARAMS], (2, channels)))

        statistics_of_family, channels_of_family = over_statistics(of_statistic), over_channels(of_channel)

        @device
        def finish(family, chunks, shape, grid, memory, channels):
            statistics_of_family(family, chunks, shape, grid, memory, channels)
            cuda.syncthreads()
            channels_of_family(family, shape, grid, memory, channels)

        return finish

    @device
    def input_coefficients(s, total, centered, statistics, memory):
        """From the sums of one statistic to the coefficients of dx."""
        saved = array64(memory[SAVED], (SAVED_ROWS, statistics))
        input_coefficients_of(s, total, centered, saved, array(memory[COEFFICIENTS], (4, statistics)))

    finish_sums, finish_gradient = finishing_gradient(SUMS, False), finishing_gradient(PARTIAL, True)

    # -- two launches: all blocks reduce, the last one of a family finishes; then all blocks apply ---------------------

    def adding(join, row_count):
        """What follows the reduction of a chunk: whether this block is the one to finish the family. The last block of
        a group of chunks adds them up before, in the place of the first."""
        join_group = joining(join, row_count, PARTIAL)

        @device
        def is_finishing(chunk, family, shape, grid, memory, channels):
            groups, second = grid.groups, grid.families * grid.groups
            counters = counters_at(memory[COUNTERS], (second + grid.families,))
            group, _ = divide(chunk, grid.group, grid.by_group)
            first = group * grid.group
            last = min(grid.chunks, first + grid.group)
            if not is_last(counters, family * groups + group, (last - first) * grid.members):
                return False
            if groups == 1:
                return True
            join_group(family, (first, last, 1), shape, grid, memory, channels)
            return is_last(counters, second + family, groups)

        return is_finishing

    @device
    def chunks_to_finish(grid):
        """Those that have the sums of their group by now; of one group all."""
        return 0, grid.chunks, grid.group if grid.groups > 1 else 1

    moments_are_there, sums_are_there = adding(combine_chunks, channel.MOMENT_ROWS), adding(add_chunks, gradient_sums)

    def reduction(finish_family):
        """A kernel that reduces the input, and then does this with each family's sums."""

        def kernel(x, weights, shape, grid, memory, channels, epsilon):
            chunk, tile, family = task(in_order(), grid)
            reduce_moments(x, weights, chunk, tile, shape, grid, memory)
            if moments_are_there(chunk, family, shape, grid, memory, channels):
                finish_family(family, chunks_to_finish(grid), shape, grid, memory, channels)

        return kernel

    def gradient_reduction(finish_family):
        """The same for the gradient."""

        def kernel(x, dy, residual, weights, a, b, shape, grid, memory, channels, epsilon):
            chunk, tile, family = task(in_order(), grid)
            reduce_gradient(x, dy, residual, weights, a, b, chunk, tile, shape, grid, memory)
            if sums_are_there(chunk, family, shape, grid, memory, channels):
                finish_family(family, chunks_to_finish(grid), shape, grid, memory, channels)

        return kernel

    def normalize(x, residual, a, b, y, shape, grid, memory, channels, epsilon):
        chunk, tile, _ = task(from_the_end(), grid)
        apply_forward(x, residual, a, b, y, chunk, tile, shape, grid, memory)

    def infer(x, residual, y, shape, grid, memory, channels, epsilon):
        chunk, tile, _ = task(in_order(), grid)
        bounds, forward = bounds_of(chunk, tile, shape, grid), cuda.local.array((5, own), real)
        inference_coefficients(bounds, shape, memory, epsilon, forward)
        normalize_task(x, residual, x, x, y, bounds, forward)

    def input_gradient(x, dy, residual, weights, a, b, dx, dz, shape, grid, memory, channels, epsilon):
        chunk, tile, _ = task(from_the_end(), grid)
        apply_gradient(x, dy, residual, weights, a, b, dx, dz, chunk, tile, shape, grid, memory)

    # -- the middle stage by itself: one thread per channel; shape[3] is the number of statistics ----------------------

    @device
    def own_channel(grid):
        return np.int64(cuda.blockIdx.x) * grid.k1_step + cuda.threadIdx.x

    def finish(shape, grid, memory, channels, epsilon):
        c, statistics = own_channel(grid), shape[3]
        moments = array64(memory[MOMENTS], (channel.MOMENT_ROWS, statistics))
        own = cuda.local.array((SAVED_ROWS, 1), np.float64)
        if c < channels:
            s = c
            while s < statistics:
                for row in range(channel.MOMENT_ROWS):
                    own[row, 0] = moments[row, s]
                train_from(c, s, own, statistics, memory, channels)
                s += channels
            update_channel(c, shape, grid, memory, channels)
            if renorm is not None:
                s = c
                while s < statistics:
                    renormalize(c, s, 0, shape, grid, memory, channels)
                    s += channels

    def freeze(shape, grid, memory, channels, epsilon):
        c = own_channel(grid)
        params, state = array(memory[PARAMS], (2, channels)), state_array(memory[STATE], (state_rows, channels))
        saved = array64(memory[SAVED], (SAVED_ROWS, channels))
        hyper = array64(memory[HYPER], (channel.HYPER_SIZE,))
        if c < channels:
            freeze_of(c, params, state, hyper, saved)
            # As infer() has it, to the bit: the gradient must find the same outputs positive.
            saved[channel.RSTD, c] = rules.reciprocal_stddev(state[channel.VARIANCE, c], epsilon)

    def spread_gradient(shape, grid, memory, channels, epsilon):
        s, statistics = own_channel(grid), shape[3]
        sums = array64(memory[SUMS], (gradient_sums, statistics))
        if s < channels:
            while s < statistics:
                input_coefficients(s, sums[channel.SUM_DYA, s], sums[channel.SUM_DYA_X, s], statistics, memory)
                s += channels

    # -- what several inputs have, together: one thread per statistic --------------------------------------------------

    def merge_moments(shape, grid, memory, channels, epsilon):
        """Of several inputs, (P, 4, C): merged in their order. shape[2]: their number."""
        s, parts = own_channel(grid), shape[2]
        if s < channels:
            partial = array64(memory[PARTIAL], (parts, channel.MOMENT_ROWS, channels))
            moments = array64(memory[MOMENTS], (channel.MOMENT_ROWS, channels))
            combine_chunks(s, partial, 0, parts, 1, moments, s)

    def add_sums(shape, grid, memory, channels, epsilon):
        """The same for the sums of the gradient."""
        s, parts = own_channel(grid), shape[2]
        if s < channels:
            partial = array64(memory[PARTIAL], (parts, gradient_sums, channels))
            sums = array64(memory[SUMS], (gradient_sums, channels))
            add_chunks(s, partial, 0, parts, 1, sums, s)

    # -- one launch: a block has a family for itself; a chunk is a whole statistic -------------------------------------

    def train(x, residual, weights, a, b, y, shape, grid, memory, channels, epsilon):
        family, tiles = np.int64(cuda.blockIdx.x), grid.tiles
        tile = family
        while tile < tiles:
            reduce_moments(x, weights, 0, tile, shape, grid, memory)
            tile += grid.families
        cuda.syncthreads()
        finish_training(family, _WHOLE, shape, grid, memory, channels)
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
        finish_gradient(family, _WHOLE, shape, grid, memory, channels)
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
