"""The canonical view: every statistic finds its values, whatever the axes and the order in memory."""

import itertools
import math

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from nbbn.core import layout

SHAPES = [(6,), (4, 3), (4, 3, 2), (4, 3, 2, 5), (4, 3, 2, 5, 2)]
# Sizes of 1 must not change which view exists, wherever they are.
SHAPES_WITH_ONES = [(1,), (4, 1), (1, 3), (4, 1, 3), (1, 1, 1), (4, 3, 1, 1), (2, 1, 3, 1, 2)]


def axis_combinations(rank):
    """All sets of kept axes; none and all of them are legal too."""
    return itertools.chain.from_iterable(itertools.combinations(range(rank), n) for n in range(rank + 1))


def in_memory_order(values, order):
    """The same array, with dimension order[0] the slowest in memory."""
    return np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))


def cases(shapes):
    """(shape, axis, virtual_batch_size)"""
    for shape in shapes:
        for axis in axis_combinations(len(shape)):
            yield shape, axis, None
            if 0 not in axis and shape[0] % 2 == 0:
                yield shape, axis, 2


def statistics_of(values, lay):
    """The sorted values of each statistic, (groups * channels, count), straight from the definition."""
    split = values.reshape(lay.sizes)
    reduced = [i for i, kept in enumerate(lay.kept) if not kept]
    return np.sort(np.moveaxis(split, reduced, range(-len(reduced), 0)).reshape(lay.groups * lay.channels, -1))


def statistics_of_view(array, view):
    """The same, from [slices * R0, K0, R1, K1]."""
    (r0, k0, r1, k1), (strides,), slices = view
    found = as_strided(array, (r0, k0, r1, k1), strides).reshape(slices, r0 // slices, k0, r1, k1)
    return np.sort(found.transpose(0, 2, 4, 1, 3).reshape(slices * k0 * k1, -1))


def has_view(kinds_and_axes):
    """Whether dimensions in this memory order fit slices, reduced, kept, reduced, kept; the kept ones ascend."""
    kept = [axis for kind, axis in kinds_and_axes if kind]
    runs = [kind for kind, _ in itertools.groupby(kind for kind, _ in kinds_and_axes)]
    slots = iter((True, False, True, False, True))
    return kept == sorted(kept) and all(kind in slots for kind in runs)


# --- axis and Layout ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "rank", "expected"),
    [([-1], 4, (3,)), ([1], 4, (1,)), ([3, 1], 4, (1, 3)), ([-1, 0], 2, (0, 1)), ([-4], 4, (0,)), ([], 3, ())],
)
def test_resolve_axis(axis, rank, expected):
    assert layout.resolve_axis(axis, rank) == expected


@pytest.mark.parametrize(("axis", "rank"), [([2], 2), ([-3], 2), ([0, 5], 4), ([0], 0)])
def test_resolve_axis_out_of_range(axis, rank):
    with pytest.raises(ValueError, match=rf"axis .* rank {rank}.* received {axis[-1]}"):
        layout.resolve_axis(axis, rank)


@pytest.mark.parametrize("axis", [[1, 1], [1, -1], [-2, 0]])
def test_resolve_axis_twice(axis):
    with pytest.raises(ValueError, match=r"axis .* twice.*rank 2"):
        layout.resolve_axis(axis, 2)


def test_layout_counts():
    for shape, axis, virtual in cases(SHAPES + SHAPES_WITH_ONES):
        lay = layout.layout(shape, axis, virtual)
        channels = math.prod(shape[a] for a in axis)
        groups = 1 if virtual is None else shape[0] // virtual
        assert (lay.groups, lay.channels) == (groups, channels)
        assert math.prod(lay.sizes) == math.prod(shape)


def test_virtual_batches_are_interleaved():
    """Sample n belongs to group n mod G."""
    lay = layout.layout((6, 1), (1,), 2)
    assert statistics_of(np.arange(6), lay).tolist() == [[0, 3], [1, 4], [2, 5]]


# --- the canonical view -----------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES + SHAPES_WITH_ONES, ids=str)
def test_view_in_every_memory_order(shape):
    """A view exists exactly where one can, and each of its statistics has the values of the definition."""
    values = np.arange(math.prod(shape)).reshape(shape)
    for _, axis, virtual in cases([shape]):
        lay = layout.layout(shape, axis, virtual)
        expected = statistics_of(values, lay)
        for order in itertools.permutations(range(len(shape))):
            array = in_memory_order(values, order)
            strides = lay.split(array.strides)
            found = layout.collapse(lay.sizes, lay.kept, [strides])
            dims = sorted((i for i, s in enumerate(lay.sizes) if s != 1), key=lambda i: -strides[i])
            assert (found is not None) == has_view([(lay.kept[i], i) for i in dims]), (axis, virtual, order)
            if found is not None:
                np.testing.assert_array_equal(statistics_of_view(array, found), expected)


@pytest.mark.parametrize("shape", SHAPES + SHAPES_WITH_ONES, ids=str)
def test_copy_has_a_view(shape):
    """copy_order() gives an order in which a contiguous copy has a view, and changes nothing where none is needed."""
    values = np.arange(math.prod(shape)).reshape(shape)
    for _, axis, virtual in cases([shape]):
        lay = layout.layout(shape, axis, virtual)
        order = layout.copy_order(lay.sizes, lay.kept)
        copy = np.ascontiguousarray(values.reshape(lay.sizes).transpose(order))
        sizes, kept = copy.shape, tuple(lay.kept[i] for i in order)
        view = layout.collapse(sizes, kept, [layout.contiguous_strides(sizes, copy.itemsize)])
        np.testing.assert_array_equal(statistics_of_view(copy, view), statistics_of(values, lay))
        if layout.collapse(lay.sizes, lay.kept, [layout.contiguous_strides(lay.sizes)]) is not None:
            assert order == tuple(range(len(lay.sizes)))


# NHWC, NCHW, dense, several axes; with sizes of 1 dropped and neighbours merged.
CANONICAL = [
    ((8, 5, 4, 3), (3,), None, (1, 1, 160, 3)),
    ((8, 3, 5, 4), (1,), None, (8, 3, 20, 1)),
    ((8, 3), (1,), None, (1, 1, 8, 3)),
    ((8, 3), (0,), None, (1, 8, 3, 1)),
    ((8, 3, 5, 4), (1, 3), None, (8, 3, 5, 4)),
    ((8, 3, 5, 4), (2, 3), None, (1, 1, 24, 20)),
    ((8, 3, 5, 4), (0, 1, 2, 3), None, (1, 1, 1, 480)),
    ((8, 3, 5, 4), (), None, (1, 1, 480, 1)),
    ((8, 1, 5, 4), (3,), None, (1, 1, 40, 4)),
    ((8, 3, 1, 1), (1,), None, (1, 1, 8, 3)),
    ((1, 3, 5, 4), (1,), None, (1, 3, 20, 1)),
    ((8, 3, 5, 4), (1,), 4, (4, 6, 20, 1)),
    ((8, 3), (1,), 4, (1, 1, 4, 6)),
    ((8, 5, 4, 3), (3,), 4, (4, 2, 20, 3)),
    ((1, 1, 1), (2,), None, (1, 1, 1, 1)),
    ((8, 3, 5, 4), (0, 2), None, (24, 5, 4, 1)),  # eight slices
]


@pytest.mark.parametrize(("shape", "axis", "virtual", "expected"), CANONICAL)
def test_canonical_shapes(shape, axis, virtual, expected):
    lay = layout.layout(shape, axis, virtual)
    strides = lay.split(layout.contiguous_strides(shape))
    view, _, _ = layout.collapse(lay.sizes, lay.kept, [strides])
    assert view == expected


@pytest.mark.parametrize("shape", [(8, 3, 5, 4), (8, 3, 5, 4, 2)])
def test_channels_last_memory_of_a_channels_first_array_is_read_as_it_lies(shape):
    """An NCHW array whose memory is NHWC is all rows: no copy, and no strides between its values."""
    lay = layout.layout(shape, (1,))
    array = np.moveaxis(np.zeros((shape[0], *shape[2:], shape[1])), -1, 1)
    view, (strides,), _ = layout.collapse(lay.sizes, lay.kept, [array.strides])
    assert view == (1, 1, math.prod(shape) // 3, 3)
    assert strides[2:] == (24, 8)


def test_five_alternating_runs_need_a_copy():
    lay = layout.layout((2, 3, 4, 5, 6), (1, 3))
    strides = layout.contiguous_strides(lay.sizes)
    assert layout.collapse(lay.sizes, lay.kept, [strides]) is None
    assert layout.copy_order(lay.sizes, lay.kept) == (0, 2, 1, 3, 4)
    lay = layout.layout((2, 3, 4, 5, 6, 7, 8), (1, 3, 5))  # whatever stays behind is not moved
    assert layout.copy_order(lay.sizes, lay.kept) == (0, 2, 4, 1, 3, 5, 6)


def test_kept_dimensions_out_of_order_need_a_copy():
    """Parameters are in the order of the axes: memory that has the later one first cannot be viewed."""
    lay = layout.layout((2, 3, 4), (1, 2))
    array = in_memory_order(np.arange(24).reshape(2, 3, 4), (0, 2, 1))
    assert layout.collapse(lay.sizes, lay.kept, [array.strides]) is None


FORMS = {
    "contiguous": lambda x: np.ascontiguousarray(x),
    "Fortran": lambda x: np.asfortranarray(x),
    "channels last": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1),
    "reversed": lambda x: np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
    "every second": lambda x: np.repeat(np.repeat(x, 2, 0), 2, -1)[::2, ..., ::2],
}


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (4, 3, 2, 5)], ids=str)
def test_arrays_of_one_call_share_a_view(shape):
    """Whatever the memory of each, index (r0, k0, r1, k1) of every view is the same element of the input."""
    values = np.arange(math.prod(shape)).reshape(shape)
    for _, axis, virtual in cases([shape]):
        lay = layout.layout(shape, axis, virtual)
        for forms in itertools.product(FORMS.values(), repeat=2):
            first, second = (form(values) for form in forms)
            found = layout.collapse(lay.sizes, lay.kept, [lay.split(a.strides) for a in (first, second)])
            if found is not None:
                view, (one, two), slices = found
                np.testing.assert_array_equal(as_strided(first, view, one), as_strided(second, view, two))
                of_second = layout.View(view, [two], slices)
                np.testing.assert_array_equal(statistics_of_view(second, of_second), statistics_of(values, lay))


def test_broadcast_memory_has_a_view():
    values = np.broadcast_to(np.arange(3), (4, 3))
    lay = layout.layout((4, 3), (1,))
    view = layout.collapse(lay.sizes, lay.kept, [values.strides])
    np.testing.assert_array_equal(statistics_of_view(values, view), statistics_of(values, lay))


@pytest.mark.parametrize("sizes", [(), (4,), (2, 3, 4), (2, 0, 4), (1, 1, 5)])
def test_contiguous_strides_are_those_of_numpy(sizes):
    found = layout.contiguous_strides(sizes, 4)
    array = np.zeros([max(s, 1) for s in sizes], np.float32)
    assert all(f == s for f, s, n in zip(found, array.strides, sizes, strict=True) if n > 1 and 0 not in sizes)
    assert len(found) == len(sizes)


# --- dimensions of several arrays together -----------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "strides", "expected"),
    [
        ((2, 3, 4), [(12, 4, 1)], ((24,), [(1,)])),
        ((2, 3, 4), [(12, 4, 1), (0, 0, 0)], ((24,), [(1,), (0,)])),
        ((2, 3, 4), [(12, 4, 1), (0, 1, 0)], ((2, 3, 4), [(12, 4, 1), (0, 1, 0)])),
        ((2, 3, 4), [(12, 4, 1), (12, 4, 2)], ((6, 4), [(4, 1), (4, 2)])),
        ((2, 1, 4), [(4, 99, 1)], ((8,), [(1,)])),
        ((1, 1), [(5, 5), (7, 7)], ((1,), [(0,), (0,)])),
        ((), [()], ((1,), [(0,)])),
    ],
)
def test_merged(sizes, strides, expected):
    assert layout.merged(sizes, strides) == expected
