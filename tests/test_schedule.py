"""How a step runs: every element and every statistic belongs to one task, and only shape and strides decide a sum."""

import itertools
import math

import numpy as np
import pytest

from nbbn.engine.cpu import schedule
from nbbn.engine.cpu.schedule import READ_AFTER_INFERENCE, Thresholds
from nbbn.kernels.cpu import plain
from nbbn.kernels.cpu import tasks as kernel_tasks
from nbbn.kernels.cpu.lanes import BLOCK, LANES, LINE
from nbbn.kernels.cpu.tasks import bounds_of, chunk_and_tile, chunks_and_tiles, statistics
from nbbn.runtime import last_level_cache, thread_limit

CACHE = 1 << 20  # bytes of the last level in these tests
USUAL = Thresholds(threads=2, cache=CACHE, parallel_elements=1 << 17)
# Several chunks per statistic, several tiles of columns and of channels, and all kinds of rows, as large inputs have
# them. Nothing is streamed unless a test says so.
SMALL = USUAL._replace(
    chunk_elements=8,
    write_elements=8,
    chunk_rows=1,
    max_tasks=20,
    tile_elements=60,
    tile_columns=16,
    repeated_columns=16,
    written_columns=24,
    expanded_rows=1,
    short_plane=12,
    short_batch=0.0,
)


@pytest.fixture(autouse=True)
def _numbers(monkeypatch):
    """What traced functions do with numbers that stand for LLVM's, tests do with Python's."""
    monkeypatch.setattr(kernel_tasks, "minimum", plain.minimum)


def choose(view, step="train", groups=1, slices=1, itemsize=4, arrays=2, thresholds=USUAL, **choices):
    common = {"contiguous": True, "foldable": True, "thresholds": thresholds}
    return schedule.choose(step, view, slices, groups, itemsize, arrays, **{**common, **choices})


def choose_small(*arguments, **choices):
    return choose(*arguments, thresholds=SMALL, **choices)


def extent(chosen):
    """R0, K0, R1, K1 of the schedule's arrays."""
    return (*chosen.shape, 1)[:4]


def tasks(chosen):
    """(chunk, tile, bounds) of every task, as steps.py finds them."""
    view = extent(chosen)
    for task in range(chosen.grid.chunks * chosen.grid.tiles):
        chunk, tile = chunk_and_tile(task, view, chosen.grid)
        yield chunk, tile, bounds_of(chunk, tile, view, chosen.grid)


def statistics_of_columns(chosen):
    """Which statistic each element of the schedule's arrays belongs to, by the rule that tasks.py states."""
    grid = chosen.grid
    r0, k0, _, k1 = np.indices(extent(chosen))
    return (r0 // grid.depth * grid.k0 + k0) * grid.period + k1 // grid.span * grid.inner + k1 % grid.inner


VIEWS = [
    (1, 1, 1, 1),
    (1, 1, 100, 3),
    (7, 3, 11, 1),
    (30, 2, 1, 1),
    (5, 2, 3, 9),
    (5, 2, 24, 3),
    (1, 1, 2, 17),
    (1, 1, 64, 5),
    (3, 1, 50, 5),
    (1, 4, 1, 7),
    (8, 5, 4, 1),
    (9, 40, 3, 1),
    (4, 3, 12, 1),
    (4, 3, 13, 1),
    (16, 1, 8, 1),
    (2, 7, 3, 4),
    (1, 7, 3, 4),
    (1, 7, 6, 4),
    (3, 5, 4, 2),
    (2, 7, 10, 1),
]
# And how many slices R0 has: planes and rows, and some that are columns of rows.
SLICED = [
    ((6, 3, 20, 1), 3),
    ((6, 3, 20, 1), 2),
    ((40, 2, 13, 1), 2),
    ((12, 5, 3, 1), 3),
    ((8, 4, 1, 1), 2),
    ((6, 2, 3, 9), 2),
    ((12, 5, 2, 3), 3),
    ((6, 4, 24, 3), 3),
    ((4, 1, 40, 5), 2),
    ((2, 3, 1, 50), 2),
]
EVERY_VIEW = pytest.mark.parametrize(("view", "slices"), [*((view, 1) for view in VIEWS), *SLICED], ids=str)
FUSED = ["train", "infer", "backward", "frozen_backward"]
STAGES = ["reduce", "apply", "reduce_gradient", "apply_gradient"]
STEPS = [*STAGES, *FUSED]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("loops", [None, "rows"])
@EVERY_VIEW
def test_tasks_cover_everything_exactly_once(view, slices, loops, step):
    """No two tasks share an element; each partial sum (chunk, statistic) belongs to one task, and none is left out."""
    for foldable, parallel in itertools.product((True, False), repeat=2):
        chosen = choose_small(view, step, slices=slices, loops=loops, foldable=foldable, parallel=parallel)
        r0s, k0s, r1s, k1s = sizes = extent(chosen)
        grid = chosen.grid
        assert (grid.chunks, grid.tiles) == chunks_and_tiles((grid.depth, r0s // grid.depth * k0s, r1s, k1s), grid)
        covered, written = np.zeros(sizes, int), np.zeros((grid.chunks, slices * view[1] * view[3]), int)
        for chunk, tile, bounds in tasks(chosen):
            assert bounds.chunk == chunk
            assert 0 <= bounds.r0 < bounds.r0_end <= r0s
            assert 0 <= bounds.k0 < bounds.k0_end <= k0s
            assert 0 <= bounds.r1 < bounds.r1_end <= r1s
            assert 0 <= bounds.k1 < bounds.k1_end <= k1s
            assert 0 <= tile < grid.tiles
            covered[
                bounds.r0 : bounds.r0_end,
                bounds.k0 : bounds.k0_end,
                bounds.r1 : bounds.r1_end,
                bounds.k1 : bounds.k1_end,
            ] += 1
            first, last = statistics(bounds, grid)
            written[chunk, first:last] += 1
        assert (covered == 1).all()
        assert (written == 1).all()


LARGE_TILES = SMALL._replace(tile_columns=4 * BLOCK, repeated_columns=BLOCK, written_columns=BLOCK)


@pytest.mark.parametrize("loops", [None, "rows"])
@EVERY_VIEW
def test_sums_of_columns_have_room(view, slices, loops):
    """What there is of columns that are not statistics is in arrays of BLOCK elements, and each row is a whole one."""
    for thresholds in (SMALL, LARGE_TILES, USUAL):
        chosen = choose(view, slices=slices, loops=loops, thresholds=thresholds)
        grid = chosen.grid
        for rows in (grid.repeats, grid.written):
            if grid.span * rows > 1:
                assert grid.k1_step * rows <= BLOCK
            if rows > 1:
                assert grid.k1_step == extent(chosen)[3], "a part of a row is followed by another row's"


@EVERY_VIEW
def test_columns_belong_to_the_statistics_of_the_view(view, slices):
    """Of contiguous memory, whatever the loops: element by element."""
    r0, k0, _, k1 = np.indices(view)
    expected = ((r0 // (view[0] // slices) * view[1] + k0) * view[3] + k1).ravel()
    for loops in (None, "rows", "planes") if view[3] == 1 else (None, "rows"):
        for foldable, step in itertools.product((True, False), ("train", "infer")):
            chosen = choose_small(view, step, slices=slices, loops=loops, foldable=foldable)
            assert math.prod(chosen.shape) == math.prod(view)
            np.testing.assert_array_equal(statistics_of_columns(chosen).ravel(), expected)


@EVERY_VIEW
def test_a_task_has_whole_runs_of_the_statistics_that_it_writes(view, slices):
    chosen = choose_small(view, slices=slices)
    owner = statistics_of_columns(chosen)
    assert chosen.grid.k1_step % chosen.grid.span == 0
    for _, _, bounds in tasks(chosen):
        r0, k0, k1 = (slice(*ends) for ends in ((bounds.r0, bounds.r0_end), bounds[3:5], bounds[7:9]))
        found = np.unique(owner[r0, k0, :, k1])
        assert found.tolist() == list(range(*statistics(bounds, chosen.grid)))


def test_the_small_thresholds_reach_all_loops():
    """Or the tests above would test little."""
    chosen = [choose_small(view) for view in VIEWS]
    for loops in ("planes", "rows"):
        those = [(extent(c), c.grid) for c in chosen if c.loops == loops]
        assert max(grid.chunks for _, grid in those) >= 3, loops
        tiles = [grid for _, grid in those if 1 < grid.shares < grid.group and grid.group % grid.shares]
        assert tiles, f"no {loops} with tiles of two sizes"
    rows = [(extent(c), c.grid) for c in chosen if c.loops == "rows"]
    assert any(k1 % grid.k1_step for (_, _, _, k1), grid in rows if grid.span == 1), "no part of a tile of columns"
    spans = [(k1, grid) for (_, _, _, k1), grid in rows if grid.span > grid.inner]
    assert any(k1 % grid.k1_step for k1, grid in spans if grid.inner == 1), "no part of one of short planes"
    assert any(k1 % grid.k1_step for k1, grid in spans if grid.inner > 1), "no part of one of short blocks"
    assert any(r1 % grid.repeats for (_, _, r1, _), grid in rows if grid.repeats > 1), "no part of a long row"
    assert any(k0 > 1 for (_, k0, _, _), grid in rows if grid.repeats > 1), "no long rows with a k0"
    assert any(grid.r1_step % grid.written for _, grid in rows if grid.repeats != grid.written), "no others are written"


# --- one pass -----------------------------------------------------------------------------------

# (view, groups, slices): of virtual batches the groups are the slowest part of K0, or of K1 where K0 is 1; or slices.
GROUPED = [
    *((view, 1, 1) for view in VIEWS),
    ((4, 6, 20, 1), 2, 1),
    ((4, 6, 5, 1), 2, 1),
    ((4, 6, 5, 1), 3, 1),
    ((8, 6, 8, 1), 2, 1),
    ((8, 4, 8, 1), 2, 1),
    ((4, 2, 20, 3), 2, 1),
    ((8, 4, 16, 2), 4, 1),
    ((8, 4, 16, 2), 2, 1),
    ((1, 1, 4, 6), 2, 1),
    ((1, 1, 8, 40), 4, 1),
    ((4, 4, 8, 3), 4, 1),
    ((1, 1, 4, 48), 3, 1),
    ((3, 10, 5, 1), 2, 1),
    ((1, 9, 5, 3), 3, 1),
    *((view, slices, slices) for view, slices in SLICED),
    *((view, 1, slices) for view, slices in SLICED),
    ((12, 3, 20, 1), 2, 4),
]


@pytest.mark.parametrize("step", ["train", "backward"])
@pytest.mark.parametrize(("view", "groups", "slices"), GROUPED, ids=str)
def test_one_pass_has_the_tiles_of_a_channel_in_all_groups_together(view, groups, slices, step):
    """steps.py takes tiles t, t + n, t + 2 n ... of n families together: they must be the same channels of each
    group."""
    chosen = choose_small(view, step, groups, slices, one_pass=True)
    if not chosen.one_pass:
        return
    total = slices * view[1] * view[3]
    channels = total // groups
    by_tile = {tile: statistics(bounds, chosen.grid) for chunk, tile, bounds in tasks(chosen) if chunk == 0}
    families, seen = chosen.grid.families, []
    for tile in range(families):
        reduced = [s for t in range(tile, len(by_tile), families) for s in range(*by_tile[t])]
        first, last = by_tile[tile]
        assert 0 <= first < last <= channels, "the first of them has channels of the first group"
        assert sorted(reduced) == sorted(s for c in range(first, last) for s in range(c, total, channels))
        seen += reduced
    assert sorted(seen) == list(range(total))


def test_one_pass_where_it_is_possible():
    """Everywhere, but not where a tile of columns has channels of several groups."""
    for view, groups, slices in GROUPED:
        chosen = choose_small(view, groups=groups, slices=slices, one_pass=True)
        covered = [statistics(bounds, chosen.grid) for _, _, bounds in tasks(chosen)]
        channels = slices * view[1] * view[3] // groups
        assert chosen.one_pass == all(first // channels == (last - 1) // channels for first, last in covered)
    found = [choose_small(view, groups=groups, slices=slices, one_pass=True) for view, groups, slices in GROUPED]
    once = [(c.loops, c.grid.families < c.grid.tiles) for c in found if c.one_pass]
    assert set(once) == set(itertools.product(("planes", "rows"), (False, True)))
    assert any(c.grid.tiles > c.grid.families > 1 and c.grid.group % c.grid.shares for c in found if c.one_pass)
    assert not all(c.one_pass for c in found)
    others = set(STEPS) - {"train", "backward"}
    assert not any(choose_small(view, step, one_pass=True).one_pass for view in VIEWS for step in others)
    assert not any(choose_small(view, one_pass=False).one_pass for view in VIEWS)


@pytest.mark.parametrize("tiles_per_thread", [1, 3])
def test_one_pass_waits_for_enough_tiles_per_thread(tiles_per_thread):
    thresholds = USUAL._replace(tile_elements=1, tiles_per_thread=tiles_per_thread)
    most = 2 * tiles_per_thread
    for channels in (1, most - 1, most, most + 1):
        view = (64, channels, 3136, 1)
        enough = channels >= most or channels % 2 == 0  # or as many for each thread
        assert choose(view, parallel=True, thresholds=thresholds).one_pass == enough
        assert choose(view, parallel=False, thresholds=thresholds).one_pass
    more = thresholds._replace(threads=most + 1)
    assert not choose((64, most, 3136, 1), parallel=True, thresholds=more).one_pass


@pytest.mark.parametrize(("view", "loops"), [((2, 40, 30, 1), "planes"), ((1, 40, 20, 3), "rows")])
def test_a_tile_has_so_many_elements_and_leaves_some_to_other_threads(view, loops):
    """But at least one channel; no tile has two more than another."""
    for elements, threads, expected in ((600, 1, 4), (600, 2, 4), (1 << 30, 1, 1), (1 << 30, 3, 3), (1, 2, 40)):
        chosen = choose(view, parallel=True, thresholds=USUAL._replace(tile_elements=elements, threads=threads))
        assert (chosen.loops, chosen.grid.tiles) == (loops, expected)
        channels = [bounds.k0_end - bounds.k0 for _, _, bounds in tasks(chosen)]
        assert sum(channels) == 40
        assert max(channels) - min(channels) <= 1


# --- what decides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("view", "groups", "slices"), GROUPED, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_the_order_of_sums_depends_on_shape_and_strides_alone(view, groups, slices, step):
    """How many channels, or columns, a task has depends on the machine, but no sum on that."""
    found, stores = set(), set()
    for threads, cache in itertools.product([1, 2, 64], [1, 1 << 40]):
        thresholds = SMALL._replace(threads=threads, cache=cache, streamed_run=0)
        for parallel in (None, False, True):
            chosen = choose(view, step, groups, slices, parallel=parallel, thresholds=thresholds)
            same = dict.fromkeys(("shares", "k1_step", "tiles", "families", "streamed", "written"), 0)
            found.add((chosen.loops, chosen.shape, chosen.grid._replace(**same)))
            stores.add(chosen.grid.streamed)
    assert len(found) == 1
    # Rows that are not whole lines are never streamed.
    assert stores == {0, 1} or chosen.loops == "rows", "the machine decides something"


@pytest.mark.parametrize("foldable", [False, True])
@pytest.mark.parametrize(("view", "groups", "slices"), GROUPED, ids=str)
def test_a_stage_has_the_tasks_of_the_whole_step(view, groups, slices, foldable):
    """So that its sums are added up in the same order."""
    for whole, stages in {"train": ("reduce", "apply"), "backward": ("reduce_gradient", "apply_gradient")}.items():
        expected = choose_small(view, whole, groups, slices, foldable=foldable, one_pass=False)
        assert {choose_small(view, stage, groups, slices, foldable=foldable) for stage in stages} == {expected}


def test_without_numbers_the_machine_decides():
    """Two arrays of float32 that just fit into its cache, or one element more."""
    for more in (0, 1):
        thresholds = Thresholds(parallel_elements=0, streamed_share=1.0, streamed_run=0)
        chosen = choose((1, 1, last_level_cache() // 8 + more, 1), thresholds=thresholds)
        assert chosen.grid.streamed == more
        assert chosen.parallel == (thread_limit() > 1)


@pytest.mark.parametrize(("more", "parallel"), [(-1, False), (0, True)])
def test_small_inputs_stay_serial(more, parallel):
    """The more work an element is, the less of them; two regions need twice as many."""
    thresholds = USUAL._replace(parallel_elements=48, write_elements=1)
    for step, least in {"infer": 48, "reduce": 24, "train": 16, "backward": 12, "frozen_backward": 24}.items():
        assert choose((1, least + more, 1, 1), step, thresholds=thresholds).parallel == parallel
    rows = thresholds._replace(chunk_elements=1, chunk_rows=1, repeated_columns=1)
    for step, least in {"reduce": 24, "train": 32, "backward": 24}.items():
        found = choose((1, 1, least // 2 + more, 2), step, thresholds=rows)
        assert (found.parallel, found.one_pass) == (parallel, not parallel and step != "reduce")


def test_one_task_is_serial():
    view = (1, 1, USUAL.chunk_rows, schedule.NARROWEST)
    assert not choose(view, thresholds=USUAL._replace(parallel_elements=0)).parallel


@pytest.mark.parametrize(("view", "groups"), [((1, 1, 81, 13390), 1), ((1, 1, 81, 13390), 103), ((1, 1, 2, 9000), 1)])
@pytest.mark.parametrize("step", ["train", "backward"])
def test_columns_are_shared_where_rows_are_few(view, groups, step):
    """And they are so wide that the values of a statistic are one chunk."""
    for threads in (2, 4):
        chosen = choose(view, step, groups, thresholds=USUAL._replace(parallel_elements=0, threads=threads))
        assert chosen.parallel
        assert chosen.grid.tiles >= threads
        assert chosen.grid.k1_step >= schedule.NARROWEST


@pytest.mark.parametrize("layer", schedule.PARALLEL)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_the_threading_layer_decides_what_is_small(monkeypatch, layer, itemsize):
    """Of float64, half as many elements are as much work."""
    monkeypatch.setattr(schedule, "likely_layer", lambda: layer)
    least, thresholds = schedule.PARALLEL[layer], USUAL._replace(parallel_elements=None)
    least //= 2 if itemsize == 8 else 1
    for elements, parallel in ((least - 1, False), (least, True)):
        assert choose((1, elements, 1, 1), "infer", itemsize=itemsize, thresholds=thresholds).parallel == parallel


def test_one_thread_is_serial():
    view, one = (1, 1, USUAL.parallel_elements, 2), USUAL._replace(threads=1)
    assert choose(view).parallel
    assert not choose(view, thresholds=one).parallel
    assert not choose(view, parallel=True, thresholds=one).parallel


@pytest.mark.parametrize("loops", ["planes", "rows"])
@pytest.mark.parametrize("parallel", [False, True])
def test_choices_made_by_hand(loops, parallel):
    chosen = choose((8, 3, 20, 1), loops=loops, parallel=parallel)
    assert (chosen.loops, chosen.parallel) == (loops, parallel)


def test_planes_by_hand_where_there_are_none():
    with pytest.raises(ValueError, match=r"'planes' needs K1 = 1.*\[1, 1, 8, 3\]"):
        choose((1, 1, 8, 3), loops="planes")


FITS = USUAL._replace(streamed_share=1.0, streamed_run=0)


@pytest.mark.parametrize("step", ["infer", "train", "backward"])
def test_what_does_not_fit_into_the_cache_is_streamed(step):
    """Two arrays of float32 that just fit, or one element more; gaps are never streamed over."""
    share = READ_AFTER_INFERENCE if step == "infer" else 1
    for more, contiguous in itertools.product((0, 1), (False, True)):
        view = (1, 1, round(share * CACHE) // 8 + more, 1)
        assert choose(view, step, contiguous=contiguous, thresholds=FITS).grid.streamed == (more and contiguous)


def test_all_arrays_are_to_fit():
    view = (1, 1, CACHE // 8, 1)
    assert choose(view, arrays=3, thresholds=FITS).grid.streamed
    assert choose(view, itemsize=8, thresholds=FITS).grid.streamed
    assert not choose(view, itemsize=2, arrays=4, thresholds=FITS).grid.streamed
    for share, streamed in ((0.5, 1), (1.5, 0)):
        thresholds = FITS._replace(streamed_share=share)
        assert choose((1, 1, CACHE // 8 + 1, 1), thresholds=thresholds).grid.streamed == streamed


# The bytes of a run of float32: of a plane, of a tile of columns, of rows taken as one.
RUNS = [
    ((64, 1, 100, 1), {}, 400),
    ((64, 1, 16, 1), {}, LINE),
    ((1, 1, 64, 300), {"tile_columns": 100, "written_columns": 0}, 400),
    ((1, 1, 64, 300), {"tile_columns": 112, "written_columns": 0}, 7 * LINE),
    ((1, 1, 640, 3), {"written_columns": 30}, 120),
    ((1, 1, 640, 3), {"written_columns": 60}, 3 * LINE),
    ((1, 1, 640, 4), {"written_columns": 16}, LINE),
]


@pytest.mark.parametrize(("view", "thresholds", "run"), RUNS, ids=str)
def test_streamed_runs_are_whole_lines_or_long(view, thresholds, run):
    for least in (run, run + 1):
        found = choose(view, thresholds=USUAL._replace(streamed_share=0.0, streamed_run=least, **thresholds))
        assert found.grid.streamed == ((least == run and found.loops == "planes") or run % LINE == 0)


# Short planes, and those of an element more; gaps, or weights; few samples, or for such a plane; few channels; rows
# that fit twice, or once; many channels; a prime number of rows; rows of each r0; few rows, which are blocks, and for
# few samples; few rows. And how many columns belong together, to how many statistics, and how many rows are taken as
# one.
LOOPS = [
    ((64, 256, 16, 1), True, "rows", (1, 1, 64, 256 * 16), 16, 1, 1),
    ((64, 256, 17, 1), True, "planes", (64, 256, 17), 1, 1, 1),
    ((64, 256, 16, 1), False, "planes", (64, 256, 16), 1, 1, 1),
    ((3, 256, 16, 1), True, "planes", (3, 256, 16), 1, 1, 1),
    ((9, 256, 16, 1), True, "planes", (9, 256, 16), 1, 1, 1),
    ((10, 256, 16, 1), True, "rows", (1, 1, 10, 256 * 16), 16, 1, 1),
    ((64, 1, 16, 1), True, "planes", (64, 1, 16), 1, 1, 1),
    ((1, 1, 65536, 3), True, "rows", (1, 1, 65536, 3), 3, 3, 33),
    ((1, 1, 65536, 50), True, "rows", (1, 1, 65536, 50), 50, 50, 2),
    ((1, 1, 65536, 51), True, "rows", (1, 1, 65536, 51), 1, 1, 1),
    ((1, 1, 65536, 3), False, "rows", (1, 1, 65536, 3), 1, 1, 1),
    ((1, 1, 65537, 3), True, "rows", (1, 1, 65537, 3), 3, 3, 33),
    ((8, 4, 4096, 3), True, "rows", (8, 4, 4096, 3), 3, 3, 33),
    ((8, 4, 12, 3), True, "rows", (1, 1, 8, 4 * 36), 36, 3, 1),
    ((1, 4, 12, 3), True, "rows", (1, 4, 12, 3), 3, 3, 12),
    ((8, 4, 12, 3), False, "rows", (8, 4, 12, 3), 1, 1, 1),
    ((1, 1, 4, 16384), True, "rows", (1, 1, 4, 16384), 1, 1, 1),
]


@pytest.mark.parametrize(("view", "foldable", "loops", "shape", "span", "inner", "repeats"), LOOPS, ids=str)
def test_loops(view, foldable, loops, shape, span, inner, repeats):
    thresholds = USUAL._replace(short_plane=16, repeated_columns=100, written_columns=0, expanded_rows=1)
    chosen = choose(view, foldable=foldable, thresholds=thresholds)
    grid = chosen.grid
    assert (chosen.loops, chosen.shape, grid.span, grid.inner) == (loops, shape, span, inner)
    assert (grid.repeats, grid.written) == (repeats, 1)


@pytest.mark.parametrize("least", [1, 5])
def test_as_many_long_rows_as_repay_them(least):
    """Or make a vector; and all of them alike: where sums are made, and where the results of a task are written."""
    thresholds = SMALL._replace(repeated_columns=40, written_columns=60, expanded_rows=least, short_block=0)

    def expected(most, rows, samples):
        long = max(1, min(most, max(samples * rows // least, LANES // 2)))
        return -(-rows // -(-rows // long))

    for rows in (4, 9, 20, 21, 60):
        grid = choose((3, 2, rows, 2), thresholds=thresholds).grid
        assert grid.repeats == expected(20, rows, 3)
        assert grid.written == expected(30, grid.r1_step, grid.r0_step)


def test_thresholds_that_depend_on_each_other():
    for columns in (USUAL.repeated_columns, USUAL.written_columns):
        assert columns <= BLOCK, "what there is of columns lies in local arrays"
        assert columns <= USUAL.tile_columns, "a tile has whole rows where several are one"
    assert USUAL.short_plane <= min(BLOCK, USUAL.tile_columns), "a tile has whole runs"
    assert 2 * USUAL.write_elements <= USUAL.chunk_elements, "a part of a plane is a task of its own"


LARGE = [
    (1, 1, 10**7, 3),
    (64, 3, 10**5, 1),
    (63, 1, 40_000, 1),
    (127, 2, 30_000, 1),
    (10**6, 2, 3, 1),
    (256, 512, 49, 1),
    (9, 1, 9, 10**6),
    (1, 1, 2**20, 64),
]


@pytest.mark.parametrize("view", [(7, 3, 11, 1), (30, 2, 1, 1), (2, 7, 10, 1), (1, 3, 100, 1), (5, 1, 8, 1)], ids=str)
def test_a_task_of_inference_is_one_piece_of_memory(view):
    """Of planes, as there are no sums to be made."""
    chosen = choose_small(view, "infer", foldable=False)
    assert chosen.loops == "planes"
    places = np.arange(math.prod(view)).reshape(view[:3])
    for _, _, bounds in tasks(chosen):
        piece = places[bounds.r0 : bounds.r0_end, bounds.k0 : bounds.k0_end, bounds.r1 : bounds.r1_end]
        assert piece.max() - piece.min() == piece.size - 1


def test_the_tasks_of_a_step_are_limited():
    """One chunk per tile is the least; cutting at the ends of planes may double what is asked for."""
    for view in [*LARGE, *((n, 1, 40_000, 1) for n in range(1, 300))]:
        grid = choose(view).grid
        assert grid.chunks == 1 or grid.chunks * grid.tiles <= 2 * USUAL.max_tasks, view


@pytest.mark.parametrize("view", LARGE, ids=str)
def test_chunks_are_worth_a_task(view):
    """A chunk of a large input has at least half of chunk_elements."""
    grid = choose(view).grid
    elements = grid.r0_step * grid.r1_step * grid.k1_step
    assert elements >= min(USUAL.chunk_elements, view[0] * view[2] * grid.k1_step) / 2


@pytest.mark.parametrize("view", LARGE, ids=str)
def test_large_inputs_are_many_tasks(view):
    """As many as a machine has cores, of chunks, of tiles, or of both."""
    grid = choose(view, thresholds=USUAL._replace(threads=8)).grid
    assert grid.chunks * grid.tiles >= 8


@pytest.mark.parametrize("view", [*VIEWS, *LARGE], ids=str)
def test_parts_of_a_row_sequence_are_whole_blocks(view):
    """Four rows, or four times so many as are taken as one, at a time; or all there are."""
    for chosen in (choose(view), choose_small(view)):
        grid = chosen.grid
        if chosen.loops == "rows" and grid.r1_step < chosen.shape[2]:
            assert grid.r0_step == 1
            assert grid.r1_step % (schedule.ROW_BLOCK * grid.repeats) == 0
