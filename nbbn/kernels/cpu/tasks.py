"""How a step's work is cut into tasks, and how a task finds its elements; whole numbers only, or what stands for them.

Chunks, which decide how a sum is made, depend on the shape alone, never on who computes them. So the sums are the same
to the last bit, however many threads there are. How many statistics a task has changes no sum.
"""

from collections import namedtuple
from typing import Any

from numba.extending import register_jitable

from nbbn.kernels.cpu.lanes import minimum

# What a step is told about its loops, all int64. r0_step, r1_step, k1_step: how many elements of R0, R1 and K1 one task
# covers at most. group: so many k0 belong to one virtual batch, or to all. shares: the tasks that these are cut into;
# none has two more than another, so that no thread waits for the one with the largest.
# r0_apart, k0_apart: how far apart groups begin in R0, where they are its slices, or in K0. depth: the R0 of a group.
# repeats, written: so many rows are taken as one, where sums are made and where results are written. span, inner,
# period: column j of K1 belongs to statistic j // span * inner + j % inner of the `period` that its k0 has. streamed:
# whether results go past the caches, 0 or 1. chunks, tiles: how many there are; families: how many sets of tiles that
# have the same channels. r0, k0, r1, k1: the sizes of the arrays.
Grid = namedtuple(
    "Grid",
    "r0_step r1_step k1_step group shares r0_apart k0_apart depth repeats written span inner period streamed "
    "chunks tiles families r0 k0 r1 k1",
)
SIZES = tuple(Grid._fields.index(name) for name in ("r0", "k0", "r1", "k1"))
# What one task covers. ahead: by how many k0 its statistics are farther than its elements.
Bounds = namedtuple("Bounds", "chunk r0 r0_end k0 k0_end r1 r1_end k1 k1_end ahead")


@register_jitable
def quotient(n: Any, divisor: Any) -> Any:
    """n / divisor, rounded up."""
    return (n + divisor - 1) // divisor


@register_jitable
def chunks_and_tiles(extent: Any, grid: Any) -> tuple[Any, Any]:
    """Chunks cut R0 x R1: partial sums of one statistic. Tiles cut K0 x K1: statistics. extent: R0 of one slice, K0 of
    all of them, R1, K1."""
    r0, k0, r1, k1 = extent
    tiles = k0 // grid.group * grid.shares * quotient(k1, grid.k1_step)
    return quotient(r0, grid.r0_step) * quotient(r1, grid.r1_step), tiles


def chunk_and_tile(task: Any, extent: Any, grid: Any) -> tuple[Any, Any]:
    """Of the task-th task in the order of memory."""
    columns, k1_tiles = quotient(extent[2], grid.r1_step), quotient(extent[3], grid.k1_step)
    k0_tiles = grid.tiles // k1_tiles
    rest, k1_tile = task // k1_tiles, task % k1_tiles
    rest, column = rest // columns, rest % columns
    row, k0_tile = rest // k0_tiles, rest % k0_tiles
    return row * columns + column, k0_tile * k1_tiles + k1_tile


def bounds_of(chunk: Any, tile: Any, extent: Any, grid: Any) -> Bounds:
    """The Bounds of one task."""
    _, _, r1s, k1s = extent
    columns, k1_tiles = quotient(r1s, grid.r1_step), quotient(k1s, grid.k1_step)
    k0_tile = tile // k1_tiles
    group, share = k0_tile // grid.shares, k0_tile % grid.shares
    k0, k0_end = share * grid.group // grid.shares, (share + 1) * grid.group // grid.shares
    r0, r1, k1 = chunk // columns * grid.r0_step, chunk % columns * grid.r1_step, tile % k1_tiles * grid.k1_step
    r0_end = minimum(grid.depth, r0 + grid.r0_step)
    r1_end, k1_end = minimum(r1s, r1 + grid.r1_step), minimum(k1s, k1 + grid.k1_step)
    first_r0, first_k0 = group * grid.r0_apart, group * grid.k0_apart
    r0, r0_end, k0, k0_end = first_r0 + r0, first_r0 + r0_end, first_k0 + k0, first_k0 + k0_end
    return Bounds(chunk, r0, r0_end, k0, k0_end, r1, r1_end, k1, k1_end, group * grid.group - first_k0)


def statistics(bounds: Any, grid: Any) -> tuple[Any, Any]:
    """The first statistic that a task covers, and the one after the last."""
    begin, end = (bounds.k0 + bounds.ahead) * grid.period, (bounds.k0_end - 1 + bounds.ahead) * grid.period
    return begin + bounds.k1 // grid.span * grid.inner, end + bounds.k1_end // grid.span * grid.inner
