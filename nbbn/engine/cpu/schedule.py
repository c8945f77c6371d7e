"""How a step runs on a canonical view: the one place where sizes decide.

Every number here is measured (docs/performance.md). What decides the order of a sum, which is the view, the run and
the chunks, depends on shape and strides alone; what only decides who computes it when depends on the machine, too.
"""

import math
from dataclasses import dataclass

from nbbn.core.layout import Sizes
from nbbn.kernels.cpu.memory import BLOCK, BUFFERED, DIRECT, STREAMED
from nbbn.kernels.tasks import Grid
from nbbn.runtime import last_level_cache, thread_limit

ROW_BLOCK = 4  # rows are blocks of four (kernels/cpu/rows.py)


@dataclass(frozen=True)
class Thresholds:
    """What sizes are compared with.

    chunk_elements: of a chunk, at least: they hide a parallel task's cost.
    max_tasks: of a step: enough for many cores, few enough that adding up the partial sums stays cheap.
    chunk_rows: of a chunk, at least: its sums, two float64 per column, are then small beside what it reads.
    tile_columns: of a task, at most.
    folded_columns: of folded rows, at most: beside their sums, which are float64, there is room for x in L1.
    parallel_elements: from here on a second core saves more than a parallel region costs: 2 us when the cores are idle,
        but a scheduler's time slice when they are not (libgomp's threads spin until the last one arrives), which a
        small call must not risk.
    folded_elements: smaller inputs do not repay the compilation of one more kernel.
    short_plane: planes of at most so many elements are columns of rows.
    tiles_per_thread: one pass over tiles instead of two over the array needs so many, or threads wait for the last one.
    streamed_share: what is written is not read again soon if it and its inputs take more than this share of the
        last-level cache.
    threads, cache: how many threads there are, and the bytes of the last-level cache; None: the machine's.
    """

    chunk_elements: int = 1 << 16
    max_tasks: int = 32
    chunk_rows: int = 128
    tile_columns: int = BLOCK
    folded_columns: int = 512
    parallel_elements: int = 1 << 17
    folded_elements: int = 1 << 15
    short_plane: int = 256
    tiles_per_thread: int = 4
    streamed_share: float = 1.0
    threads: int | None = None
    cache: int | None = None


@dataclass(frozen=True)
class Schedule:
    """How a step runs.

    loops: "planes", "flat" (planes in the order of memory), "rows" or "folded" rows. shape: of the arrays that the
    kernel gets. grid: what the kernel is told about its loops (kernels/tasks.py). one_pass: over tiles of statistics,
    instead of two over the whole array.
    """

    loops: str
    shape: Sizes
    grid: Grid
    one_pass: bool
    parallel: bool

    @property
    def values(self) -> tuple[int, int]:
        """Of one statistic, or of all of them where they are flat: how many there are, and in how many chunks."""
        r0, _, r1, k1 = extent(self.loops, self.shape)
        chunks = -(-r0 // self.grid.r0_step) * -(-r1 // self.grid.r1_step)
        return r0 * r1 * max(1, k1 // max(1, self.grid.period)), max(1, chunks)


def extent(loops: str, shape: Sizes) -> Sizes:
    """R0, K0, R1, K1 as the kernels' loops count them: rows of all r0 are one sequence."""
    return (*shape, 1) if len(shape) == 3 else (1, shape[1], shape[0] * shape[2], shape[3])


def choose(
    step: str,
    view: Sizes,
    groups: int,
    itemsize: int,
    arrays: int,
    contiguous: bool,
    foldable: bool,
    in_place: bool,
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
        in_place: the output is one of the inputs.
    """
    t, size, groups = thresholds, math.prod(view), max(1, groups)
    foldable = foldable and size >= t.folded_elements
    in_order = step == "infer" and contiguous and view[3] == 1 and loops is None
    flat = "flat", (1, 1, size), view[2], view[1]
    loops, shape, span, period = flat if in_order else _rows_or_planes(view, foldable, loops, t)
    threads, cache = t.threads or thread_limit(), t.cache or last_level_cache()
    parallel = threads > 1 and (size >= t.parallel_elements if parallel is None else parallel)
    (r0_step, r1_step, k1_step), tiles = _cut(loops, shape, span, t)
    if step == "infer" and loops == "planes":
        r0_step = 1  # in the order of memory, for the processor's prefetcher
    possible = step in ("train", "backward") and _tiles_are_channels(loops, k1_step, span, period, groups)
    if one_pass is None:
        one_pass = not parallel or tiles // groups >= t.tiles_per_thread * threads
    store = BUFFERED if in_place else DIRECT
    if contiguous and size * itemsize * arrays > t.streamed_share * cache:
        store = STREAMED
    grid = Grid(r0_step, r1_step, k1_step, store, span, period)
    return Schedule(loops, shape, grid, possible and one_pass, parallel)


def _rows_or_planes(view: Sizes, foldable: bool, loops: str | None, t: Thresholds) -> tuple[str, Sizes, int, int]:
    """The loops, the shape of their arrays, and how columns belong to statistics: span and period."""
    r0, k0, r1, k1 = view
    if k1 == 1:
        if foldable and loops != "planes" and r1 <= t.short_plane and r0 >= ROW_BLOCK and k0 > 1:
            return "folded", (1, 1, r0, k0 * r1), r1, k0
        if loops != "rows":
            return "planes", view[:3], 1, 1
    elif loops == "planes":
        raise ValueError(f"schedule 'planes' needs K1 = 1; this input's view is [R0, K0, R1, K1] = {list(view)}")
    most = t.folded_columns // max(1, k1)  # explain() may ask about an empty input
    repeats = _divisor(r1, most) if foldable and most > 1 else 1
    return "folded" if repeats > 1 else "rows", (r0, k0, r1 // repeats, k1 * repeats), 1, k1


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is not more than `most` and leaves whole blocks of rows, else 1."""
    return next((d for d in range(min(most, n // ROW_BLOCK), 0, -1) if n % d == 0), 1)


def _cut(loops: str, shape: Sizes, span: int, t: Thresholds) -> tuple[Sizes, int]:
    """The steps of r0, r1 and k1 that cut the view into tasks, and the number of tiles."""
    r0, k0, r1, k1 = extent(loops, shape)
    width = max(1, min(k1, t.tile_columns // max(1, span) * span))  # an empty input has no column
    tiles = max(1, k0 * -(-k1 // width))
    values = max(1, r0 * r1)
    by_row = loops in ("rows", "folded")
    most = max(2, values // t.chunk_rows) if by_row else values
    chunks = max(1, min(values * width // t.chunk_elements, t.max_tasks // tiles, most))
    length = -(-values // chunks)
    if by_row:
        return (1, -(-length // ROW_BLOCK) * ROW_BLOCK, width), tiles
    if length >= r1:
        return (-(-length // r1), r1, width), tiles
    return (1, -(-r1 // -(-r1 // length)), width), tiles


def _tiles_are_channels(loops: str, k1_step: int, span: int, period: int, groups: int) -> bool:
    """Whether each tile has some channels of one group, the same in every group."""
    if loops == "planes":
        return True
    return loops == "folded" and (groups == 1 or period // groups * span % k1_step == 0)
