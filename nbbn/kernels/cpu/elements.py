"""How serial functions over elements are compiled, and how a task finds its elements."""

import numba

# Sums may be reordered and contracted; NaN, infinity and zeros' order are left as IEEE has them. Functions without
# sums get no fast math.
SUMS = {"reassoc", "contract", "arcp", "nsz"}

# They are only called from other kernels: without wrappers for Python a step compiles in half the time.
INTERNAL = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

element = numba.njit(**INTERNAL)
summing = numba.njit(**INTERNAL, fastmath=SUMS)


@element
def tasks(extent, grid):
    """The number of tasks, and of chunks per statistic: chunks cut R0 x R1, tiles cut K1."""
    r0, k0, r1, k1 = extent
    chunks = -(-r0 // grid[0]) * -(-r1 // grid[1])
    return chunks * k0 * -(-k1 // grid[2]), chunks


@element
def tile(task, extent, grid):
    """What one task covers: chunk, k0, and the bounds of r0, r1 and k1. Consecutive tasks are close in memory."""
    r0, k0, r1, k1 = extent
    tiles, columns = -(-k1 // grid[2]), -(-r1 // grid[1])
    rest, tile_index = divmod(task, tiles)
    rest, column = divmod(rest, columns)
    row, kept = divmod(rest, k0)
    r0_begin, r1_begin, k1_begin = row * grid[0], column * grid[1], tile_index * grid[2]
    return (
        row * columns + column,
        kept,
        r0_begin,
        min(r0, r0_begin + grid[0]),
        r1_begin,
        min(r1, r1_begin + grid[1]),
        k1_begin,
        min(k1, k1_begin + grid[2]),
    )
