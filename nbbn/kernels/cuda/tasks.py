"""How a step's work is cut into tasks, and how a task finds its elements; integers only.

The cuts depend on the shape alone. So the sums are the same to the last bit, whichever block computes them. extent: R0,
K0, R1, K1, where R0 is that of one slice and K0 counts through those of all slices; grid: has the steps and the counts
(blocks.py).
"""

from collections import namedtuple

from nbbn.kernels.cuda.memory import divide
from nbbn.kernels.cuda.target import device

# What one task covers. row: its K0 among those of all slices, by which statistics are counted.
Bounds = namedtuple("Bounds", "chunk row k0 r0_begin r0_end r1_begin r1_end k1_begin k1_end")


@device
def bounds_of(chunk, tile, extent, grid):
    """The Bounds of one task."""
    r0s, _, r1s, k1s = extent
    piece, column = divide(chunk, grid.r1_pieces)
    row, k1_tile = divide(tile, grid.k1_pieces)
    place, k0 = divide(row, grid.slice_k0)
    r0, r1, k1 = piece * grid.r0_step, column * grid.r1_step, k1_tile * grid.k1_step
    r0_end, r1_end, k1_end = min(r0s, r0 + grid.r0_step), min(r1s, r1 + grid.r1_step), min(k1s, k1 + grid.k1_step)
    first = place * r0s
    return Bounds(chunk, row, k0, first + r0, first + r0_end, r1, r1_end, k1, k1_end)
