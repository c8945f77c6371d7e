"""Whole steps, each one compiled call: reduce, channel, apply; and the five stages by themselves.

Every step exists twice, parallel and serial, from one text; only here is there a prange. The chunks and the order in
which their sums are added depend on the shape alone. So both give the same bits for any number of threads, and so do
two passes over the whole array and one, in which each tile of statistics is reduced and applied while a core's cache
still has it.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba import prange, types

from nbbn.kernels.channel import BATCH_MEAN, DX_MEAN, EPSILON, MOMENT_ROWS, PLAIN_SUMS, WEIGHTED_SUMS
from nbbn.kernels.cpu import channel, flat, planes, rows
from nbbn.kernels.cpu.elements import INTERNAL, bounds_of, chunk_and_tile, chunks_and_tiles, element
from nbbn.kernels.tasks import Grid
from nbbn.runtime import PLAIN, code_hash, compile_kernel, run_by_python

SCHEDULES: dict[str, Any] = {"planes": planes, "flat": flat, "rows": rows.PLAIN_ROWS, "folded": rows.FOLDED_ROWS}

Step = Callable[..., Any]

code_hash()  # all that it covers is imported now

# What an argument of a step is, by its name. X is an array of the input's dtype, S one of the statistics' dtype, both
# canonical views of the schedule's rank and layout; s is an array of the statistics' dtype, t one of the state's own, d
# one of float64, with their rank. A flag is True or None. Views may be None, too. In each step the order of the
# arguments is that of its Python function: what is the same in every call like it comes first, so that a plan can bind
# it (engine/cpu/plan.py).
ARGUMENTS = {
    **dict.fromkeys(("x", "dy", "residual", "y", "dx", "dz"), "X"),
    **dict.fromkeys(("weights", "a", "b"), "S"),
    **dict.fromkeys(("params", "coefficients", "dparams"), "s2"),
    **dict.fromkeys(("state", "new_state"), "t2"),
    **dict.fromkeys(("moments", "saved", "sums"), "d2"),
    "hyper": "d1",
    **dict.fromkeys(("relu", "renorm", "cumulative", "adjusted"), "flag"),
    "grid": "grid",
}
# What each step writes; everything else may be read-only memory.
WRITES = {
    "reduce": {"moments"},
    "freeze": {"saved"},
    "finish": {"new_state", "saved", "coefficients"},
    "apply": {"y"},
    "reduce_gradient": {"sums", "dparams"},
    "apply_gradient": {"dx", "dz"},
    "train": {"y", "new_state", "saved"},
    "infer": {"y"},
    "backward": {"dx", "dz", "dparams"},
    "frozen_backward": {"dx", "dparams"},
}


@lru_cache(maxsize=8)
def steps(schedule: str, one_pass: bool, parallel: bool) -> dict[str, Step]:
    """The steps of one schedule as functions yet to be compiled, by name."""
    loops = SCHEDULES[schedule]
    extent, statistics, shifts, sum_moments = loops.extent, loops.statistics, loops.shifts, loops.moments
    normalize, gradient_sums, input_gradient = loops.normalize, loops.gradient_sums, loops.input_gradient
    # Inlined into each step, a stage is optimized once instead of twice: a third of the compile time.
    stage = numba.njit(**INTERNAL, parallel=parallel, inline="always")

    @stage
    def named(grid):
        """A step gets the numbers without their names: Numba takes 0.13 us longer to unpack a named tuple."""
        r0_step, r1_step, k1_step, store, span, period = grid
        return Grid(r0_step, r1_step, k1_step, store, span, period)

    @element
    def empty_partial(x, rows, grid, saved):
        chunks, _ = chunks_and_tiles(extent(x), grid)
        return np.empty((chunks, rows, saved.shape[1]))

    @element
    def moments_of_statistics(first, last, x, partial, shift, saved):
        """Returns: whether the sums are to be made again, about another shift."""
        values = np.float64(x.size // saved.shape[1])
        channel.add_chunks(first, last, partial)
        return channel.moments(first, last, partial[0], shift, values, saved)

    # -- two passes: the whole array is reduced, then applied ------------------------------------------------------

    @stage
    def reduce_all(x, weights, grid, saved):
        view = extent(x)
        chunks, tiles = chunks_and_tiles(view, grid)
        shift = np.empty(saved.shape[1])
        for tile in range(tiles):
            shifts(x, weights, bounds_of(0, tile, view, grid), grid, shift)
        partial = empty_partial(x, PLAIN_SUMS if weights is None else WEIGHTED_SUMS, grid, saved)
        again = True
        while again:
            for task in prange(chunks * tiles):
                chunk, tile = chunk_and_tile(np.int64(task), view, grid)
                sum_moments(x, weights, shift, bounds_of(chunk, tile, view, grid), grid, partial)
            again = moments_of_statistics(0, saved.shape[1], x, partial, shift, saved)

    @stage
    def apply_all(x, residual, a, b, coefficients, relu, grid, y):
        view = extent(x)
        chunks, tiles = chunks_and_tiles(view, grid)
        for task in prange(chunks * tiles):
            chunk, tile = chunk_and_tile(np.int64(task), view, grid)
            normalize(x, residual, a, b, coefficients, relu, bounds_of(chunk, tile, view, grid), grid, y)

    @stage
    def reduce_gradient_all(dy, x, residual, weights, a, b, saved, forward, relu, grid):
        view = extent(x)
        chunks, tiles = chunks_and_tiles(view, grid)
        partial, mean = empty_partial(x, 2 if a is None else 4, grid, saved), saved[BATCH_MEAN]
        for task in prange(chunks * tiles):
            chunk, tile = chunk_and_tile(np.int64(task), view, grid)
            bounds = bounds_of(chunk, tile, view, grid)
            gradient_sums(dy, x, residual, weights, a, b, mean, forward, relu, bounds, grid, partial)
        channel.add_chunks(0, saved.shape[1], partial)
        return partial[0]

    @stage
    def apply_gradient_all(dy, x, residual, weights, a, b, forward, relu, coefficients, grid, dx, dz):
        view = extent(x)
        chunks, tiles = chunks_and_tiles(view, grid)
        for task in prange(chunks * tiles):
            chunk, tile = chunk_and_tile(np.int64(task), view, grid)
            bounds = bounds_of(chunk, tile, view, grid)
            input_gradient(dy, x, residual, weights, a, b, forward, relu, coefficients, bounds, grid, dx, dz)

    @element
    def forward_of(a, dparams, saved):
        """The coefficients of the output once more, for the gradient of its activation."""
        forward = np.empty((3 if a is None else 5, saved.shape[1]), dparams.dtype)
        channel.output_coefficients(0, dparams.shape[1], dparams.shape[1], saved, a, forward)
        return forward

    # -- one pass: tile by tile; those of one channel in all groups together, as they share its moving statistics ------

    @element
    def train_tile(tile, weights, a, b, residual, x, y, params, state, flags, grid, new_state, saved, memory):
        hyper, relu, renorm, cumulative = flags
        coefficients, shift, partial = memory
        view = extent(x)
        chunks, tiles = chunks_and_tiles(view, grid)
        step = tiles * params.shape[1] // saved.shape[1]
        for t in range(tile, tiles, step):
            shifts(x, weights, bounds_of(0, t, view, grid), grid, shift)
            first, last = statistics(bounds_of(0, t, view, grid), grid)
            again = True
            while again:
                for chunk in range(chunks):
                    sum_moments(x, weights, shift, bounds_of(chunk, t, view, grid), grid, partial)
                again = moments_of_statistics(first, last, x, partial, shift, saved)
        first, last = statistics(bounds_of(0, tile, view, grid), grid)
        channel.train(first, last, params, state, hyper, a, renorm, cumulative, new_state, saved, coefficients)
        for t in range(tile, tiles, step):
            for chunk in range(chunks):
                normalize(x, residual, a, b, coefficients, relu, bounds_of(chunk, t, view, grid), grid, y)

    @element
    def backward_tile(tile, weights, a, b, residual, x, dy, dx, dz, saved, relu, grid, dparams, memory):
        forward, coefficients, partial = memory
        view = extent(x)
        chunks, tiles = chunks_and_tiles(view, grid)
        step, mean = tiles * dparams.shape[1] // saved.shape[1], saved[BATCH_MEAN]
        for t in range(tile, tiles, step):
            for chunk in range(chunks):
                bounds = bounds_of(chunk, t, view, grid)
                gradient_sums(dy, x, residual, weights, a, b, mean, forward, relu, bounds, grid, partial)
            first, last = statistics(bounds_of(0, t, view, grid), grid)
            channel.add_chunks(first, last, partial)
        first, last = statistics(bounds_of(0, tile, view, grid), grid)
        channel.parameter_gradients(first, last, partial[0], saved, dparams)
        channel.input_coefficients(first, last, dparams.shape[1], partial[0], saved, coefficients)
        for t in range(tile, tiles, step):
            for chunk in range(chunks):
                bounds = bounds_of(chunk, t, view, grid)
                input_gradient(dy, x, residual, weights, a, b, forward, relu, coefficients, bounds, grid, dx, dz)

    # -- the stages by themselves --------------------------------------------------------------------------------------

    def reduce(grid, weights, x, moments):
        grid = named(grid)
        reduce_all(x, weights, grid, moments)

    def apply(grid, relu, a, b, residual, x, y, coefficients):
        grid = named(grid)
        apply_all(x, residual, a, b, coefficients, relu, grid, y)

    def reduce_gradient(grid, relu, weights, a, b, residual, x, dy, saved, sums, dparams):
        grid = named(grid)
        found = reduce_gradient_all(dy, x, residual, weights, a, b, saved, forward_of(a, dparams, saved), relu, grid)
        sums[:] = found
        channel.parameter_gradients(0, dparams.shape[1], found, saved, dparams)

    def apply_gradient(grid, relu, weights, a, b, dz, residual, x, dy, dx, saved, sums, dparams):
        grid = named(grid)
        forward, coefficients = forward_of(a, dparams, saved), np.empty((4, saved.shape[1]), dparams.dtype)
        channel.input_coefficients(0, dparams.shape[1], dparams.shape[1], sums, saved, coefficients)
        apply_gradient_all(dy, x, residual, weights, a, b, forward, relu, coefficients, grid, dx, dz)

    # -- whole steps ---------------------------------------------------------------------------------------------------

    def train(grid, relu, renorm, cumulative, hyper, weights, a, b, residual, x, y, params, state, new_state, saved):
        grid = named(grid)
        coefficients = np.empty((3 if a is None else 5, saved.shape[1]), params.dtype)
        if one_pass:
            shift = np.empty(saved.shape[1])
            partial = empty_partial(x, PLAIN_SUMS if weights is None else WEIGHTED_SUMS, grid, saved)
            flags, memory = (hyper, relu, renorm, cumulative), (coefficients, shift, partial)
            _, tiles = chunks_and_tiles(extent(x), grid)
            for tile in prange(tiles * params.shape[1] // saved.shape[1]):
                train_tile(
                    np.int64(tile), weights, a, b, residual, x, y, params, state, flags, grid, new_state, saved, memory
                )
        else:
            reduce_all(x, weights, grid, saved)
            last = params.shape[1]
            channel.train(0, last, params, state, hyper, a, renorm, cumulative, new_state, saved, coefficients)
            apply_all(x, residual, a, b, coefficients, relu, grid, y)

    def infer(grid, relu, hyper, residual, x, y, params, state):
        grid = named(grid)
        coefficients = np.empty((3, params.shape[1]), params.dtype)
        channel.infer(params, state, hyper, coefficients)
        apply_all(x, residual, None, None, coefficients, relu, grid, y)

    def backward(grid, relu, weights, a, b, dz, residual, x, dy, dx, saved, dparams):
        grid = named(grid)
        channels = dparams.shape[1]
        forward, coefficients = forward_of(a, dparams, saved), np.empty((4, saved.shape[1]), dparams.dtype)
        if one_pass:
            partial = empty_partial(x, 2 if a is None else 4, grid, saved)
            memory = forward, coefficients, partial
            _, tiles = chunks_and_tiles(extent(x), grid)
            for tile in prange(tiles * channels // saved.shape[1]):
                backward_tile(
                    np.int64(tile), weights, a, b, residual, x, dy, dx, dz, saved, relu, grid, dparams, memory
                )
        else:
            sums = reduce_gradient_all(dy, x, residual, weights, a, b, saved, forward, relu, grid)
            channel.parameter_gradients(0, channels, sums, saved, dparams)
            channel.input_coefficients(0, channels, channels, sums, saved, coefficients)
            apply_gradient_all(dy, x, residual, weights, a, b, forward, relu, coefficients, grid, dx, dz)

    def frozen_backward(grid, x, dy, dx, saved, dparams):
        grid = named(grid)
        channels = dparams.shape[1]
        coefficients = np.empty((4, saved.shape[1]), dparams.dtype)
        sums = reduce_gradient_all(dy, x, None, None, None, None, saved, coefficients, None, grid)
        channel.parameter_gradients(0, channels, sums, saved, dparams)
        channel.input_coefficients(0, channels, channels, sums, saved, coefficients)
        for s in range(coefficients.shape[1]):  # dx = (dy - 0) * scale + 0: the forward pass's apply, on dy
            coefficients[DX_MEAN, s] = 0
        apply_all(dy, None, None, None, coefficients, None, grid, dx)

    found = (reduce, apply, reduce_gradient, apply_gradient, train, infer, backward, frozen_backward)
    return {f.__name__: f for f in found}


def finish(renorm, cumulative, hyper, adjusted, moments, params, state, new_state, saved, coefficients):
    """The middle stage by itself."""
    last = params.shape[1]
    for row in range(MOMENT_ROWS):
        saved[row] = moments[row]
    channel.train(0, last, params, state, hyper, adjusted, renorm, cumulative, new_state, saved, coefficients)


def freeze(hyper, params, state, saved):
    """What a gradient needs after inference."""
    channel.freeze(0, params.shape[1], params, state, hyper[EPSILON], saved)


MIDDLE_STAGES: dict[str, Step] = {"finish": finish, "freeze": freeze}


@lru_cache(maxsize=16)
def names_of(step: str) -> tuple[str, ...]:
    """The arguments of a step, in their order."""
    function = MIDDLE_STAGES.get(step) or steps("planes", False, False)[step]
    return tuple(inspect.signature(function).parameters)


@lru_cache(maxsize=1024)
def compiled(
    step: str,
    schedule: str,
    one_pass: bool,
    parallel: bool,
    dtype: Any,
    statistic: Any,
    state: Any,
    contiguous: bool,
    absent: frozenset[str],
) -> Step:
    """A step compiled for one combination of types. `absent`: the names of the arguments that are None."""
    if step in MIDDLE_STAGES:
        function, name = MIDDLE_STAGES[step], step
    else:
        function, passes = steps(schedule, one_pass, parallel)[step], "one_pass" if one_pass else "two_passes"
        name = f"{schedule}_{step}_{passes}_{'parallel' if parallel else 'serial'}"
    if PLAIN:
        return run_by_python(function)
    rank = 3 if schedule in ("planes", "flat") else 4
    scalar = {"X": numba.from_dtype(dtype), "S": numba.from_dtype(statistic), "d": types.float64}
    scalar |= {"s": scalar["S"], "t": numba.from_dtype(state)}

    def argument(name: str) -> types.Type:
        kind = ARGUMENTS[name]
        if name in absent:
            return types.none
        if kind == "flag":
            return types.boolean
        if kind == "grid":
            return types.UniTuple(types.int64, len(Grid._fields))
        view = kind in ("X", "S")
        layout = "C" if not view or (kind == "X" and contiguous) else "A"
        return types.Array(scalar[kind[0]], rank if view else int(kind[1]), layout, readonly=name not in WRITES[step])

    signature = types.void(*[argument(name) for name in names_of(step)])
    return compile_kernel(function, name, signature, parallel)
