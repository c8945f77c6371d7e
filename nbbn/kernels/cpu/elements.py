"""How serial functions over elements are compiled, and how a task finds its elements."""

import numba

from nbbn.runtime.linking import LinkedCompiler

# Sums may be reordered and contracted; NaN, infinity and zeros' order are left as IEEE has them. Functions without
# sums get no fast math.
SUMS = {"reassoc", "contract", "arcp", "nsz"}

# They are only called from other kernels: without wrappers for Python a step compiles in half the time.
INTERNAL = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

# fastmath is stated, or a function takes that of whichever caller comes first.
element = numba.njit(**INTERNAL, pipeline_class=LinkedCompiler, fastmath=False)
summing = numba.njit(**INTERNAL, pipeline_class=LinkedCompiler, fastmath=SUMS)
# Where the source says in which order: kernels that reorder sums, each in its own way, would differ in the last bits.
adding = numba.njit(**INTERNAL, pipeline_class=LinkedCompiler, fastmath={"contract", "nsz"})

# What a step is told about its loops, all int64: how many elements of R0, R1 and K1 one task covers; how results are
# written (memory.py); which statistic a column of K1 belongs to: (column // RUN) % PERIOD, of those of its k0.
R0_STEP, R1_STEP, K1_STEP, STORE, RUN, PERIOD = range(6)
GRID_SIZE = 6


@element
def chunks_and_tiles(extent, grid):
    """Chunks cut R0 x R1: partial sums of one statistic. Tiles cut K0 x K1: statistics."""
    r0, k0, r1, k1 = extent
    return -(-r0 // grid[R0_STEP]) * -(-r1 // grid[R1_STEP]), k0 * -(-k1 // grid[K1_STEP])


@element
def chunk_and_tile(task, extent, grid):
    """Of the task-th task in the order of memory."""
    tiles, columns = -(-extent[3] // grid[K1_STEP]), -(-extent[2] // grid[R1_STEP])
    rest, tile = divmod(task, tiles)
    rest, column = divmod(rest, columns)
    row, k0 = divmod(rest, extent[1])
    return row * columns + column, k0 * tiles + tile


@element
def bounds_of(chunk, tile, extent, grid):
    """What one task covers: chunk, k0, and the bounds of r0, r1 and k1."""
    row, column = divmod(chunk, -(-extent[2] // grid[R1_STEP]))
    k0, k1_tile = divmod(tile, -(-extent[3] // grid[K1_STEP]))
    r0_begin, r1_begin, k1_begin = row * grid[R0_STEP], column * grid[R1_STEP], k1_tile * grid[K1_STEP]
    return (
        chunk,
        k0,
        r0_begin,
        min(extent[0], r0_begin + grid[R0_STEP]),
        r1_begin,
        min(extent[2], r1_begin + grid[R1_STEP]),
        k1_begin,
        min(extent[3], k1_begin + grid[K1_STEP]),
    )
