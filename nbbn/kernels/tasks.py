"""How a step's work is cut into tasks, and how a task finds its elements; integers only.

The cuts depend on the shape alone, never on who computes: so do the sums, to the last bit.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

# What a step is told about its loops, all int64: how many elements of R0, R1 and K1 one task covers; how results are
# written (memory.py); which statistic a column of K1 belongs to: (column // RUN) % PERIOD, of those of its k0.
R0_STEP, R1_STEP, K1_STEP, STORE, RUN, PERIOD = range(6)
GRID_SIZE = 6


def functions(compiled: Callable[[Any], Any]) -> SimpleNamespace:
    """The functions, for the target whose decorator `compiled` is."""

    @compiled
    def chunks_and_tiles(extent, grid):
        """Chunks cut R0 x R1: partial sums of one statistic. Tiles cut K0 x K1: statistics."""
        r0, k0, r1, k1 = extent
        return -(-r0 // grid[R0_STEP]) * -(-r1 // grid[R1_STEP]), k0 * -(-k1 // grid[K1_STEP])

    @compiled
    def chunk_and_tile(task, extent, grid):
        """Of the task-th task in the order of memory."""
        tiles, columns = -(-extent[3] // grid[K1_STEP]), -(-extent[2] // grid[R1_STEP])
        rest, tile = divmod(task, tiles)
        rest, column = divmod(rest, columns)
        row, k0 = divmod(rest, extent[1])
        return row * columns + column, k0 * tiles + tile

    @compiled
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

    found = (chunks_and_tiles, chunk_and_tile, bounds_of)
    return SimpleNamespace(**{f.__name__: f for f in found})
