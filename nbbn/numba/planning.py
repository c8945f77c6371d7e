"""How a step runs, found out by compiled code: what core/layout.py and engine/cpu/plan.py do for arrays in Python.

These functions are compiled once and kept on disk, like the steps: a user's own function only calls them.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import register_jitable

from nbbn.engine.cpu.schedule import Thresholds, grid_of
from nbbn.kernels.cpu.tasks import Grid
from nbbn.runtime import last_level_cache

# Rows of `strides` and `placed`: the arrays of a step, the result (y or dx) among them; in the last one of `placed` is
# the canonical shape. Only weights have another dtype than the input.
X, DY, RESIDUAL, RESULT, DZ, WEIGHTS = range(6)
ARRAYS, SHAPE = 6, 6
NOT_FOR_C = {"no_cfunc_wrapper": True}  # a way in for C is one more function to compile for each
jitable = register_jitable(**NOT_FOR_C)
ROW_OF = {"x": X, "dy": DY, "residual": RESIDUAL, "y": RESULT, "dx": RESULT, "dz": DZ, "weights": WEIGHTS}
# A plan: whether there is a canonical view, whether all arrays of the input's dtype are dense in it, whether the loops
# are those of rows, and the Grid.
GRID = types.NamedUniTuple(types.int64, len(Grid._fields), Grid)
PLAN = types.Tuple((types.boolean, types.boolean, types.boolean, GRID))
NO_GRID = (0,) * len(Grid._fields)
LIMITS = Thresholds()


def plan_dense(infers: bool, outer: int, channels: int, inner: int, itemsize: int, arrays: int, cache: int) -> Any:
    """The plan for C-contiguous arrays (outer, channels, inner), beside which there is nothing."""
    if channels == 1:
        view = (1, 1, outer * inner, 1)
    elif inner == 1:
        view = (1, 1, outer, channels)
    else:
        view = (outer, channels, inner, 1)
    in_rows, grid = grid_of(infers, view, 1, 1, itemsize, arrays, True, True, LIMITS, None, 1, cache)
    return True, True, in_rows, grid


def plan_strided(infers, groups, itemsize, there, kept, sizes, strides, placed, cache):
    """The plan for arrays of any strides.

    Args:
        groups: of a virtual batch. there, kept: sets of bits, of the rows of `strides`, and of the dimensions.
        sizes: (n,). strides: (ARRAYS, n), in bytes.
        placed: (ARRAYS + 1, 4); the strides of what kernels are given are written to it.
    """
    slices = collapse(sizes, kept, strides, there, placed)
    if slices == 0:
        return False, False, False, Grid(*NO_GRID)
    shape, arrays, contiguous, reshaped = placed[SHAPE], 0, True, True
    for row in range(WEIGHTS):
        if there >> row & 1:
            dense = is_dense(placed[row], shape, itemsize)
            arrays, contiguous = arrays + 1, contiguous and dense
            reshaped = reshaped and dense and is_dense(strides[row], sizes, itemsize)
    foldable = reshaped and not there >> WEIGHTS & 1
    view = (shape[0], shape[1], shape[2], shape[3])
    in_rows, grid = grid_of(
        infers, view, slices, groups, itemsize, arrays, contiguous, foldable, LIMITS, None, 1, cache
    )
    if foldable:  # the kernel may take them in another shape
        for row in range(WEIGHTS):
            placed[row, 3] = itemsize
            placed[row, 2] = placed[row, 3] * grid.k1
            placed[row, 1] = placed[row, 2] * grid.r1
            placed[row, 0] = placed[row, 1] * grid.k0
    return True, contiguous, in_rows, grid


@jitable
def is_dense(strides, sizes, itemsize):
    """Whether the elements follow each other in this order."""
    for i in range(len(sizes) - 1, -1, -1):
        if sizes[i] != 1 and strides[i] != itemsize:
            return False
        itemsize *= sizes[i]
    return True


@jitable
def collapse(sizes, kept, strides, there, placed):
    """Write the canonical shape and strides to `placed`: core.layout.collapse(). Returns: the slices of R0; 0 where
    there is no view."""
    placed[:] = 0
    placed[SHAPE] = slices = 1
    order = in_memory_order(sizes, strides[X])
    last = len(sizes)
    slot = 4  # R0, K0, R1 and K1 are 0 to 3, from the right, and slices are -1
    for i in order[::-1]:
        if sizes[i] == 1:
            continue
        is_kept = kept >> i & 1
        if is_kept:
            if i > last:  # not the order of the parameters
                return 0
            last = i
        if not (slot < 4 and slot & 1 == is_kept and follows(strides[:, i], there, placed, slot)):
            slot -= 1 if slot - 1 & 1 == is_kept else 2
            if slot < -1 or (slot == -1 and not follows(strides[:, i], there, placed, slot)):
                return 0
            if slot >= 0:
                placed[:ARRAYS, slot] = strides[:, i]
        if slot < 0:
            slices *= sizes[i]
        placed[SHAPE, max(slot, 0)] *= sizes[i]
    return slices


@jitable
def follows(strides, there, placed, slot):
    """Whether one more dimension goes on, in every array, where a slot ends."""
    slot = max(slot, 0)
    for row in range(ARRAYS):
        if there >> row & 1 and strides[row] != placed[row, slot] * placed[SHAPE, slot]:
            return False
    return True


@jitable
def in_memory_order(sizes, strides):
    """The dimensions, those of the longest strides first."""
    order = np.arange(len(sizes))
    for i in range(1, len(sizes)):
        place = i
        while place > 0 and abs(strides[order[place - 1]]) < abs(strides[i]):
            order[place] = order[place - 1]
            place -= 1
        order[place] = i
    return order


def strides_like(sizes, strides, itemsize, result):
    """Write the strides of a dense array in the memory order of another one: what numpy.empty_like() makes."""
    for i in in_memory_order(sizes, strides)[::-1]:
        result[i] = itemsize
        itemsize *= sizes[i]


# -- wrong values ------------------------------------------------------------------------------------------------------

# What is wrong: AXIS and DIVISOR by themselves; with one of NAMES that it is not a row of all channels, that its shape
# is another one than x's, and that it is no number from 0 to 1, or to infinity.
AXIS, DIVISOR, BATCH_AXIS, NO_GROUPS, SAVED, CLIPS, ROW, SHAPE_OF, MOMENTUM, FINITE = range(10)
NAMES = (
    *("gamma", "beta", "moving_mean", "moving_variance", "moving_stddev of renorm", "renorm_mean of renorm"),
    *("renorm_stddev of renorm", "out", "residual", "weights", "dy", "epsilon", "momentum", "renorm_momentum"),
)


def refuse(what: int, name: int, first: int, second: int) -> None:
    """Raise ValueError. Text is made here, once: in every function of a user's it would be most of what is compiled."""
    if what == AXIS:
        raise ValueError(
            f"axis must be between {-first} and {first - 1} for an input of rank {first}; received {second}"
        )
    if what == DIVISOR:
        accepted = "a positive integer that divides the batch"
        raise ValueError(f"virtual_batch_size must be {accepted} of {first} samples; received {second}")
    if what == BATCH_AXIS:
        raise ValueError("virtual_batch_size is about dimension 0, which must not be the axis")
    if what == NO_GROUPS:
        raise ValueError("virtual_batch_size needs axis=1 or axis=-1, or an x whose memory is in such an order")
    if what == SAVED:
        raise ValueError(f"saved must have shape ({first}, {second}), as batch_norm_train returns it for this x")
    if what == CLIPS:
        raise ValueError("rmin must be at most rmax, and dmax at least 0")
    if what == ROW:
        raise ValueError(f"{NAMES[name]} must have shape ({first},), a number per channel; received ({second},)")
    if what == SHAPE_OF:
        raise ValueError(f"{NAMES[name]} must have the shape of x")
    if what == MOMENTUM:
        raise ValueError(f"{NAMES[name]} must be a number from 0 to 1 (the weight of the old value)")
    raise ValueError(f"{NAMES[name]} must be a finite number of at least 0")


CACHE = last_level_cache()
_ONE, _TWO = types.Array(types.int64, 1, "C"), types.Array(types.int64, 2, "C")
_INT = types.int64
PLANNERS: dict[str, tuple[Any, Any]] = {
    "plan_dense": (plan_dense, PLAN(types.boolean, *[_INT] * 6)),
    "plan_strided": (plan_strided, PLAN(types.boolean, *[_INT] * 4, _ONE, _TWO, _TWO, _INT)),
    "refuse": (refuse, types.void(*[_INT] * 4)),
    "strides_like": (strides_like, types.void(_ONE, _ONE, _INT, _ONE)),
}
