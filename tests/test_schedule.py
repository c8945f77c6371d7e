"""How a step runs: every element and every statistic belongs to one task, and only shape and strides decide a sum."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from nbbn.engine.cpu import schedule
from nbbn.engine.cpu.schedule import Thresholds
from nbbn.kernels.cpu import columns, elements, planes
from nbbn.kernels.cpu.memory import BLOCK, BUFFERED, DIRECT, STREAMED
from nbbn.runtime import last_level_cache, thread_limit

CACHE = 1 << 20  # bytes of the last level in these tests
USUAL = Thresholds(threads=2, cache=CACHE)
# Several chunks per statistic, several tiles of columns, and all kinds of rows, as large inputs have them.
SMALL = replace(
    USUAL,
    chunk_elements=8,
    chunk_rows=1,
    max_tasks=20,
    tile_columns=16,
    folded_columns=16,
    short_plane=12,
    folded_elements=0,
)
STATISTICS = {
    "planes": planes.statistics,
    "rows": columns.PLAIN.statistics,
    "folded": columns.FOLDED.statistics,
}


def choose(view, step="train", groups=1, itemsize=4, arrays=2, thresholds=USUAL, **choices):
    common = {"contiguous": True, "foldable": True, "in_place": False, "thresholds": thresholds}
    return schedule.choose(step, view, groups, itemsize, arrays, **{**common, **choices})


def choose_small(*arguments, **choices):
    return choose(*arguments, thresholds=SMALL, **choices)


def tasks(chosen):
    """(chunk, tile, bounds) of every task, as steps.py finds them."""
    view = schedule.extent(chosen.loops, chosen.shape)
    chunks, tiles = elements.chunks_and_tiles.py_func(view, chosen.grid)
    for task in range(chunks * tiles):
        chunk, tile = elements.chunk_and_tile.py_func(task, view, chosen.grid)
        yield chunk, tile, elements.bounds_of.py_func(chunk, tile, view, chosen.grid)


def statistics(chosen, bounds):
    """The first statistic that a task covers, and the one after the last."""
    return STATISTICS[chosen.loops].py_func(bounds, chosen.grid)


def statistics_of_columns(chosen):
    """Which statistic each element of the schedule's arrays belongs to, by the rule that elements.py states."""
    grid = chosen.grid
    if chosen.loops == "flat":
        return np.arange(math.prod(chosen.shape)) // grid.span % grid.period
    shape = (*chosen.shape, 1) if chosen.loops == "planes" else chosen.shape
    _, k0, _, k1 = np.indices(shape)
    return k0 * grid.period + k1 // grid.span % grid.period


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
]
EVERY_VIEW = pytest.mark.parametrize("view", VIEWS, ids=str)
FUSED = ["train", "infer", "backward", "frozen_backward"]
STAGES = ["reduce", "apply", "reduce_gradient", "apply_gradient"]
STEPS = [*STAGES, *FUSED]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("loops", [None, "rows"])
@EVERY_VIEW
def test_tasks_cover_everything_exactly_once(view, loops, step):
    """No two tasks share an element; each partial sum (chunk, statistic) belongs to one task, and none is left out."""
    for foldable in (True, False):
        chosen = choose_small(view, step, loops=loops, foldable=foldable)
        r0s, k0s, r1s, k1s = extent = schedule.extent(chosen.loops, chosen.shape)
        chunks, tiles = elements.chunks_and_tiles.py_func(extent, chosen.grid)
        covered, written = np.zeros(extent, int), np.zeros((chunks, view[1] * view[3]), int)
        for chunk, tile, bounds in tasks(chosen):
            assert bounds.chunk == chunk
            assert 0 <= bounds.r0_begin < bounds.r0_end <= r0s
            assert 0 <= bounds.r1_begin < bounds.r1_end <= r1s
            assert 0 <= bounds.k1_begin < bounds.k1_end <= k1s
            assert 0 <= tile < tiles
            assert 0 <= bounds.k0 < k0s
            assert bounds.k1_end - bounds.k1_begin <= BLOCK, "columns of a task lie in arrays of BLOCK elements"
            covered[
                bounds.r0_begin : bounds.r0_end,
                bounds.k0,
                bounds.r1_begin : bounds.r1_end,
                bounds.k1_begin : bounds.k1_end,
            ] += 1
            if chosen.loops != "flat":  # which write no sums
                first, last = statistics(chosen, bounds)
                written[chunk, first:last] += 1
        assert (covered == 1).all()
        assert (written == 1).all() or chosen.loops == "flat"


@EVERY_VIEW
def test_columns_belong_to_the_statistics_of_the_view(view):
    """Of contiguous memory, whatever the loops: element by element."""
    _, k0, _, k1 = np.indices(view)
    expected = (k0 * view[3] + k1).ravel()
    for loops in (None, "rows", "planes") if view[3] == 1 else (None, "rows"):
        for foldable, step in itertools.product((True, False), ("train", "infer")):
            chosen = choose_small(view, step, loops=loops, foldable=foldable)
            assert math.prod(chosen.shape) == math.prod(view)
            np.testing.assert_array_equal(statistics_of_columns(chosen).ravel(), expected)


@EVERY_VIEW
def test_a_task_has_whole_runs_of_the_statistics_that_it_writes(view):
    chosen = choose_small(view)
    shape = (*chosen.shape, 1) if chosen.loops == "planes" else chosen.shape
    owner = statistics_of_columns(chosen)
    assert shape[3] == 1 or chosen.grid.k1_step % chosen.grid.span == 0
    for _, _, bounds in tasks(chosen):
        found = np.unique(owner[:, bounds.k0, :, bounds.k1_begin : bounds.k1_end])
        assert found.tolist() == list(range(*statistics(chosen, bounds)))


def test_the_small_thresholds_reach_all_loops():
    """Or the tests above would test little."""
    assert {choose_small(view).loops for view in VIEWS} == {"planes", "rows", "folded"}
    assert {choose_small(view, "infer").loops for view in VIEWS} == {"flat", "rows", "folded"}
    folded = [chosen for chosen in map(choose_small, VIEWS) if chosen.loops == "folded"]
    assert {c.grid.span > 1 for c in folded} == {False, True}
    assert any(c.shape[3] > c.grid.k1_step for c in folded), "no folded rows are cut into tiles"
    assert any(c.shape[1] > 1 for c in folded), "no folded rows with a k0"
    chunks = {choose_small(view).loops: 0 for view in VIEWS}
    for chosen in map(choose_small, VIEWS):
        chunks[chosen.loops] = max(chunks[chosen.loops], 1 + max(chunk for chunk, _, _ in tasks(chosen)))
    assert min(chunks.values()) >= 3, chunks


# --- one pass -----------------------------------------------------------------------------------

# (view, groups): of virtual batches the groups are the slowest part of K0, or of K1 where K0 is 1.
GROUPED = [
    *((view, 1) for view in VIEWS),
    ((4, 6, 20, 1), 2),
    ((4, 6, 5, 1), 2),
    ((4, 6, 5, 1), 3),
    ((8, 6, 8, 1), 2),
    ((8, 4, 8, 1), 2),
    ((4, 2, 20, 3), 2),
    ((8, 4, 16, 2), 4),
    ((8, 4, 16, 2), 2),
    ((1, 1, 4, 6), 2),
    ((1, 1, 8, 40), 4),
    ((4, 4, 8, 3), 4),
]


@pytest.mark.parametrize("step", ["train", "backward"])
@pytest.mark.parametrize(("view", "groups"), GROUPED, ids=str)
def test_one_pass_has_the_tiles_of_a_channel_in_all_groups_together(view, groups, step):
    """steps.py takes tiles t, t + n, t + 2 n ... together: they must be the same channels of each group."""
    chosen = choose_small(view, step, groups, one_pass=True)
    if not chosen.one_pass:
        return
    total = view[1] * view[3]
    channels = total // groups
    by_tile = {tile: statistics(chosen, bounds) for chunk, tile, bounds in tasks(chosen) if chunk == 0}
    stride, seen = len(by_tile) * channels // total, []
    for tile in range(stride):
        reduced = [s for t in range(tile, len(by_tile), stride) for s in range(*by_tile[t])]
        first, last = by_tile[tile]
        assert 0 <= first < last <= channels, "the first of them has channels of the first group"
        assert sorted(reduced) == sorted(s for c in range(first, last) for s in range(c, total, channels))
        seen += reduced
    assert sorted(seen) == list(range(total))


def test_one_pass_where_it_is_possible():
    one = [choose_small(view, groups=groups, one_pass=True) for view, groups in GROUPED]
    assert {c.loops for c in one if c.one_pass} == {"planes", "folded"}
    assert {groups > 1 for (_, groups), c in zip(GROUPED, one, strict=True) if c.one_pass} == {False, True}
    others = set(STEPS) - {"train", "backward"}
    assert not any(choose_small(view, step, one_pass=True).one_pass for view in VIEWS for step in others)
    assert not any(choose_small(view, one_pass=False).one_pass for view in VIEWS)


def test_one_pass_waits_for_enough_tiles_per_thread():
    most = 2 * USUAL.tiles_per_thread
    for channels in (1, most - 1, most, most + 1):
        view = (64, channels, 3136, 1)
        assert choose(view, parallel=True).one_pass == (channels >= most)
        assert choose(view, parallel=False).one_pass
    assert not choose((64, most, 3136, 1), parallel=True, thresholds=replace(USUAL, threads=4)).one_pass


# --- what decides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("view", "groups"), GROUPED, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_the_order_of_sums_depends_on_shape_and_strides_alone(view, groups, step):
    found, stores = set(), set()
    for threads, cache, in_place in itertools.product([1, 2, 64], [1, 1 << 40], [False, True]):
        thresholds = replace(SMALL, threads=threads, cache=cache)
        for parallel in (None, False, True):
            chosen = choose(view, step, groups, in_place=in_place, parallel=parallel, thresholds=thresholds)
            found.add((chosen.loops, chosen.shape, chosen.grid._replace(store=DIRECT)))
            stores.add(chosen.grid.store)
    assert len(found) == 1
    assert stores == {DIRECT, BUFFERED, STREAMED}, "the machine decides something"


@pytest.mark.parametrize("foldable", [False, True])
@pytest.mark.parametrize(("view", "groups"), GROUPED, ids=str)
def test_a_stage_has_the_tasks_of_the_whole_step(view, groups, foldable):
    """So that its sums are added up in the same order."""
    for whole, stages in {"train": ("reduce", "apply"), "backward": ("reduce_gradient", "apply_gradient")}.items():
        expected = choose_small(view, whole, groups, foldable=foldable, one_pass=False)
        assert {choose_small(view, stage, groups, foldable=foldable) for stage in stages} == {expected}


def test_without_numbers_the_machine_decides():
    """Two arrays of float32 that just fit into its cache, or one element more."""
    for more, store in ((0, DIRECT), (1, STREAMED)):
        chosen = choose((1, 1, last_level_cache() // 8 + more, 1), thresholds=Thresholds(parallel_elements=0))
        assert chosen.grid.store == store
        assert chosen.parallel == (thread_limit() > 1)


@pytest.mark.parametrize(("elements", "parallel"), [(-1, False), (0, True)])
def test_small_inputs_stay_serial(elements, parallel):
    thresholds = replace(USUAL, parallel_elements=24)
    assert choose((1, 24 + elements, 1, 1), thresholds=thresholds).parallel == parallel


def test_one_thread_is_serial():
    view, one = (1, 1, USUAL.parallel_elements, 2), replace(USUAL, threads=1)
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


STORES = [
    ({}, 0, DIRECT),
    ({}, 1, STREAMED),
    ({"in_place": True}, 0, BUFFERED),
    ({"in_place": True}, 1, STREAMED),
    ({"contiguous": False}, 1, DIRECT),
    ({"contiguous": False, "in_place": True}, 1, BUFFERED),
]


@pytest.mark.parametrize(("choices", "more", "store"), STORES, ids=str)
def test_stores(choices, more, store):
    """Two arrays of float32 that just fit into the cache, or one element more; gaps are never streamed over."""
    view = (1, 1, CACHE // 8 + more, 1)
    for step in ("infer", "train"):
        assert choose(view, step, **choices).grid.store == store


def test_arrays_count_for_the_stores():
    view = (1, 1, CACHE // 8, 1)
    assert choose(view, arrays=3).grid.store == STREAMED
    assert choose(view, itemsize=8).grid.store == STREAMED
    assert choose(view, itemsize=2, arrays=4).grid.store == DIRECT


# NCHW with planes of 1 to 256 values, of 257; few channels; many; a prime number of rows; nothing to gain; gaps.
LOOPS = [
    ((64, 256, 49, 1), True, "folded", (1, 1, 64, 256 * 49)),
    ((64, 64, 256, 1), True, "folded", (1, 1, 64, 64 * 256)),
    ((64, 64, 257, 1), True, "planes", (64, 64, 257)),
    ((64, 64, 49, 1), False, "planes", (64, 64, 49)),
    ((3, 64, 200, 1), True, "planes", (3, 64, 200)),
    ((1, 1, 65536, 3), True, "folded", (1, 1, 512, 384)),
    ((1, 1, 65536, 256), True, "folded", (1, 1, 32768, 512)),
    ((1, 1, 65536, 257), True, "rows", (1, 1, 65536, 257)),
    ((1, 1, 65537, 3), True, "rows", (1, 1, 65537, 3)),
    ((1, 1, 65536, 3), False, "rows", (1, 1, 65536, 3)),
    ((8, 4, 4096, 3), True, "folded", (8, 4, 32, 384)),
    ((1, 1, 4, 16384), True, "rows", (1, 1, 4, 16384)),
    ((1, 1, 10922, 3), True, "rows", (1, 1, 10922, 3)),  # an element below folded_elements
]


@pytest.mark.parametrize(("view", "foldable", "loops", "shape"), LOOPS, ids=str)
def test_loops_of_the_usual_thresholds(view, foldable, loops, shape):
    chosen = choose(view, foldable=foldable)
    assert (chosen.loops, chosen.shape) == (loops, shape)


def test_thresholds_that_depend_on_each_other():
    assert USUAL.tile_columns <= BLOCK, "the columns of a task lie in local arrays"
    assert USUAL.folded_columns <= USUAL.tile_columns, "a tile has whole periods"
    assert USUAL.short_plane <= USUAL.tile_columns, "a tile has whole runs"


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


def test_the_tasks_of_a_step_are_limited():
    """One chunk per tile is the least; cutting at the ends of planes may double what is asked for."""
    for view in [*LARGE, *((n, 1, 40_000, 1) for n in range(1, 300))]:
        chosen = choose(view)
        chunks, tiles = elements.chunks_and_tiles.py_func(schedule.extent(chosen.loops, chosen.shape), chosen.grid)
        assert chunks == 1 or chunks * tiles <= 2 * USUAL.max_tasks, f"{chunks} chunks, {tiles} tiles for {view}"


@pytest.mark.parametrize("view", LARGE, ids=str)
def test_chunks_are_worth_a_task(view):
    """A chunk of a large input has at least half of chunk_elements."""
    chosen = choose(view)
    r0, r1, k1 = chosen.grid.r0_step, chosen.grid.r1_step, chosen.grid.k1_step
    assert r0 * r1 * k1 >= min(USUAL.chunk_elements, view[0] * view[2] * k1) / 2


@pytest.mark.parametrize("view", [*VIEWS, *LARGE], ids=str)
def test_rows_are_cut_into_whole_blocks(view):
    chosen = choose(view)
    if chosen.loops != "planes":
        assert chosen.grid.r1_step % schedule.ROW_BLOCK == 0
