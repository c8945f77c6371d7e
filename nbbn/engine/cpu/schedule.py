"""How a step runs on a canonical view: the one place where sizes decide.

Every number here is measured (docs/performance.md). What decides how a sum is made, which is the view, the loops and
the chunks, depends on shape and strides alone; what only decides who computes it when depends on the machine, too.
"""

import math
from dataclasses import dataclass

from nbbn.core.layout import Sizes
from nbbn.kernels.cpu.lanes import BLOCK, LANES, LINE
from nbbn.kernels.cpu.tasks import Grid, chunks_and_tiles, quotient
from nbbn.runtime import last_level_cache, likely_layer, thread_limit

# By threading layer: a region costs 6 to 10 us of a call, workqueue's sleeping threads 150 to 200.
PARALLEL = {"omp": 1 << 17, "tbb": 1 << 17, "workqueue": 1 << 22}
ROW_BLOCK = 4  # rows are blocks of four (kernels/cpu/rows.py)


@dataclass(frozen=True)
class Thresholds:
    """What sizes are compared with.

    chunk_elements: of a chunk, at least: they hide a parallel task's cost.
    write_elements: of a task that makes no sums, at least.
    max_tasks: of a step: enough for many cores, few enough that adding up the partial sums stays cheap.
    chunk_rows: of a chunk, at least: its sums, two float64 per column, are then small beside what it reads.
    tile_elements: of the statistics that a task takes together: a core's second cache has them.
    tile_columns: of a task, at most.
    repeated_columns: of several rows taken as one, at most: beside their sums, which are float64, there is room for x.
    written_columns: the same where results are written, and there are no sums.
    expanded_rows: so many of such long rows at least repay that the coefficients are repeated, too.
    parallel_elements: from here on a second core saves more than a parallel region costs; None: PARALLEL's.
    short_plane: planes of at most so many elements are columns of rows.
    tiles_per_thread: one pass over tiles instead of two over the array needs so many, or threads wait for the last one.
    streamed_share: what is written is not read again soon if it and its inputs take more than this share of the
        last-level cache.
    streamed_run: bytes of a run that begins and ends inside of lines of the cache, at least: these are written in part,
        which is worth it for many whole ones.
    threads, cache: how many threads there are, and the bytes of the last-level cache; None: the machine's.
    """

    chunk_elements: int = 1 << 15
    write_elements: int = 1 << 14
    max_tasks: int = 32
    chunk_rows: int = 128
    tile_elements: int = 1 << 16
    tile_columns: int = 4 * BLOCK
    repeated_columns: int = 512
    written_columns: int = BLOCK
    expanded_rows: int = 16
    parallel_elements: int | None = None
    short_plane: int = 64
    tiles_per_thread: int = 4
    streamed_share: float = 1.25
    streamed_run: int = 2048
    threads: int | None = None
    cache: int | None = None


@dataclass(frozen=True)
class Schedule:
    """How a step runs.

    loops: "planes" or "rows". shape: of the arrays that the kernel gets. grid: what the kernel is told about its loops
    (kernels/cpu/tasks.py). one_pass: over tiles of statistics, instead of two over the whole array.
    """

    loops: str
    shape: Sizes
    grid: Grid
    one_pass: bool
    parallel: bool

    @property
    def values(self) -> tuple[int, int]:
        """Of one statistic: how many there are, and in how many chunks."""
        return self.shape[0] * self.shape[2] * self.grid.span, max(1, self.grid.chunks)


def choose(
    step: str,
    view: Sizes,
    groups: int,
    itemsize: int,
    arrays: int,
    contiguous: bool,
    foldable: bool,
    thresholds: Thresholds,
    loops: str | None = None,
    parallel: bool | None = None,
    one_pass: bool | None = None,
) -> Schedule:
    """The schedule of a step; what is not None is a choice made by hand.

    Args:
        view: canonical. groups: of a virtual batch.
        arrays: how many of the input's size are read and written.
        contiguous: in the view, all arrays of the input's dtype are. foldable: and there are no others.
    """
    t, size, groups = thresholds, math.prod(view), max(1, groups)
    # Without sums, a run of one vector or more is better off by itself.
    short = min(t.short_plane, LANES) if step == "infer" else t.short_plane
    loops, shape, span, repeats = _rows_or_planes(view, foldable, loops, short, t)
    threads, cache = t.threads or thread_limit(), t.cache or last_level_cache()
    if parallel is None:
        parallel = size >= (PARALLEL[likely_layer()] if t.parallel_elements is None else t.parallel_elements)
    parallel = parallel and threads > 1
    r0, k0, r1, k1 = (*shape, 1)[:4]
    group = max(1, k0 // groups if k0 % groups == 0 else k0)
    r0_step, r1_step, k1_step = _cut((r0, k0, r1, k1), loops, span, repeats, t)
    k0_step = _statistics_of_a_task(loops, (r0, group, r1, k1), k1_step, t, threads if parallel else 1)
    if step == "infer" and loops == "planes":
        r0_step, k0_step = _in_order(r0, group, r1_step, t)
    tiles = -(-group // k0_step) * -(-k1 // k1_step)
    aligned = groups == 1 or k0 % groups == 0 or (k1 // groups) % k1_step == 0
    possible = step in ("train", "backward") and aligned
    if one_pass is None:
        one_pass = not parallel or tiles >= t.tiles_per_thread * threads or tiles % threads == 0
    written = _rows_as_one(t.written_columns, k1, r1_step, t) if foldable and loops == "rows" and span == 1 else 1
    run = (r1 if loops == "planes" else written * k1_step) * itemsize
    whole_lines = run % LINE == 0 or run >= t.streamed_run
    streamed = int(contiguous and whole_lines and size * itemsize * arrays > t.streamed_share * cache)
    steps = r0_step, k0_step, r1_step, k1_step
    grid = Grid(*steps, group, repeats, written, span, max(1, k1 // max(1, span)), streamed, 0, 0, 0, r0, k0, r1, k1)
    chunks, all_tiles = chunks_and_tiles((r0, k0, r1, k1), grid)
    grid = grid._replace(chunks=chunks, tiles=all_tiles, families=all_tiles // groups)
    return Schedule(loops, shape, grid, possible and one_pass, parallel)


def _rows_or_planes(
    view: Sizes, foldable: bool, loops: str | None, short_plane: int, t: Thresholds
) -> tuple[str, Sizes, int, int]:
    """The loops, the shape of their arrays, the columns of a statistic, and how many rows are taken as one."""
    r0, k0, r1, k1 = view
    if k1 == 1:
        if foldable and loops != "planes" and r1 <= short_plane and r0 >= ROW_BLOCK and k0 > 1:
            return "rows", (1, 1, r0, k0 * r1), r1, 1
        if loops != "rows":
            return "planes", view[:3], 1, 1
    elif loops == "planes":
        raise ValueError(f"schedule 'planes' needs K1 = 1; this input's view is [R0, K0, R1, K1] = {list(view)}")
    return "rows", view, 1, _rows_as_one(t.repeated_columns, k1, r1, t) if foldable else 1


def _rows_as_one(columns: int, k1: int, r1: int, t: Thresholds) -> int:
    if k1 > t.tile_columns:  # rows that are cut into tiles do not follow each other
        return 1
    return max(1, min(columns // max(1, k1), r1 // t.expanded_rows))


def _cut(extent: Sizes, loops: str, span: int, repeats: int, t: Thresholds) -> tuple[int, int, int]:
    """The steps of r0, r1 and k1 that cut the view into tasks."""
    r0, k0, r1, k1 = extent
    most = t.tile_columns if span == 1 else min(BLOCK, t.tile_columns) // max(1, span) * span
    width = max(1, min(k1, most))  # an empty input has no column
    tiles = max(1, k0 * -(-k1 // width))
    values, block = max(1, r0 * r1), ROW_BLOCK * repeats if loops == "rows" else 1
    pieces = max(1, values // t.chunk_rows) if loops == "rows" else values
    chunks = max(1, min(values * width // t.chunk_elements, t.max_tasks // tiles, pieces))
    chunks = 1 << (chunks.bit_length() - 1)  # as many for each of 2, 4, 8 ... threads
    length = quotient(values, chunks)
    if length >= r1:
        return quotient(length, max(1, r1)), max(1, r1), width
    pieces = quotient(r1, length)
    return 1, quotient(quotient(r1, pieces), block) * block, width


def _statistics_of_a_task(loops: str, extent: Sizes, k1_step: int, t: Thresholds, threads: int) -> int:
    """How many k0 of one group."""
    r0, group, r1, k1 = extent
    if k1_step < k1:
        return 1
    most = max(1, t.tile_elements // max(1, r0 * r1 * k1))
    return max(1, min(most, -(-group // threads)))


def _in_order(r0: int, group: int, r1_step: int, t: Thresholds) -> tuple[int, int]:
    """The steps of r0 and k0 for tasks that are one piece of memory each."""
    planes = max(1, t.write_elements // max(1, r1_step))
    if planes >= group:
        return max(1, min(r0, planes // group)), group
    return 1, planes
