"""Arrays in compiled functions: copies, results, and the plan for where they lie."""

from typing import Any

import numpy as np
from numba.extending import overload

from nbbn.numba import planning
from nbbn.numba.checks import is_absent
from nbbn.numba.intrinsics import address, any_order, copy, planner, with_strides, write_geometry
from nbbn.numba.planning import ARRAYS, CACHE, NOT_FOR_C, SHAPE, jitable

plan_dense, plan_strided, strides_like = planner("plan_dense"), planner("plan_strided"), planner("strides_like")
refuse = planner("refuse")


def helper(decide: Any) -> Any:
    """A function for compiled functions whose text `decide` chooses by the types of its arguments."""

    def stub(*args: Any) -> Any:
        raise NotImplementedError

    overload(stub, jit_options=NOT_FOR_C)(decide)
    return stub


@helper
def copied(array):
    """A dense copy; None of None."""
    if is_absent(array):
        return lambda array: None
    if array.layout == "C":
        return lambda array: array

    def dense(array):
        found = np.empty(array.shape, array.dtype)
        copy(found, array)
        return any_order(found)

    return dense


@helper
def new_like(array):
    """A new dense array in the same order in memory: numpy.empty_like(). None of None."""
    if is_absent(array):
        return lambda array: None
    if array.layout == "C":
        return lambda array: np.empty_like(array)
    n = array.ndim

    def strided(array):
        geometry = np.empty((3, n), np.int64)
        for i in range(n):
            geometry[0, i], geometry[1, i] = array.shape[i], array.strides[i]
        strides_like((geometry[0], geometry[1], array.itemsize, geometry[2]))
        return with_strides(np.empty(array.size, array.dtype), array, geometry[2])

    return strided


@helper
def new_dense(array):
    """A new dense array with this shape; None of None."""
    if is_absent(array):
        return lambda array: None
    if array.layout == "C":
        return lambda array: np.empty_like(array)
    return lambda array: any_order(np.empty(array.shape, array.dtype))


@jitable
def reach(array):
    """The first address of an array, and the one after the last."""
    low = high = address(array)
    for i in range(array.ndim):
        length = (array.shape[i] - 1) * array.strides[i]
        if length < 0:
            low += length
        else:
            high += length
    return low, high + array.itemsize


@helper
def spoils(out, array):
    """Whether what is written to `out` changes elements of an input that have not been read."""
    if is_absent(array):
        return lambda out, array: False
    same_type = out.dtype == array.dtype

    def compare(out, array):
        (low, high), (first, last) = reach(out), reach(array)
        if high <= first or last <= low:
            return False
        return not (same_type and address(out) == address(array) and out.strides == array.strides)

    return compare


@helper
def place(out, x, dy, residual, weights):
    """Where a step writes its result: `out`, unless that has parts of an input in other places."""
    if is_absent(out):
        return lambda out, x, dy, residual, weights: new_like(x)
    layout = out.layout

    def given(out, x, dy, residual, weights):
        if spoils(out, x) or spoils(out, dy) or spoils(out, residual) or spoils(out, weights):
            return new_like(out)
        return out

    def given_in_any_order(out, x, dy, residual, weights):
        if spoils(out, x) or spoils(out, dy) or spoils(out, residual) or spoils(out, weights):
            return new_like(out)
        return any_order(out)

    return given if layout == "C" else given_in_any_order


@helper
def deliver(out, result):
    """`out` with the result in it, or the result."""
    if is_absent(out):
        return lambda out, result: result

    def into(out, result):
        if address(out) != address(result):
            copy(out, result)
        return out

    return into


@helper
def arrange(infers, kept, virtual, groups, x, dy, residual, result, dz, weights):
    """The plan, the strides for kernels, and the arrays, or dense copies where these alone have a canonical view.

    virtual: None where there are no groups."""
    there = [not is_absent(k) for k in (x, dy, residual, result, dz, weights)]
    data = [k for k, is_there in zip((x, dy, residual, result, dz), there, strict=False) if is_there]
    if is_absent(weights) and is_absent(virtual) and all(k.layout == "C" for k in data):
        arrays = len(data)

        def dense(infers, kept, virtual, groups, x, dy, residual, result, dz, weights):
            outer = inner = 1
            for i in range(x.ndim):
                if i < kept:
                    outer *= x.shape[i]
                elif i > kept:
                    inner *= x.shape[i]
            plan = plan_dense((infers, outer, x.shape[kept], inner, x.itemsize, arrays, CACHE))
            return plan, None, x, dy, residual, result, dz, weights

        return dense
    bits, n, grouped = sum(1 << i for i, is_there in enumerate(there) if is_there), x.ndim + 1, not is_absent(virtual)

    @jitable
    def plan_of(infers, kept, groups, arrays, item, placed):
        sizes, strides = np.ones(n, np.int64), np.zeros((ARRAYS, n), np.int64)
        write_geometry(arrays, sizes, strides)
        mask, number = 2 << kept, 1
        if grouped:  # sample n is in group n % groups
            number = groups
            sizes[0], sizes[1] = sizes[1] // number, number
            strides[:, 0] = strides[:, 1] * number
            mask |= 2
        return plan_strided((infers, number, item, bits, mask, sizes, strides, placed, CACHE))

    def strided(infers, kept, virtual, groups, x, dy, residual, result, dz, weights):
        placed = np.empty((SHAPE + 1, 4), np.int64)
        x1, dy1, residual1, result1, dz1, weights1 = x, dy, residual, result, dz, weights
        plan = plan_of(infers, kept, groups, (x, dy, residual, result, dz, weights), x.itemsize, placed)
        if not plan[0]:
            x1, dy1, residual1, weights1 = copied(x), copied(dy), copied(residual), copied(weights)
            result1, dz1 = new_dense(result), new_dense(dz)
            plan = plan_of(infers, kept, groups, (x1, dy1, residual1, result1, dz1, weights1), x.itemsize, placed)
            if not plan[0]:
                refuse((planning.NO_GROUPS, 0, 0, 0))
        return plan, placed, x1, dy1, residual1, result1, dz1, weights1

    return strided


@helper
def settle(placed, array, written):
    """Write what is in a copy of a result to its place."""
    if is_absent(placed) or is_absent(array):
        return lambda placed, array, written: None

    def settled(placed, array, written):
        if address(array) != address(written):
            copy(array, written)

    return settled
