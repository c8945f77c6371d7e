"""How a step's work is cut into tasks, and how a task finds its elements; integers only.

The cuts depend on the shape alone, never on who computes them. So the sums are the same to the last bit, however many
threads there are.
"""

from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

# What a step is told about its loops, all int64. r0_step, r1_step, k1_step: how many elements of R0, R1 and K1 one task
# covers. store: how results are written (cpu/memory.py). span, period: column j of K1 belongs to statistic
# (j // span) % period of those of its k0.
Grid = namedtuple("Grid", "r0_step r1_step k1_step store span period")
# What one task covers.
Bounds = namedtuple("Bounds", "chunk k0 r0_begin r0_end r1_begin r1_end k1_begin k1_end")


def functions(compiled: Callable[[Any], Any]) -> SimpleNamespace:
    """The functions, for the target whose decorator `compiled` is. extent: R0, K0, R1, K1; grid: has the steps."""

    @compiled
    def chunks_and_tiles(extent, grid):
        """Chunks cut R0 x R1: partial sums of one statistic. Tiles cut K0 x K1: statistics."""
        r0, k0, r1, k1 = extent
        return -(-r0 // grid.r0_step) * -(-r1 // grid.r1_step), k0 * -(-k1 // grid.k1_step)

    @compiled
    def chunk_and_tile(task, extent, grid):
        """Of the task-th task in the order of memory."""
        _, k0s, r1, k1 = extent
        tiles, columns = -(-k1 // grid.k1_step), -(-r1 // grid.r1_step)
        rest, tile = divmod(task, tiles)
        rest, column = divmod(rest, columns)
        row, k0 = divmod(rest, k0s)
        return row * columns + column, k0 * tiles + tile

    @compiled
    def bounds_of(chunk, tile, extent, grid):
        """The Bounds of one task."""
        r0s, _, r1s, k1s = extent
        row, column = divmod(chunk, -(-r1s // grid.r1_step))
        k0, k1_tile = divmod(tile, -(-k1s // grid.k1_step))
        r0, r1, k1 = row * grid.r0_step, column * grid.r1_step, k1_tile * grid.k1_step
        r0_end, r1_end, k1_end = min(r0s, r0 + grid.r0_step), min(r1s, r1 + grid.r1_step), min(k1s, k1 + grid.k1_step)
        return Bounds(chunk, k0, r0, r0_end, r1, r1_end, k1, k1_end)

    found = (chunks_and_tiles, chunk_and_tile, bounds_of)
    return SimpleNamespace(**{f.__name__: f for f in found})
