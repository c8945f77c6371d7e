"""How a step runs on a GPU: the one place where sizes decide. Nothing depends on the device, so bits do not either."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from nbbn.core.layout import Sizes
from nbbn.kernels.cuda.blocks import COLUMNS
from nbbn.kernels.cuda.memory import VECTOR_BYTES
from nbbn.kernels.cuda.tasks import Grid, grid_of


@dataclass(frozen=True)
class Thresholds:
    """What sizes are compared with.

    threads: of a block. columns: threads of a block side by side in rows, COLUMNS at most.
    blocks: that reduce, about: several for each multiprocessor of the largest GPUs.
    max_chunks: of a statistic. group: chunks whose sums are added up at once, by the last block of these, before the
    last group's adds up those of the groups: a thread does so one after the other, and the step waits for it.
    vectors: that a reducing thread reads, at least: its share of the block's tree is then small.
    applied, most_applied: elements that a thread writes, about. With few the look-up of coefficients is repeated often,
    with many there may not be `blocks`.
    one_launch: elements of a family, at most, that one block reduces and then writes.
    multiprocessors: of large GPUs. With fewer families some have nothing to do in one launch, for as long as the others
    need for their family; alone: elements of a family, at most, for which that takes no longer than a second launch,
    where a multiprocessor is alone: 0.5 ns for each and 5 us.
    """

    threads: int = 256
    columns: int = COLUMNS
    blocks: int = 1024
    max_chunks: int = 256
    group: int = 16
    vectors: int = 16
    applied: int = 16
    most_applied: int = 64
    one_launch: int = 1 << 16
    multiprocessors: int = 128
    alone: int = 10_000


Place = tuple[int, Sizes, int]  # of an array: its address, canonical strides in bytes, itemsize


@dataclass(frozen=True)
class Schedule:
    """How a step runs.

    rows: whether statistics lie side by side. swapped: whether the kernels get R0 and R1 in each other's place: a
    thread is quicker along r1, of which it reads several values before it waits, so that is the longer one of rows, and
    not a plane that the threads of a block read at once. width: elements of one access. block: its threads (x, y).
    reduce, apply: the Grid of each. one_launch: a block has a family of tiles for itself.
    """

    rows: bool
    swapped: bool
    width: int
    block: tuple[int, int]
    reduce: Grid
    apply: Grid
    one_launch: bool

    @property
    def counters(self) -> int:
        """How many a reduction takes: one for the blocks of each group of chunks, and one for the groups."""
        return int(self.reduce.families * (self.reduce.groups + 1))

    def place(self, sizes: Sizes) -> Sizes:
        """A canonical shape, or strides, as the kernels get them."""
        return (sizes[2], sizes[1], sizes[0], sizes[3]) if self.swapped else sizes


def choose(
    view: Sizes,
    slices: int,
    groups: int,
    itemsize: int,
    places: Iterable[Place],
    thresholds: Thresholds,
    one_launch: bool | None = None,
) -> Schedule:
    """The schedule for a canonical view.

    Args:
        view: with the R0 of one slice, and the K0 of all of them. slices: of R0. groups: of a virtual batch.
        itemsize: of an element. places: of all arrays.
        one_launch: a choice made by hand; None leaves it to the thresholds.
    """
    t, (r0, k0, r1, k1) = thresholds, view
    rows = k1 > 1
    width = _width(view, itemsize, places)
    across = min(t.columns, COLUMNS, t.threads) if rows else t.threads
    x = min(across, power_of_two(-(-(k1 if rows else r1) // width)))
    block = (x, t.threads // x)
    columns = min(k1, x * width) if rows else 1
    tiles = max(1, k0 * -(-k1 // columns))  # explain() may ask about an empty input
    channels = k0 * k1 // groups
    aligned = groups == 1 or channels % k1 == 0 or (k0 == 1 and channels % columns == 0)
    families = tiles // groups if aligned else 1
    values = r0 * r1
    # With slices a thread may have a short way along r1: they follow each other in R0.
    swapped = slices == 1 and (r1 < r0 if rows else r0 > 1 and r1 <= x * width)
    short = swapped and not rows
    if swapped:
        r0, r1 = r1, r0
    per_block = (block[1] if rows else x * width * block[1]) * t.vectors
    chunks = max(1, min(t.blocks // tiles, t.max_chunks, values // per_block))
    family, idle = values * columns * groups, max(0, t.multiprocessors - families)
    quick = family <= t.one_launch and family * idle <= t.alone * t.multiprocessors
    one = aligned and (quick if one_launch is None else one_launch)
    unit = block[1] if rows or short else x * width
    reduce = (r0, r1) if one else _cut(r0, r1, chunks, unit, short)
    most, least = (values * columns // (t.threads * n) for n in (t.applied, t.most_applied))
    apply_chunks = max(1, min(most, max(least, t.blocks // tiles)))
    apply = reduce if one else _cut(r0, r1, apply_chunks, unit, short)
    extent = r0, k0, r1, k1
    together = max(1, min(channels, columns) if families > 1 else channels)
    counts = {"slice_k0": max(1, k0 // slices), "group": t.group, "columns": together}
    to_reduce, to_apply = (_grid(extent, (*cut, columns), families, counts) for cut in (reduce, apply))
    return Schedule(rows, swapped, width, block, to_reduce, to_apply, one)


def _grid(extent: Sizes, steps: tuple[int, int, int], families: int, counts: dict[str, int]) -> Grid:
    r0_step, r1_step, k1_step = steps
    by = r0_step, 1, r1_step, max(1, k1_step)
    r0s, k0, r1s, k1s = (-(-n // step) for n, step in zip(extent, by, strict=True))
    return grid_of(steps, k0 * k1s, families, chunks=r0s * r1s, r1_pieces=r1s, k1_pieces=k1s, **counts)


def _width(view: Sizes, itemsize: int, places: Iterable[Place]) -> int:
    """The most elements of one access that divide the innermost dimension, with every array's pieces in place."""
    inner = 3 if view[3] > 1 else 2
    width = math.gcd(VECTOR_BYTES // itemsize, view[inner])
    for address, strides, size in places:
        if strides[inner] != size:
            return 1
        while any(n % (width * size) for i, n in enumerate((*strides, address)) if i != inner):
            width //= 2
    return width


def _cut(r0: int, r1: int, chunks: int, unit: int, whole: bool) -> tuple[int, int]:
    """The steps of r0 and r1 for about so many chunks; whole: of all r0."""
    if whole:
        return r0, -(-r1 // (min(chunks, r1) * unit)) * unit
    length = -(-r0 * r1 // chunks)
    if length >= r1:
        return -(-length // r1), r1
    pieces = max(1, r1 // length)
    return 1, -(-r1 // (pieces * unit)) * unit


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
