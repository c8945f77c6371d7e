"""Whole steps, each one compiled call: reduce, channel, apply.

Every step exists twice, parallel and serial, from one text; only here is there a prange. The chunks and the order in
which their sums are added depend on the shape alone, so both give the same bits for any number of threads.
"""

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import numba
import numpy as np
from numba import prange, types

from nbbn.kernels.cpu import channel, planes, rows
from nbbn.kernels.cpu.elements import INTERNAL, element, tasks, tile
from nbbn.runtime import compile_kernel

SCHEDULES = {"planes": planes, "rows": rows}

Step = Callable[..., Any]


@element
def add_chunks(partial):
    """The sums of all chunks, in their order."""
    sums = partial[0]
    for chunk in range(1, partial.shape[0]):
        for row in range(partial.shape[1]):
            for s in range(partial.shape[2]):
                sums[row, s] += partial[chunk, row, s]
    return sums


@lru_cache(maxsize=4)
def steps(schedule: str, parallel: bool) -> dict[str, Step]:
    """The steps of one schedule as functions yet to be compiled, by name."""
    loops: ModuleType = SCHEDULES[schedule]
    # Inlined into each step, a stage is optimized once instead of twice: a third of the compile time.
    stage = numba.njit(**INTERNAL, parallel=parallel, inline="always")

    @stage
    def reduce_moments(x, weights, grid, saved):
        view = loops.extent(x)
        task_count, chunks = tasks(view, grid)
        shift = np.empty(view[1] * view[3])
        loops.shifts(x, weights, shift)
        partial = np.empty((chunks, 2 if weights is None else 3, view[1] * view[3]))
        for task in prange(task_count):
            loops.moments(x, weights, shift, tile(np.int64(task), view, grid), partial)
        channel.batch_moments(add_chunks(partial), shift, np.float64(view[0] * view[2]), saved)

    @stage
    def apply(x, a, b, coefficients, grid, y):
        view = loops.extent(x)
        for task in prange(tasks(view, grid)[0]):
            loops.normalize(x, a, b, coefficients, tile(np.int64(task), view, grid), y)

    @stage
    def reduce_gradient(dy, x, a, b, saved_mean, grid):
        view = loops.extent(x)
        task_count, chunks = tasks(view, grid)
        partial = np.empty((chunks, 2 if a is None else 4, view[1] * view[3]))
        for task in prange(task_count):
            loops.gradient_sums(dy, x, a, b, saved_mean, tile(np.int64(task), view, grid), partial)
        return add_chunks(partial)

    @stage
    def apply_gradient(dy, x, weights, a, coefficients, grid, dx):
        view = loops.extent(x)
        for task in prange(tasks(view, grid)[0]):
            loops.input_gradient(dy, x, weights, a, coefficients, tile(np.int64(task), view, grid), dx)

    def moments(x, weights, grid, saved):
        reduce_moments(x, weights, grid, saved)

    def train(x, weights, a, b, params, state, hyper, grid, y, new_state, saved):
        view = loops.extent(x)
        reduce_moments(x, weights, grid, saved)
        coefficients = np.empty((3 if a is None else 5, view[1] * view[3]), params.dtype)
        channel.train(params, state, hyper, new_state, saved, coefficients)
        apply(x, a, b, coefficients, grid, y)

    def infer(x, params, state, hyper, grid, y):
        view = loops.extent(x)
        coefficients = np.empty((3, view[1] * view[3]), params.dtype)
        channel.infer(params, state, hyper, coefficients)
        apply(x, None, None, coefficients, grid, y)

    def backward(x, dy, weights, a, b, params, saved, grid, dx, dparams):
        view = loops.extent(x)
        sums = reduce_gradient(dy, x, a, b, saved[channel.BATCH_MEAN], grid)
        coefficients = np.empty((4, view[1] * view[3]), params.dtype)
        channel.backward(sums, params, saved, coefficients, dparams)
        apply_gradient(dy, x, weights, a, coefficients, grid, dx)

    def frozen_backward(x, dy, params, saved, grid, dx, dparams):
        view = loops.extent(x)
        sums = reduce_gradient(dy, x, None, None, saved[channel.BATCH_MEAN], grid)
        coefficients = np.empty((4, view[1] * view[3]), params.dtype)
        channel.backward(sums, params, saved, coefficients, dparams)
        for s in range(coefficients.shape[1]):  # dx = (dy - 0) * scale + 0: the forward pass's apply, on dy
            coefficients[0, s] = 0
        apply(dy, None, None, coefficients, grid, dx)

    return {f.__name__: f for f in (moments, train, infer, backward, frozen_backward)}


# The arguments of each step: x is an array of the input's dtype, s one of the statistics' dtype, d one of float64, g
# the grid. A capital is a canonical view, of the schedule's rank and layout; ? may be None; ! is written.
_ARGUMENTS = {
    "moments": "X S? g d2!",
    "train": "X S? S? S? s2 s2 d1 g X! s2! d2!",
    "infer": "X s2 s2 d1 g X!",
    "backward": "X X S? S? S? s2 d2 g X! s2!",
    "frozen_backward": "X X s2 d2 g X! s2!",
}


@lru_cache(maxsize=1024)
def compiled(
    step: str, schedule: str, parallel: bool, dtype: Any, statistic: Any, contiguous: bool, absent: tuple[int, ...]
) -> Step:
    """A step compiled for one combination of types. `absent`: the positions of the arguments that are None."""
    rank = 3 if schedule == "planes" else 4
    scalar = {"X": numba.from_dtype(dtype), "S": numba.from_dtype(statistic), "d": types.float64}
    scalar["s"] = scalar["S"]

    def argument(position: int, code: str) -> types.Type:
        if position in absent:
            return types.none
        if code == "g":
            return types.UniTuple(types.int64, 3)
        view = code[0] in "XS"
        layout = "C" if not view or (code[0] == "X" and contiguous) else "A"
        return types.Array(scalar[code[0]], rank if view else int(code[1]), layout, readonly="!" not in code)

    arguments = [argument(i, code) for i, code in enumerate(_ARGUMENTS[step].split())]
    function = steps(schedule, parallel)[step]
    return compile_kernel(
        function, f"{schedule}_{step}_{'parallel' if parallel else 'serial'}", types.void(*arguments), parallel
    )
