"""How a step runs on a canonical view: the one place where sizes decide.

Every number here is measured (docs/architecture.md). What decides how a sum is made, which is the view, the loops and
the chunks, depends on shape and strides alone; what only decides who computes it when depends on the machine, too.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from numba.extending import register_jitable

from nbbn.core.layout import Sizes
from nbbn.kernels.cpu.lanes import BLOCK, LANES, LINE
from nbbn.kernels.cpu.tasks import Grid, chunks_and_tiles, quotient
from nbbn.runtime import last_level_cache, likely_layer, thread_limit

# By threading layer: a region of OpenMP costs 2 us in a loop, 20 with cold caches; the threads of workqueue sleep.
PARALLEL = {"omp": 1 << 17, "tbb": 3 << 16, "workqueue": 1 << 22}
# What an element costs, in that of an output: 0.1 to 0.15, 0.25 to 0.35 and 0.35 to 0.45 ns.
WORK = {"infer": 1, "apply": 1, "reduce": 2, "reduce_sequences": 2, "apply_gradient": 2, "train": 3}
WORK_OF_GRADIENT = 4
NARROWEST = 128  # columns of a task
READ_AFTER_INFERENCE = 1.5  # as much may inference take of the cache: the next layer reads its result, and nothing else
ROW_BLOCK = 4  # rows are blocks of four (kernels/cpu/rows.py)


class Thresholds(NamedTuple):
    """What sizes are compared with.

    chunk_elements: of a chunk, at least: they hide a parallel task's cost.
    write_elements: of a task that makes no sums, at least.
    max_tasks: of a step: enough for many cores, few enough that adding up the partial sums stays cheap.
    chunk_rows: of a chunk, at least: its sums, two float64 per column, are then small beside what it reads.
    tile_elements: of the statistics that a task takes together: a core's second cache has them.
    tile_columns: of a task, at most.
    repeated_columns: of several rows taken as one, at most: beside their sums, which are float64, there is room for x.
    written_columns: the same where results are written, and there are no sums.
    expanded_rows: so many of such long rows, of all samples, repay that the coefficients are repeated, too.
    parallel_elements: of inference, from which on a second core saves more than a parallel region costs, and of others
        by their WORK; None: PARALLEL's.
    short_plane: planes of at most so many elements are columns of rows; the next one is four whole vectors.
    short_batch: and of so many samples for each of these elements, at least: each column has a cost of its own.
    short_block: blocks of runs of the same statistics lie side by side in a row, too, if they have at most so many
        elements for each sample: coefficients are repeated, and sums added up, once for all samples.
    tiles_per_thread: one pass over tiles instead of two over the array needs so many, or threads wait for the last one.
    streamed_share: what is written is not read again soon if it and its inputs take more than this share of the
        last-level cache, and of inference READ_AFTER_INFERENCE as much.
    streamed_run: bytes of a plane that begins and ends inside of lines of the cache, at least: these are written in
        part, which is worth it for many whole ones.
    threads, cache: how many threads there are, and the bytes of the last-level cache; None: the machine's.
    """

    chunk_elements: int = 1 << 15
    write_elements: int = 1 << 14
    max_tasks: int = 32
    chunk_rows: int = 64
    tile_elements: int = 1 << 16
    tile_columns: int = 16 * BLOCK
    repeated_columns: int = 512
    written_columns: int = BLOCK
    expanded_rows: int = 32
    parallel_elements: int | None = None
    short_plane: int = 63
    short_batch: float = 0.6
    short_block: int = 32
    tiles_per_thread: int = 4
    streamed_share: float = 1.0
    streamed_run: int = 1024
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
        return self.shape[0] * self.shape[2] * (self.grid.span // self.grid.inner), max(1, self.grid.chunks)


def choose(
    step: str,
    view: Sizes,
    slices: int,
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
        view: canonical. slices: that its R0 consists of. groups: of a virtual batch.
        arrays: how many of the input's size are read and written.
        contiguous: in the view, all arrays of the input's dtype are. foldable: and there are no others.
    """
    t, groups = thresholds, max(1, groups)
    threads, cache = t.threads or thread_limit(), t.cache or last_level_cache()
    if loops == "planes" and view[3] != 1:
        raise ValueError(f"schedule 'planes' needs K1 = 1; this input's view is [R0, K0, R1, K1] = {list(view)}")
    by_rows = None if loops is None else loops == "rows"

    def with_workers(workers: int) -> Schedule:
        in_rows, grid = grid_of(
            step == "infer", view, slices, groups, itemsize, arrays, contiguous, foldable, t, by_rows, workers, cache
        )
        shape, families = (grid.r0, grid.k0, grid.r1, grid.k1), grid.families
        in_groups = grid.r0_apart > 0 or grid.k0 % groups == 0  # R0 or K0, and not K1, has the groups
        aligned = groups == 1 or in_groups or (grid.k1 // groups) % grid.k1_step == 0
        in_one = workers == 1 or families >= t.tiles_per_thread * workers or families % workers == 0
        in_one = step in ("train", "backward") and aligned and (in_one if one_pass is None else one_pass)
        return Schedule(
            "rows" if in_rows else "planes", shape if in_rows else shape[:3], grid, in_one, parallel=workers > 1
        )

    if parallel is False or threads == 1:
        return with_workers(1)
    found = with_workers(threads)
    if parallel or _is_worth_it(step, math.prod(view) * max(1, itemsize // 4), found, t):
        return found
    return with_workers(1)


def _is_worth_it(step: str, size: int, found: Schedule, t: Thresholds) -> bool:
    """Whether there is work for more than one thread, and more than its regions cost. size: in elements of float32;
    those of 16 bits, which have to be converted, take as long, and those of float64 twice as long."""
    least = PARALLEL[likely_layer()] if t.parallel_elements is None else t.parallel_elements
    regions = 1 if found.one_pass or step not in ("train", "backward", "frozen_backward") else 2
    return found.grid.chunks * found.grid.tiles > 1 and size * WORK.get(step, WORK_OF_GRADIENT) >= least * regions


def of_whole_samples(s: Schedule) -> Schedule:
    """The same where R0 counts samples of which a part counts: no chunk ends within one."""
    grid = s.grid._replace(r1_step=max(1, s.grid.r1))
    chunks, tiles = chunks_and_tiles((grid.r0, grid.k0, grid.r1, grid.k1), grid)
    return replace(s, grid=grid._replace(chunks=chunks, tiles=tiles, families=tiles))


# -- whole numbers only: for Python, and for kernels that look at shapes themselves (nbbn/numba) -----------------------


@register_jitable
def grid_of(infers, view, slices, groups, itemsize, arrays, contiguous, foldable, t, by_rows, threads, cache):
    """Whether the loops are those of rows, and the Grid. infers: without sums. by_rows: a choice made by hand, or None.
    threads: that work on the step. cache: bytes of the last level."""
    # Without sums, a run of one vector or more is better off by itself.
    short = min(t.short_plane, LANES - 1) if infers else t.short_plane
    in_rows, slices, (r0, k0, r1, k1), span, inner, repeats = _rows_or_planes(view, slices, foldable, by_rows, short, t)
    # From here on r0 is that of one slice, and k0 counts through the k0 of all of them.
    group = max(1, min(k0 // groups if k0 % groups == 0 else k0, k0 // slices))
    apart = (r0, 0) if slices > 1 else (0, group)
    r0_step, r1_step, k1_step = _cut((r0, k0, r1, k1), infers, in_rows, span, repeats, t)
    tasks = k0 * quotient(r0, r0_step) * quotient(r1, r1_step)
    # Where a row has several groups, tiles end where these do, or they are no sets of the same channels.
    free = groups == 1 or k0 % groups == 0 or (k1 // groups) % k1_step != 0
    if free and repeats == 1 and (k1_step < k1 or tasks < threads):
        k1_step = _columns_of_a_task(k1, k1_step, span, tasks, threads)
    shares = _shares_of_statistics((r0, group, r1, k1), k1_step, t, threads)
    if infers and not in_rows:
        r0_step, shares = _in_order(r0, group, r1_step, t)
    whole_rows = in_rows and span == 1 and k1_step == k1
    written = _rows_as_one(t.written_columns, k1, r0_step, r1_step, t) if foldable and whole_rows else 1
    share = t.streamed_share * (READ_AFTER_INFERENCE if infers else 1)
    large = contiguous and r0 * k0 * r1 * k1 * itemsize * arrays > share * cache
    lines = _rows_of_whole_lines(k1 * itemsize)
    if large and written >= lines:
        written = written // lines * lines
    run = (written * k1_step if in_rows else r1) * itemsize
    # Rows that begin at other places of a line each have their coefficients at other places, too (kernels/cpu/rows.py).
    streamed = int(large and (run % LINE == 0 or (run >= t.streamed_run and not in_rows)))
    if repeats * written > 1:
        span = inner = max(1, k1)
    period = max(1, k1 // max(1, span) * inner)
    steps = (r0_step, r1_step, k1_step)
    counts = (group, shares, *apart, r0, repeats, written, span, inner, period, streamed)
    sizes = (r0 * slices, k0 // slices, r1, k1)
    chunks, tiles = chunks_and_tiles((r0, k0, r1, k1), Grid(*steps, *counts, 0, 0, 0, *sizes))
    return in_rows, Grid(*steps, *counts, chunks, tiles, tiles // groups, *sizes)


@register_jitable
def _rows_or_planes(view, slices, foldable, by_rows, short_plane, t):
    """Whether the loops are those of rows, the slices of R0, the R0 of one and the K0 of all, R1 and K1, the columns
    that belong together and of how many statistics they are, and how many rows are taken as one."""
    r0, k0, r1, k1 = view
    r0 = r0 // slices
    if k1 == 1:
        enough = r0 >= max(ROW_BLOCK, t.short_batch * r1)
        if foldable and (by_rows is None or by_rows) and r1 <= short_plane and enough and k0 > 1:
            return True, 1, (1, slices, r0, k0 * r1), r1, 1, 1
        if by_rows is None or not by_rows:
            return False, slices, (r0, slices * k0, r1, 1), 1, 1, 1
    elif foldable and k0 > 1 and r1 > 1 and r1 * k1 <= min(t.repeated_columns, t.short_block * r0):
        return True, 1, (1, slices, r0, k0 * r1 * k1), r1 * k1, k1, 1
    repeats = _rows_as_one(t.repeated_columns, k1, r0, r1, t) if foldable else 1
    return True, slices, (r0, slices * k0, r1, k1), 1, 1, repeats


@register_jitable
def _rows_as_one(columns, k1, r0, r1, t):
    if k1 > t.tile_columns:  # rows that are cut into tiles do not follow each other
        return 1
    most = max(r0 * r1 // t.expanded_rows, LANES // max(1, k1))  # shorter than a vector they cost more than that
    most = max(1, min(columns // max(1, k1), most))
    return max(1, quotient(r1, quotient(max(1, r1), most)))  # all of them are alike; an empty input has one, too


@register_jitable
def _rows_of_whole_lines(size):
    """The fewest rows of so many bytes that are whole lines together."""
    return LINE // min(LINE, max(1, size & -size))  # the largest power of 2 that divides it


@register_jitable
def _cut(extent, infers, in_rows, span, repeats, t):
    """The steps of r0, r1 and k1 that cut the view into tasks."""
    r0, k0, r1, k1 = extent
    most = t.tile_columns if span == 1 else min(BLOCK, t.tile_columns) // max(1, span) * span
    width = max(1, min(k1, most))  # an empty input has no column
    tiles = max(1, k0 * quotient(k1, width))
    values, block = max(1, r0 * r1), ROW_BLOCK * repeats if in_rows else 1
    pieces = max(1, values // t.chunk_rows) if in_rows and not infers else values
    most_chunks = max(1, min(values * width // t.chunk_elements, t.max_tasks // tiles, pieces))
    chunks = 1
    while 2 * chunks <= most_chunks:  # as many for each of 2, 4, 8 ... threads
        chunks *= 2
    length = quotient(values, chunks)
    if length >= r1:
        return quotient(length, max(1, r1)), max(1, r1), width
    return 1, quotient(quotient(r1, quotient(r1, length)), block) * block, width


@register_jitable
def _shares_of_statistics(extent, k1_step, t, threads):
    """How many tasks share the k0 of one group: as many for each thread."""
    r0, group, r1, k1 = extent
    if k1_step < k1:
        return group
    most = max(1, t.tile_elements // max(1, r0 * r1 * k1))
    return max(1, min(group, quotient(quotient(group, most), threads) * threads))


@register_jitable
def _columns_of_a_task(k1, k1_step, span, tasks, threads):
    """How much of a row that is cut: tiles that are alike, and two for each thread where there are no other tasks.
    Threads write to both sides of their borders; whole lines, and some of them, where rows begin with one."""
    share = quotient(2 * threads, max(1, tasks))  # a thread that wakes late finds less left to do
    tiles = quotient(quotient(k1, k1_step), share) * share
    unit = span if span > 1 else LANES
    least = quotient(NARROWEST, unit) * unit
    return max(1, min(k1_step, max(least, quotient(quotient(k1, max(1, tiles)), unit) * unit)))


@register_jitable
def _in_order(r0, group, r1_step, t):
    """The step of r0, and how many share the k0 of a group, for tasks that are one piece of memory each."""
    planes = max(1, t.write_elements // max(1, r1_step))
    if planes >= group:
        return max(1, min(r0, planes // group)), 1
    return 1, quotient(group, planes)
