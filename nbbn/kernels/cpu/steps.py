"""Whole steps, each one compiled call: reduce, channel, apply; and the five stages by themselves.

A step's first argument is the pool whose threads share its tasks, as region() yields it, or 0. The chunks and the
order in which their sums are added depend on the shape alone. So the bits are the same for any number of threads, and
so they are for two passes over the whole array and for one, in which each tile of statistics is reduced and applied
while a core's cache still has it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba

from nbbn.core import rules
from nbbn.kernels.channel import BATCH_MEAN, COUNT, DX_MEAN, M2, PLAIN_SUMS, SQUARES, WEIGHTED_SUMS
from nbbn.kernels.cpu import channel, planes, rows
from nbbn.kernels.cpu.lanes import (
    LANES,
    again,
    each,
    fence,
    load,
    over,
    part,
    per_task,
    splat,
    store,
    traced,
    vector_rules,
    when,
    wide,
)
from nbbn.kernels.cpu.tasks import Grid, bounds_of, chunk_and_tile, statistics
from nbbn.kernels.cpu.views import as_view, empty

SCHEDULES: dict[str, Any] = {"planes": planes, "rows": rows}
RANKS = {"planes": 3, "rows": 4}  # of the arrays that their loops are about

Step = Callable[..., Any]
CHUNKS, TILES, FAMILIES = (Grid._fields.index(name) for name in ("chunks", "tiles", "families"))
INTERNAL: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


@lru_cache(maxsize=8)
def steps(schedule: str, one_pass: bool) -> dict[str, Step]:
    """The steps of one schedule as functions yet to be compiled, by name."""
    loops = SCHEDULES[schedule]
    view = as_view(RANKS[schedule])

    def bounds(task, x, grid):
        """Of the task-th task in the order of memory."""
        view = loops.extent(x)
        return bounds_of(*chunk_and_tile(task, view, grid), view, grid)

    def write_shifts(x, weights, bounds, grid, shift):
        """Write the first values of the statistics of a task as their shift, and 0 for what cannot be one."""

        def write(s, firsts):
            values, weight_of = firsts

            def copy(i, n, _):
                first = wide(load(values, i, n))
                if weight_of is not None:  # what has no weight has no part in anything, and may be NaN
                    no_shift = (wide(load(weight_of, i, n)) <= 0) | (first - first != 0)
                    first = vector_rules.drop(no_shift, first)
                store(shift, s + i, first, n)

            over(0, values.size, copy)

        loops.write_shifts((x, weights), bounds, grid, write)

    def settle(grid):
        """What a task has streamed is there for whoever it gives a signal to."""
        when(grid.streamed != 0, fence)

    # -- two passes: the whole array is reduced, then applied ----------------------------------------------------------

    @traced
    def take_shifts(x, weights, grid, shift):
        grid, view = Grid(*grid), loops.extent(x)
        each(0, grid.tiles, 1, lambda t, _: write_shifts(x, weights, bounds_of(0, t, view, grid), grid, shift))

    @per_task
    def sum_moments(task, x, weights, ends, grid, shift, partial):
        grid = Grid(*grid)
        loops.moments(x, weights, shift, bounds(task, x, grid), grid, partial, ends)

    @traced
    def finish_moments(weights, grid, shift, partial, count, saved, is_far):
        grid, last = Grid(*grid), saved.shape[1]
        far = channel.moments(0, last, grid.chunks, partial, shift, count, weights, saved)
        store(is_far, 0, splat(0.0), 1)
        if far is not None:
            when(far, lambda: store(is_far, 0, splat(1.0), 1))

    @per_task
    def normalize(task, inputs, relu, grid, coefficients, y):
        grid = Grid(*grid)
        loops.normalize(inputs, coefficients, relu, bounds(task, y, grid), grid, y)
        settle(grid)

    @per_task
    def sum_gradient(task, dy, inputs, weights, relu, grid, saved, forward, partial):
        grid = Grid(*grid)
        mean, where = part(saved, (BATCH_MEAN,), 0, saved.shape[1]), bounds(task, dy, grid)
        loops.gradient_sums(dy, inputs, weights, mean, forward, relu, where, grid, partial)

    @traced
    def finish_gradient(grid, adjusted, saved, partial, dparams):
        chunks, (channels, statistics) = Grid(*grid).chunks, (dparams.shape[1], saved.shape[1])
        channel.add_chunks(0, statistics, chunks, partial)
        channel.parameter_gradients(0, channels, partial[0], saved, adjusted, dparams)

    @per_task
    def input_gradient(task, dy, inputs, weights, relu, grid, forward, coefficients, dx, dz):
        grid = Grid(*grid)
        loops.input_gradient(dy, inputs, weights, forward, relu, coefficients, bounds(task, dy, grid), grid, dx, dz)
        settle(grid)

    # -- one pass: tile by tile; those of one channel in all groups together, as they share its moving statistics ------

    def over_tiles(tile, grid, body):
        """body(tile) for the tiles that have the same channels as the first one."""
        each(tile, grid.tiles, grid.families, lambda t, _: body(t))

    def over_chunks(tile, x, grid, body):
        """body(bounds) for the tasks of a tile."""
        each(0, grid.chunks, 1, lambda chunk, _: body(bounds_of(chunk, tile, loops.extent(x), grid)))

    @per_task
    def train_tile(
        tile, inputs, weights, relu, grid, y, params, state, hyper, options, new_state, saved, count, memory
    ):
        (coefficients, shift, partial), grid, x, a = memory, Grid(*grid), inputs[0], inputs[2]

        def reduce(t):
            first_task = bounds_of(0, t, loops.extent(x), grid)
            write_shifts(x, weights, first_task, grid, shift)
            first, last = statistics(first_task, grid)

            def sums():
                over_chunks(t, x, grid, lambda where: loops.moments(x, weights, shift, where, grid, partial))
                return channel.moments(first, last, grid.chunks, partial, shift, count, weights, saved)

            again(sums)

        def apply(t):
            over_chunks(t, x, grid, lambda where: loops.normalize(inputs, coefficients, relu, where, grid, y))

        over_tiles(tile, grid, reduce)
        first, last = statistics(bounds_of(0, tile, loops.extent(x), grid), grid)
        channel.train(first, last, params, state, hyper, count, weights, a, options, new_state, saved, coefficients)
        over_tiles(tile, grid, apply)
        settle(grid)

    @per_task
    def backward_tile(tile, dy, inputs, weights, relu, grid, dx, dz, saved, dparams, memory):
        forward, coefficients, partial = memory
        grid, channels, mean = Grid(*grid), dparams.shape[1], part(saved, (BATCH_MEAN,), 0, saved.shape[1])

        def sums(where):
            loops.gradient_sums(dy, inputs, weights, mean, forward, relu, where, grid, partial)

        def reduce(t):
            over_chunks(t, dy, grid, sums)
            first, last = statistics(bounds_of(0, t, loops.extent(dy), grid), grid)
            channel.add_chunks(first, last, grid.chunks, partial)

        def results(where):
            loops.input_gradient(dy, inputs, weights, forward, relu, coefficients, where, grid, dx, dz)

        over_tiles(tile, grid, reduce)
        first, last = statistics(bounds_of(0, tile, loops.extent(dy), grid), grid)
        channel.parameter_gradients(first, last, partial[0], saved, inputs[2], dparams)
        channel.input_coefficients(first, last, channels, partial[0], saved, coefficients)
        over_tiles(tile, grid, lambda t: over_chunks(t, dy, grid, results))
        settle(grid)

    # -- the stages by themselves --------------------------------------------------------------------------------------

    stage = numba.njit(**INTERNAL, inline="always")

    @stage
    def reduce_all(pool, x, firsts, weights, ends, count, grid, saved):
        statistics = saved.shape[1]
        shift, is_far = empty((statistics,), saved), empty((1,), saved)
        partial = empty((grid[CHUNKS], PLAIN_SUMS if weights is None else WEIGHTED_SUMS, statistics), saved)
        take_shifts(firsts, weights, grid, shift)
        is_far[0] = 1
        while is_far[0] > 0:
            sum_moments(pool, grid[CHUNKS] * grid[TILES], x, weights, ends, grid, shift, partial)
            finish_moments(weights, grid, shift, partial, count, saved, is_far)

    @stage
    def reduce_gradient_all(pool, dy, inputs, weights, saved, forward, relu, grid, dparams):
        a = inputs[2]
        partial = empty((grid[CHUNKS], 2 if a is None else 4, saved.shape[1]), saved)
        sum_gradient(pool, grid[CHUNKS] * grid[TILES], dy, inputs, weights, relu, grid, saved, forward, partial)
        finish_gradient(grid, a, saved, partial, dparams)
        return partial

    def reduce(pool, grid, weights, x, moments):
        x = view(x, grid)
        reduce_all(pool, x, x, weights, None, x.size / moments.shape[1], grid, moments)

    def reduce_sequences(pool, grid, x, ends, moments):
        x = view(x, grid)
        first, count = 0, 0.0
        while ends[first] == 0:  # what shifts are taken from must count; something does
            first += 1
        for end in ends:
            count += end
        reduce_all(pool, x, x[first:], None, ends, count, grid, moments)

    def apply(pool, grid, relu, a, b, residual, x, y, coefficients):
        residual, x, y = view(residual, grid), view(x, grid), view(y, grid)
        normalize(pool, grid[CHUNKS] * grid[TILES], (x, residual, a, b), relu, grid, coefficients, y)

    def reduce_gradient(pool, grid, relu, weights, a, b, residual, x, dy, saved, sums, dparams):
        residual, x, dy = view(residual, grid), view(x, grid), view(dy, grid)
        forward = empty((5, whole_lines(saved.shape[1])), dparams)
        output_coefficients(saved, a, forward)
        inputs = x, residual, a, b
        copy_rows(reduce_gradient_all(pool, dy, inputs, weights, saved, forward, relu, grid, dparams), sums)

    def apply_gradient(pool, grid, relu, weights, a, b, dz, residual, x, dy, dx, saved, sums, dparams):
        dz, residual, x, dy, dx = view(dz, grid), view(residual, grid), view(x, grid), view(dy, grid), view(dx, grid)
        forward = empty((5, whole_lines(saved.shape[1])), dparams)
        coefficients = empty((4, whole_lines(saved.shape[1])), dparams)
        output_coefficients(saved, a, forward)
        input_coefficients(dparams, sums, saved, coefficients)
        tasks, inputs = grid[CHUNKS] * grid[TILES], (x, residual, a, b)
        input_gradient(pool, tasks, dy, inputs, weights, relu, grid, forward, coefficients, dx, dz)

    # -- whole steps ---------------------------------------------------------------------------------------------------

    def train(
        pool, grid, relu, renorm, debias, skip, hyper, weights, a, b, residual, x, y, params, state, new_state, saved
    ):
        residual, x, y = view(residual, grid), view(x, grid), view(y, grid)
        statistics, inputs, options = saved.shape[1], (x, residual, a, b), (renorm, debias, skip)
        coefficients, count = empty((5, whole_lines(statistics)), params), x.size / statistics
        if one_pass:
            shift = empty((statistics,), saved)
            partial = empty((grid[CHUNKS], PLAIN_SUMS if weights is None else WEIGHTED_SUMS, statistics), saved)
            memory, families = (coefficients, shift, partial), grid[FAMILIES]
            train_tile(
                pool,
                families,
                inputs,
                weights,
                relu,
                grid,
                y,
                params,
                state,
                hyper,
                options,
                new_state,
                saved,
                count,
                memory,
            )
        else:
            reduce_all(pool, x, x, weights, None, count, grid, saved)
            train_channels(params, state, hyper, count, weights, a, options, new_state, saved, coefficients)
            normalize(pool, grid[CHUNKS] * grid[TILES], inputs, relu, grid, coefficients, y)

    def infer(pool, grid, relu, hyper, residual, x, y, params, state):
        residual, x, y = view(residual, grid), view(x, grid), view(y, grid)
        coefficients = empty((3, whole_lines(params.shape[1])), params)
        infer_channels(params, state, hyper, coefficients)
        normalize(pool, grid[CHUNKS] * grid[TILES], (x, residual, None, None), relu, grid, coefficients, y)

    def backward(pool, grid, relu, weights, a, b, dz, residual, x, dy, dx, saved, dparams):
        dz, residual, x, dy, dx = view(dz, grid), view(residual, grid), view(x, grid), view(dy, grid), view(dx, grid)
        forward, inputs = empty((5, whole_lines(saved.shape[1])), dparams), (x, residual, a, b)
        coefficients = empty((4, whole_lines(saved.shape[1])), dparams)
        if relu is not None:
            output_coefficients(saved, a, forward)
        if one_pass:
            partial = empty((grid[CHUNKS], 2 if a is None else 4, saved.shape[1]), saved)
            memory, families = (forward, coefficients, partial), grid[FAMILIES]
            backward_tile(pool, families, dy, inputs, weights, relu, grid, dx, dz, saved, dparams, memory)
        else:
            sums = reduce_gradient_all(pool, dy, inputs, weights, saved, forward, relu, grid, dparams)
            input_coefficients(dparams, sums, saved, coefficients)
            tasks = grid[CHUNKS] * grid[TILES]
            input_gradient(pool, tasks, dy, inputs, weights, relu, grid, forward, coefficients, dx, dz)

    def frozen_backward(pool, grid, x, dy, dx, saved, dparams):
        x, dy, dx = view(x, grid), view(dy, grid), view(dx, grid)
        coefficients = empty((4, whole_lines(saved.shape[1])), dparams)
        inputs = x, None, None, None
        sums = reduce_gradient_all(pool, dy, inputs, None, saved, coefficients, None, grid, dparams)
        input_coefficients(dparams, sums, saved, coefficients)
        coefficients[DX_MEAN] = 0  # dx = (dy - 0) * scale + 0: the forward pass's apply, on dy
        normalize(pool, grid[CHUNKS] * grid[TILES], (dy, None, None, None), None, grid, coefficients, dx)

    found = (reduce, reduce_sequences, apply, reduce_gradient, apply_gradient, train, infer, backward, frozen_backward)
    return {f.__name__: f for f in found}


@numba.njit(**INTERNAL, inline="always")
def whole_lines(columns):
    """So many, and some behind them, that each row of coefficients begins with a line of the cache: vectors of them
    that lie across two lines make a pass over rows a fifth slower."""
    return (columns + LANES - 1) // LANES * LANES


def _first_chunk(sums):
    """The sums of the first chunk, which are those of all of them now, or what is no more than that."""
    return sums[0] if sums.ndim == 3 else sums


# -- the middle stage --------------------------------------------------------------------------------------------------


@traced
def train_channels(params, state, hyper, count, weights, a, options, new_state, saved, coefficients):
    channels = params.shape[1]
    channel.train(0, channels, params, state, hyper, count, weights, a, options, new_state, saved, coefficients)


@traced
def infer_channels(params, state, hyper, coefficients):
    channel.infer(params, state, hyper, coefficients)


@traced
def freeze_channels(params, state, hyper, saved):
    channel.freeze(params, state, hyper, saved)


@traced
def output_coefficients(saved, a, forward):
    """The coefficients of the output once more, for the gradient of its activation."""
    channel.output_coefficients(saved, a, forward)


@traced
def copy_rows(source, target):
    """Copy all rows of an array, or of its first chunk, to the first ones of another. To assign them is many times as
    much to compile: Numba makes the text of an error for other shapes."""
    channel.copy_rows(_first_chunk(source), target)


@traced
def input_coefficients(dparams, sums, saved, coefficients):
    sums = _first_chunk(sums)
    channel.input_coefficients(0, dparams.shape[1], dparams.shape[1], sums, saved, coefficients)


def finish(renorm, debias, skip, hyper, adjusted, moments, params, state, new_state, saved, coefficients):
    """The middle stage by itself."""
    copy_rows(moments, saved)
    options = renorm, debias, skip
    train_channels(params, state, hyper, None, None, adjusted, options, new_state, saved, coefficients)


def freeze(hyper, params, state, saved):
    """What a gradient needs after inference."""
    freeze_channels(params, state, hyper, saved)


def merge(parts, moments):
    """The moments of several sets of values together, in their order."""
    for s in range(moments.shape[1]):
        n, mean, m2, squares = parts[0, COUNT, s], parts[0, BATCH_MEAN, s], parts[0, M2, s], parts[0, SQUARES, s]
        for p in range(1, parts.shape[0]):
            part = parts[p]
            n, mean, m2, squares = rules.combine(
                n, mean, m2, squares, part[COUNT, s], part[BATCH_MEAN, s], part[M2, s], part[SQUARES, s]
            )
        moments[COUNT, s] = n
        moments[BATCH_MEAN, s] = mean
        moments[M2, s] = m2
        moments[SQUARES, s] = squares


# What there is once for both schedules.
COMMON: dict[str, Step] = {"finish": finish, "freeze": freeze, "merge": merge}
