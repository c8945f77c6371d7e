"""Whole steps, each one compiled call: reduce, channel, apply.

Every step exists twice, parallel and serial, from one text; only here is there a prange. The chunks and the order in
which their sums are added depend on the shape alone, so both give the same bits for any number of threads, and so do
two passes over the whole array and one, in which each tile of statistics is reduced and applied while a core's cache
still has it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba import prange, types

from nbbn.kernels.channel import BATCH_MEAN
from nbbn.kernels.cpu import channel, planes, rows, runs
from nbbn.kernels.cpu.elements import INTERNAL, bounds_of, chunk_and_tile, chunks_and_tiles, element
from nbbn.kernels.tasks import GRID_SIZE
from nbbn.runtime import compile_kernel

SCHEDULES: dict[str, Any] = {"planes": planes, "runs": runs, "rows": rows.PLAIN_ROWS, "folded": rows.FOLDED_ROWS}

Step = Callable[..., Any]


@lru_cache(maxsize=8)
def steps(schedule: str, one_pass: bool, parallel: bool) -> dict[str, Step]:
    """The steps of one schedule as functions yet to be compiled, by name."""
    loops = SCHEDULES[schedule]
    extent, statistics, shifts, sum_moments = loops.extent, loops.statistics, loops.shifts, loops.moments
    normalize, gradient_sums, input_gradient = loops.normalize, loops.gradient_sums, loops.input_gradient
    # Inlined into each step, a stage is optimized once instead of twice: a third of the compile time.
    stage = numba.njit(**INTERNAL, parallel=parallel, inline="always")

    @element
    def empty_partial(x, rows, grid, saved):
        chunks, _ = chunks_and_tiles(extent(x), grid)
        return np.empty((chunks, rows, saved.shape[1]))

    @element
    def moments_of_statistics(first, last, x, partial, shift, saved):
        values = np.float64(x.size // saved.shape[1])
        channel.add_chunks(first, last, partial)
        channel.batch_moments(first, last, partial[0], shift, values, saved)

    # -- two passes: the whole array is reduced, then applied ------------------------------------------------------

    @stage
    def reduce_moments(x, weights, grid, saved):
        view = extent(x)
        chunks, tiles = chunks_and_tiles(view, grid)
        shift = np.empty(saved.shape[1])
        for tile in range(tiles):
            shifts(x, weights, bounds_of(0, tile, view, grid), grid, shift)
        partial = empty_partial(x, 2 if weights is None else 3, grid, saved)
        for task in prange(chunks * tiles):
            chunk, tile = chunk_and_tile(np.int64(task), view, grid)
            sum_moments(x, weights, shift, bounds_of(chunk, tile, view, grid), grid, partial)
        moments_of_statistics(0, saved.shape[1], x, partial, shift, saved)

    @stage
    def apply(x, residual, a, b, coefficients, relu, grid, y):
        view = extent(x)
        chunks, tiles = chunks_and_tiles(view, grid)
        for task in prange(chunks * tiles):
            chunk, tile = chunk_and_tile(np.int64(task), view, grid)
            normalize(x, residual, a, b, coefficients, relu, bounds_of(chunk, tile, view, grid), grid, y)

    @stage
    def reduce_gradient(dy, x, residual, a, b, saved, forward, relu, grid):
        view = extent(x)
        chunks, tiles = chunks_and_tiles(view, grid)
        partial, mean = empty_partial(x, 2 if a is None else 4, grid, saved), saved[BATCH_MEAN]
        for task in prange(chunks * tiles):
            chunk, tile = chunk_and_tile(np.int64(task), view, grid)
            bounds = bounds_of(chunk, tile, view, grid)
            gradient_sums(dy, x, residual, a, b, mean, forward, relu, bounds, grid, partial)
        channel.add_chunks(0, saved.shape[1], partial)
        return partial[0]

    @stage
    def apply_gradient(dy, x, residual, weights, a, b, forward, relu, coefficients, grid, dx, dresidual):
        view = extent(x)
        chunks, tiles = chunks_and_tiles(view, grid)
        for task in prange(chunks * tiles):
            chunk, tile = chunk_and_tile(np.int64(task), view, grid)
            bounds = bounds_of(chunk, tile, view, grid)
            input_gradient(dy, x, residual, weights, a, b, forward, relu, coefficients, bounds, grid, dx, dresidual)

    # -- one pass: tile by tile; those of one channel in all groups together, as they share its moving statistics ------

    @element
    def train_tile(
        tile,
        x,
        residual,
        weights,
        a,
        b,
        y,
        params,
        state,
        hyper,
        relu,
        renorm,
        grid,
        new_state,
        saved,
        coefficients,
        shift,
        partial,
    ):
        view = extent(x)
        chunks, tiles = chunks_and_tiles(view, grid)
        step = tiles * params.shape[1] // saved.shape[1]
        for t in range(tile, tiles, step):
            shifts(x, weights, bounds_of(0, t, view, grid), grid, shift)
            for chunk in range(chunks):
                sum_moments(x, weights, shift, bounds_of(chunk, t, view, grid), grid, partial)
            first, last = statistics(bounds_of(0, t, view, grid), grid)
            moments_of_statistics(first, last, x, partial, shift, saved)
        first, last = statistics(bounds_of(0, tile, view, grid), grid)
        channel.train(first, last, params, state, hyper, a, renorm, new_state, saved, coefficients)
        for t in range(tile, tiles, step):
            for chunk in range(chunks):
                bounds = bounds_of(chunk, t, view, grid)
                normalize(x, residual, a, b, coefficients, relu, bounds, grid, y)

    @stage
    def train_by_tile(
        x, residual, weights, a, b, y, params, state, hyper, relu, renorm, grid, new_state, saved, coefficients
    ):
        _, tiles = chunks_and_tiles(extent(x), grid)
        shift = np.empty(saved.shape[1])
        partial = empty_partial(x, 2 if weights is None else 3, grid, saved)
        for tile in prange(tiles * params.shape[1] // saved.shape[1]):
            train_tile(
                np.int64(tile),
                x,
                residual,
                weights,
                a,
                b,
                y,
                params,
                state,
                hyper,
                relu,
                renorm,
                grid,
                new_state,
                saved,
                coefficients,
                shift,
                partial,
            )

    @element
    def backward_tile(
        tile,
        x,
        dy,
        residual,
        weights,
        a,
        b,
        dx,
        dresidual,
        params,
        saved,
        relu,
        grid,
        dparams,
        forward,
        coefficients,
        partial,
    ):
        view = extent(x)
        chunks, tiles = chunks_and_tiles(view, grid)
        step, mean = tiles * params.shape[1] // saved.shape[1], saved[BATCH_MEAN]
        for t in range(tile, tiles, step):
            for chunk in range(chunks):
                bounds = bounds_of(chunk, t, view, grid)
                gradient_sums(dy, x, residual, a, b, mean, forward, relu, bounds, grid, partial)
            first, last = statistics(bounds_of(0, t, view, grid), grid)
            channel.add_chunks(first, last, partial)
        first, last = statistics(bounds_of(0, tile, view, grid), grid)
        channel.backward(first, last, partial[0], params, saved, coefficients, dparams)
        for t in range(tile, tiles, step):
            for chunk in range(chunks):
                bounds = bounds_of(chunk, t, view, grid)
                input_gradient(dy, x, residual, weights, a, b, forward, relu, coefficients, bounds, grid, dx, dresidual)

    @stage
    def backward_by_tile(
        x, dy, residual, weights, a, b, dx, dresidual, params, saved, relu, grid, dparams, forward, coefficients
    ):
        _, tiles = chunks_and_tiles(extent(x), grid)
        partial = empty_partial(x, 2 if a is None else 4, grid, saved)
        for tile in prange(tiles * params.shape[1] // saved.shape[1]):
            backward_tile(
                np.int64(tile),
                x,
                dy,
                residual,
                weights,
                a,
                b,
                dx,
                dresidual,
                params,
                saved,
                relu,
                grid,
                dparams,
                forward,
                coefficients,
                partial,
            )

    # -- steps -----------------------------------------------------------------------------------------------------

    def moments(x, weights, grid, saved):
        reduce_moments(x, weights, grid, saved)

    def train(x, residual, weights, a, b, y, relu, renorm, grid, params, state, hyper, new_state, saved):
        coefficients = np.empty((3 if a is None else 5, saved.shape[1]), params.dtype)
        if one_pass:
            train_by_tile(
                x, residual, weights, a, b, y, params, state, hyper, relu, renorm, grid, new_state, saved, coefficients
            )
        else:
            reduce_moments(x, weights, grid, saved)
            channel.train(0, params.shape[1], params, state, hyper, a, renorm, new_state, saved, coefficients)
            apply(x, residual, a, b, coefficients, relu, grid, y)

    def infer(x, residual, y, relu, grid, params, state, hyper):
        coefficients = np.empty((3, params.shape[1]), params.dtype)
        channel.infer(params, state, hyper, coefficients)
        apply(x, residual, None, None, coefficients, relu, grid, y)

    def backward(x, dy, residual, weights, a, b, dx, dresidual, relu, grid, params, saved, dparams):
        forward = np.empty((3 if a is None else 5, saved.shape[1]), params.dtype)
        channel.forward_coefficients(0, params.shape[1], a, params, saved, forward)
        coefficients = np.empty((4, saved.shape[1]), params.dtype)
        if one_pass:
            backward_by_tile(
                x, dy, residual, weights, a, b, dx, dresidual, params, saved, relu, grid, dparams, forward, coefficients
            )
        else:
            sums = reduce_gradient(dy, x, residual, a, b, saved, forward, relu, grid)
            channel.backward(0, params.shape[1], sums, params, saved, coefficients, dparams)
            apply_gradient(dy, x, residual, weights, a, b, forward, relu, coefficients, grid, dx, dresidual)

    def frozen_backward(x, dy, dx, grid, params, saved, dparams):
        coefficients = np.empty((4, saved.shape[1]), params.dtype)
        sums = reduce_gradient(dy, x, None, None, None, saved, coefficients, None, grid)
        channel.backward(0, params.shape[1], sums, params, saved, coefficients, dparams)
        for s in range(coefficients.shape[1]):  # dx = (dy - 0) * scale + 0: the forward pass's apply, on dy
            coefficients[0, s] = 0
        apply(dy, None, None, None, coefficients, None, grid, dx)

    return {f.__name__: f for f in (moments, train, infer, backward, frozen_backward)}


# The arguments of each step: X is an array of the input's dtype, S one of the statistics' dtype, both canonical views
# of the schedule's rank and layout; s is an array of the statistics' dtype, d one of float64, with their rank; r says
# whether there is a relu, a renorm; g is the grid. ? may be None; ! is written.
_ARGUMENTS = {
    "moments": "X S? g d2!",
    "train": "X X? S? S? S? X! r? r? g s2 s2 d1 s2! d2!",
    "infer": "X X? X! r? g s2 s2 d1",
    "backward": "X X X? S? S? S? X! X!? r? g s2 d2 s2!",
    "frozen_backward": "X X X! g s2 d2 s2!",
}


@lru_cache(maxsize=1024)
def compiled(
    step: str,
    schedule: str,
    one_pass: bool,
    parallel: bool,
    dtype: Any,
    statistic: Any,
    contiguous: bool,
    absent: tuple[int, ...],
) -> Step:
    """A step compiled for one combination of types. `absent`: the positions of the arguments that are None."""
    rank = 3 if schedule in ("planes", "runs") else 4
    scalar = {"X": numba.from_dtype(dtype), "S": numba.from_dtype(statistic), "d": types.float64}
    scalar["s"] = scalar["S"]

    def argument(position: int, code: str) -> types.Type:
        if position in absent:
            return types.none
        if code[0] in "rg":
            return types.boolean if code[0] == "r" else types.UniTuple(types.int64, GRID_SIZE)
        view = code[0] in "XS"
        layout = "C" if not view or (code[0] == "X" and contiguous) else "A"
        return types.Array(scalar[code[0]], rank if view else int(code[1]), layout, readonly="!" not in code)

    arguments = [argument(i, code) for i, code in enumerate(_ARGUMENTS[step].split())]
    passes = "one_pass" if one_pass else "two_passes"
    name = f"{schedule}_{step}_{passes}_{'parallel' if parallel else 'serial'}"
    return compile_kernel(steps(schedule, one_pass, parallel)[step], name, types.void(*arguments), parallel)
