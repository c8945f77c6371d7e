"""How a step's work is cut into tasks, and how a task finds its elements; integers only.

The cuts depend on the shape alone. So the sums are the same to the last bit, whichever block computes them. extent: R0,
K0, R1, K1, where R0 is that of one slice and K0 counts through those of all slices.
"""

from collections import namedtuple
from functools import lru_cache
from typing import Any

import numpy as np

from nbbn.kernels.cuda.target import device, index_type

# What a step is told about its loops. The steps of a task; how many families of tiles there are, which share their
# channels, and tiles in a family; how many chunks R0 x R1 is cut into, tiles K0 x K1, and pieces R1 and K1; the K0 of
# one slice of R0; the chunks of a group, and how many groups; the channels of a family, of which the last one may have
# fewer. by_*: what a division by each takes, see division().
Grid = namedtuple(
    "Grid",
    "r0_step r1_step k1_step members chunks groups tiles families r1_pieces k1_pieces slice_k0 group columns "
    "by_tiles by_families by_r1_pieces by_k1_pieces by_slice_k0 by_group by_columns",
)
# What one task covers. row: its K0 among those of all slices, by which statistics are counted.
Bounds = namedtuple("Bounds", "chunk row k0 r0_begin r0_end r1_begin r1_end k1_begin k1_end")


def grid_of(steps: tuple[int, int, int], tiles: int, families: int = 1, **counts: int) -> Grid:
    """The Grid of these steps and counts, which are 1 where they are not given."""
    known = dict.fromkeys(Grid._fields[3:], 1) | counts
    known |= {"tiles": tiles, "families": families, "members": tiles // families}
    known["groups"] = -(-known["chunks"] // known["group"])
    divisions = {name: division(known[name.removeprefix("by_")]) for name in known if name.startswith("by_")}
    return Grid(*steps, **known | divisions)


_SHIFT = 32  # where an entry of by_* keeps its shift


def division(divisor: int) -> int:
    """A multiplier of 32 bits and a shift that stand for a division of numbers up to 2^31 by the divisor, as one
    number. A multiprocessor has no division of integers: it takes some twenty instructions, and a task may have little
    more for its elements. Source: Granlund and Montgomery 1994, theorem 4.2."""
    bits = (divisor - 1).bit_length()
    return -(-(1 << 31 + bits) // divisor) | (31 + bits) << _SHIFT


@device
def divide(number, divisor, by):
    """Quotient and remainder of numbers of blocks, pieces or tiles. All are less than 2^31."""
    low = np.int64(0xFFFFFFFF)  # of factors that have 32 bits a multiprocessor makes a product of 64 in one instruction
    quotient = ((number & low) * (by & low)) >> (by >> _SHIFT)
    return quotient, number - (quotient & low) * (divisor & low)


@lru_cache(maxsize=2)
def task_functions(wide: bool) -> Any:
    """wide: whether indices have 64 bits."""
    index = index_type(wide)

    @device
    def bounds_of(chunk, tile, extent, grid):
        """The Bounds of one task."""
        r0s, _, r1s, k1s = extent
        piece, column = divide(chunk, grid.r1_pieces, grid.by_r1_pieces)
        row, k1_tile = divide(tile, grid.k1_pieces, grid.by_k1_pieces)
        place, k0 = divide(row, grid.slice_k0, grid.by_slice_k0)
        r0, r1, k1 = index(piece * grid.r0_step), index(column * grid.r1_step), index(k1_tile * grid.k1_step)
        r0_end, r1_end, k1_end = min(r0s, r0 + grid.r0_step), min(r1s, r1 + grid.r1_step), min(k1s, k1 + grid.k1_step)
        first = index(place * r0s)
        return Bounds(
            chunk, row, index(k0), index(first + r0), index(first + r0_end), r1, index(r1_end), k1, index(k1_end)
        )

    return bounds_of
