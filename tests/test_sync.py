"""SyncBatchNormalization on threads: one layer on the whole batch, whatever the options and however it is divided.

What is checked is in tests/helpers/rank_cases.py: test_sync_processes.py does the same over MPI and torch.distributed.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

import nbbn
from nbbn.core import dtypes
from nbbn.sync import SyncError
from tests.helpers.rank_cases import CASES, GHOSTS, LENGTHS, Batch, Case, check_case, everyone_is_empty
from tests.helpers.ranks import (
    DY,
    Plain,
    Silent,
    X,
    bits,
    check_same_bits,
    gathered,
    make,
    on_ranks,
    refused,
    same,
    threads,
    works,
)
from tests.oracle.reference import Reference

RANKS = pytest.mark.parametrize("n", [2, 3, 4])


@RANKS
@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_option(case, kind, n):
    lengths = (GHOSTS if case.virtual else LENGTHS)[kind][n]
    assert len(set(on_ranks(threads(n), check_case, case, lengths))) == 1


class Tuple(NamedTuple):
    """A group that nothing can refer to weakly."""

    rank: int
    size: int
    all_gather: Any


@dataclasses.dataclass
class Unhashable:
    rank: int
    size: int
    all_gather: Any


@pytest.mark.parametrize("kind", [Plain, Tuple, Unhashable])
def test_every_object_with_three_attributes_is_a_group(kind):
    def run(group):
        own = Plain(group) if kind is Plain else kind(group.rank, group.size, group.all_gather)
        layers = [nbbn.SyncBatchNormalization(group=own) for _ in range(2)]
        for layer in (*layers, *layers[::-1]):
            works(group, layer)
        return check_case(own, CASES["renorm"], [7, 1, 4])

    assert len({*on_ranks(threads(3), run), *on_ranks(threads(3), check_case, CASES["renorm"], [7, 1, 4])}) == 1


def test_a_group_of_one():
    (group,) = nbbn.sync.threads(1)
    for case in CASES.values():
        check_case(group, case, [8])


def test_uneven_inner_sizes():
    """Every value counts the same: not every sample, and not every rank."""
    shapes = [(2, 3, 4, 5), (1, 3, 1, 2), (3, 3, 2, 2)]
    rng = np.random.default_rng(0)
    xs, dys = ([rng.normal(i, 2, s) for i, s in enumerate(shapes)] for _ in range(2))

    def flat(arrays):
        return np.concatenate([np.moveaxis(a, 1, -1).reshape(-1, 3) for a in arrays])

    whole = Reference(momentum=0.5, dtype="float64").build((56, 3))
    step = whole(flat(xs), True)
    expected = step.gradients(flat(dys)).inputs
    ends = np.cumsum([x.size // 3 for x in xs])

    def run(group):
        layer = make(group, axis=1)
        y, pullback = layer.vjp(xs[group.rank], True)
        rows = slice(ends[group.rank] - xs[group.rank].size // 3, ends[group.rank])
        same(flat([y]), step.y[rows])
        same(flat([pullback(dys[group.rank]).inputs]), expected[rows])
        same(layer.moving_mean, whole.moving_mean)
        same(layer.moving_variance, whole.moving_variance)
        check_same_bits(group, layer)

    on_ranks(threads(3), run)


@pytest.mark.parametrize("excluded", [np.nan, np.inf])
def test_nan_under_a_mask_of_one_rank(excluded):
    """It has no part in any statistic, nor in the gradients of other values. One that counts poisons its channel."""
    case = CASES["plain"]
    batch, mask = Batch(case, 12, 0), np.arange(12) != 2
    x = batch.x.copy()
    x[2, 1] = excluded
    whole = Reference(momentum=0.5).build(x.shape)
    step = whole(batch.x, True, mask)
    counted = batch.dy.copy()
    counted[2, 1] = 0  # nothing of a value that is not finite counts
    expected = step.gradients(counted)

    def run(group):
        part, layer = each_slice([5, 7], group.rank), make(group)
        y, pullback = layer.vjp(x[part], True, mask[part] if group.rank == 0 else None)
        found = pullback(batch.dy[part])
        clean = np.isfinite(x[part])
        same(y[clean], step.y[part][clean])
        same(found.inputs[clean], expected.inputs[part][clean])
        same(layer.moving_variance, whole.moving_variance)
        layer(x[part], training=True)
        assert np.isfinite(layer.moving_mean).tolist() == [True, False, True, True, True]
        check_same_bits(group, layer)

    on_ranks(threads(2), run)


# The mean of float64 values is right to half a unit in its last place, 1.1e-16 of it, and to what the sums of each rank
# have lost. In deviations that is the ratio times 1e-16, some times over; 2.5 of them are the most for y, 4 for dx.
@pytest.mark.parametrize("ratio", [1e4, 1e8])
def test_large_means(ratio):
    batch = Batch(CASES["plain"], 12, 0, scale=1.0, mean=ratio)
    x = batch.x.astype(np.longdouble)
    mean, sigma = x.mean(0), np.sqrt(x.var(0) + np.longdouble(1e-3))
    expected = ((x - mean) / sigma).astype(np.float64)
    g, x_hat = batch.dy, (x - mean) / sigma
    dx = ((g - g.mean(0) - x_hat * (g * x_hat).mean(0)) / sigma).astype(np.float64)

    def run(group):
        part = each_slice([7, 1, 4], group.rank)
        layer = make(group, momentum=0.0)
        y, pullback = layer.vjp(batch.x[part], True)
        bound = 1e-15 * ratio
        np.testing.assert_allclose(y, expected[part], rtol=0, atol=bound)
        np.testing.assert_allclose(pullback(g[part]).inputs, dx[part], rtol=0, atol=bound)
        np.testing.assert_allclose(layer.moving_variance, x.var(0).astype(np.float64), rtol=bound)

    on_ranks(threads(3), run)


def each_slice(lengths, rank):
    return slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"momentum": None}, {"virtual_batch_size": 2}], ids=str)
def test_a_channel_without_any_value_keeps_its_state(options):
    """Also where some ranks are empty."""
    lengths, weights = [4, 0, 4], np.random.default_rng(3).random((8, 5))
    weights[:, 2] = 0
    batch = Batch(CASES["plain"], 8, 0)

    def run(group):
        part, layer = each_slice(lengths, group.rank), make(group, **options)
        layer.build((None, 5), "float64")
        before = layer._variables.state[:, 2].copy()
        layer(batch.x[part], training=True, mask=weights[part])
        np.testing.assert_array_equal(layer._variables.state[:, 2], before)
        assert (layer._variables.state[:2, 3] != before[:2]).all()
        check_same_bits(group, layer)

    on_ranks(threads(3), run)


def test_skip_nonfinite_is_of_all_ranks():
    """A NaN of one rank leaves its channel's statistics alone on all."""
    x = X[:2].copy()
    x[1, 3, 2] = np.nan
    others = np.arange(5) != 2

    def run(group):
        layer = make(group, skip_nonfinite=True)
        layer(x[group.rank], training=True)
        assert (layer.moving_mean[2], layer.moving_variance[2]) == (0, 1)
        same(layer.moving_mean[others], x.reshape(-1, 5).mean(0)[others] / 2)
        return check_same_bits(group, layer)

    on_ranks(threads(2), run)


@pytest.mark.parametrize(
    "options", [{"virtual_batch_order": "contiguous"}, {"ragged": "last"}, {"ragged": "spread"}], ids=str
)
def test_groups_of_virtual_batches_in_another_order(options):
    """Group g of all ranks is one group, whatever its members are."""
    count = 7 if "ragged" in options else 8

    def run(group):
        layer = make(group, virtual_batch_size=4, **options)
        y = layer(X[group.rank][:count], training=True)
        means, members = [], layer._dispatcher.layout((count, 5), training=True).members()
        for own in members:
            whole = np.concatenate([X[rank][:count][own] for rank in range(2)])
            means.append(whole.mean(0))
            same(y[own], (X[group.rank][:count][own] - whole.mean(0)) / np.sqrt(whole.var(0) + layer.epsilon))
        assert len(means) == 2
        same(layer.moving_mean.ravel(), np.mean(means, axis=0) / 2)
        check_same_bits(group, layer)

    on_ranks(threads(2), run)


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 2, 5), (4, 0, 5)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"renorm": True}, {"momentum": None}, {"virtual_batch_size": 2}, {"virtual_batch_size": 2, "renorm": True}],
    ids=str,
)
def test_all_ranks_empty(options, shape):
    """At the first call, and later: nothing changes, and the next call is as usual."""
    on_ranks(threads(2), everyone_is_empty, options, shape)


def test_an_empty_input_with_virtual_batches_that_do_not_fit():
    """Four samples without a value are two groups: unlike eight samples, which are four."""

    def run(group):
        layer = make(group, virtual_batch_size=2)
        x = np.empty((4, 0, 5)) if group.rank else np.ones((8, 1, 5))
        refused(layer, lambda: layer(x, training=True), r"virtual batches \(rank 0: 4, rank 1: 2\)")
        y = layer(np.empty((4, 0, 5)) if group.rank else np.ones((4, 1, 5)), training=True)
        assert y.shape[0] == 4
        check_same_bits(group, layer)

    on_ranks(threads(2), run)


def test_inference_does_without_the_others():
    layer = make(Silent())
    x = X[0]
    np.testing.assert_allclose(layer(x), x / np.sqrt(1 + 1e-3))
    for training in (None, False, 0):
        y, pullback = layer.vjp(x, training)
        np.testing.assert_allclose(pullback(y).inputs, y / np.sqrt(1 + 1e-3))
    layer.trainable = False
    before = bits(layer)
    y, pullback = layer.vjp(x, True)
    np.testing.assert_allclose(pullback(y).inputs, y / np.sqrt(1 + 1e-3))
    assert bits(layer) == before
    layer.trainable = True
    with pytest.raises(SyncError, match="a message"):
        layer(x, training=True)


def test_without_a_group_it_is_the_plain_layer():
    """To the bit, also where TensorFlow's fused kernel would correct the variance."""
    x = np.random.default_rng(0).normal(2, 3, (4, 3, 2, 5)).astype(np.float32)
    layers = nbbn.SyncBatchNormalization(), nbbn.BatchNormalization(fused=False), nbbn.BatchNormalization()
    results = []
    for layer in layers:
        for _ in range(3):
            y, pullback = layer.vjp(x, True)
            found = pullback(y)
        results.append([a.tobytes() for a in (y, *found[:3], layer._variables.state)])
    assert results[0] == results[1]
    assert results[0][-1] != results[2][-1]
    assert layers[0].group is None


UNITS = {np.float32: 2**-23, np.float16: 2**-10, bfloat16: 2**-7}
DTYPES = [(np.float32, (12, 5), -1), (bfloat16, (12, 5), -1), (np.float16, (6, 3, 2, 2), 1)]


@pytest.mark.parametrize(("dtype", "shape", "axis"), DTYPES, ids=str)
def test_every_dtype(dtype, shape, axis):
    """Statistics are merged in float64. What elements get is rounded to float32, and so are their products and sums,
    numbers up to 8: by 2**-22 at most, four times. At last the result is rounded to the dtype of the input."""
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(m, 2, shape).astype(dtype) for m in (1, 0))
    whole = Reference(axis=axis, momentum=0.5, fused=False).build(shape)
    step = whole(x.astype(np.float64), True)
    step_dx = step.gradients(dy.astype(np.float64)).inputs
    eps = UNITS[dtype]

    def run(group):
        part = each_slice([shape[0] // 2, 1, shape[0] - shape[0] // 2 - 1], group.rank)
        layer = make(group, axis=axis)
        y, pullback = layer.vjp(x[part], True)
        found = pullback(dy[part])
        assert y.dtype == found.inputs.dtype == dtypes.resolve(dtype)
        assert layer.moving_mean.dtype == found.gamma.dtype == np.float32
        np.testing.assert_allclose(y.astype(np.float64), step.y[part], rtol=eps / 2, atol=2**-20)
        np.testing.assert_allclose(found.inputs.astype(np.float64), step_dx[part], rtol=eps / 2, atol=2**-20)
        np.testing.assert_allclose(layer.moving_mean, whole.moving_mean, rtol=2**-23)
        np.testing.assert_allclose(layer.moving_variance, whole.moving_variance, rtol=2**-23)
        check_same_bits(group, layer)

    on_ranks(threads(3), run)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=2, max_size=4),
    seed=st.integers(0, 2**32),
    mean=st.sampled_from([0.0, 3.0, -1e4]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    mask=st.sampled_from([None, "bool", "weights"]),
    renorm=st.booleans(),
)
def test_any_partition_of_any_batch(lengths, seed, mean, scale, mask, renorm):
    case = Case({}, mask=mask)
    batch = Batch(case, sum(lengths), seed, scale, mean)
    whole = Reference(momentum=0.5, renorm=renorm).build(batch.x.shape)
    step = whole(batch.x, True, batch.mask)
    expected = step.gradients(batch.dy)
    # The mean's last place, in units of what the values are divided by.
    size = 1 + np.abs(mean) / np.sqrt(scale**2 + 1e-3)
    bound = 1e-13 * size * (1 + np.abs(step.r).max() if lengths and renorm else 1)

    def run(group):
        part, layer = each_slice(lengths, group.rank), make(group, renorm=renorm)
        y, pullback = layer.vjp(batch.x[part], True, batch.part("mask", part))
        found = pullback(batch.dy[part])
        tops = [np.abs(a).max(initial=1) for a in (step.y, expected.inputs, expected.gamma)]
        np.testing.assert_allclose(y, step.y[part], rtol=0, atol=bound * tops[0])
        np.testing.assert_allclose(found.inputs, expected.inputs[part], rtol=0, atol=bound * tops[1])
        np.testing.assert_allclose(gathered(group, found.gamma).sum(0), expected.gamma, rtol=0, atol=bound * tops[2])
        for name in whole.weight_names:
            top = max(np.abs(getattr(whole, name)).max(), 1)
            np.testing.assert_allclose(getattr(layer, name), getattr(whole, name), rtol=0, atol=1e-11 * top)
        check_same_bits(group, layer)

    on_ranks(threads(len(lengths)), run)


def test_pullbacks_may_be_asked_for_again_and_out_taken():
    def run(group):
        layer = make(group)
        out, dx = np.empty((12, 5)), np.empty((12, 5))
        y, pullback = layer.vjp(X[group.rank], True, out=out)
        assert y is out
        first = pullback(DY[group.rank])
        again = pullback(DY[group.rank], out=dx)
        assert again.inputs is dx
        np.testing.assert_array_equal(dx, first.inputs)
        x = X[group.rank].copy()
        assert layer(x, training=True, out=x) is x
        np.testing.assert_array_equal(x, y)

    on_ranks(threads(2), run)
