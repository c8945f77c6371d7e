"""How a step's work is cut into tasks, and how a task finds its elements; integers only.

The cuts depend on the shape alone. So the sums are the same to the last bit, whichever block computes them. extent: R0,
K0, R1, K1; grid: has the steps and the counts (blocks.py).
"""

from collections import namedtuple

from nbbn.kernels.cuda.memory import divide
from nbbn.kernels.cuda.target import device

# What one task covers.
Bounds = namedtuple("Bounds", "chunk k0 r0_begin r0_end r1_begin r1_end k1_begin k1_end")


@device
def bounds_of(chunk, tile, extent, grid):
    """The Bounds of one task."""
    r0s, _, r1s, k1s = extent
    row, column = divide(chunk, grid.r1_pieces)
    k0, k1_tile = divide(tile, grid.k1_pieces)
    r0, r1, k1 = row * grid.r0_step, column * grid.r1_step, k1_tile * grid.k1_step
    r0_end, r1_end, k1_end = min(r0s, r0 + grid.r0_step), min(r1s, r1 + grid.r1_step), min(k1s, k1 + grid.k1_step)
    return Bounds(chunk, k0, r0, r0_end, r1, r1_end, k1, k1_end)
