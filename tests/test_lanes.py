"""Sixteen elements at a time: what is read and written, and nothing beside it; in which order sums are made; and that
the rules of one number are those of sixteen."""

import numpy as np
import pytest

from nbbn.core import rules
from nbbn.kernels.cpu import floats
from nbbn.kernels.cpu.lanes import (
    HALF,
    LANES,
    add_halves,
    each,
    first,
    load,
    load_half,
    over,
    part,
    splat,
    store,
    traced,
    vector_rules,
    wide,
    write_total,
)
from tests.oracle.contract import EVERY_DTYPE
from tests.oracle.targets import carried, compiled, copy_elements
from tests.test_rules import VALUES

CANARY = 77


@traced
def _copy_part(source, i, target, j, n):
    store(target, j, load(source, i, n), n)


@traced
def _copy_all(source, i, target, j):
    store(target, j, load(source, i))


@traced
def _load_part(source, i, target, n):
    store(target, 0, load(source, i, n))


@compiled
def copy_part(source, i, target, j, n):
    _copy_part(source, i, target, j, n)


@compiled
def copy_all(source, i, target, j):
    _copy_all(source, i, target, j)


@compiled
def load_part(source, i, target, n):
    _load_part(source, i, target, n)


@compiled
def copy_run(source, target):
    copy_elements(source, target)


# --- elements ----------------------------------------------------------------------------

STEPS = {"contiguous": (1, 1), "gaps": (3, 2), "backwards": (-1, -2), "only the target": (1, 3), "one number": (0, 2)}
EVERY_STEP = pytest.mark.parametrize(("step", "target_step"), STEPS.values(), ids=STEPS)
SIZE = 64


def spread(values, step):
    """The values in a larger array of other ones, so many elements apart; of 0 the first one everywhere. And that
    array."""
    size = len(values)
    around = np.full(size * max(1, abs(step)) + 2 * LANES, CANARY, values.dtype)
    inside = around[LANES:-LANES]
    if step == 0:
        inside[0] = values[0]
        return np.lib.stride_tricks.as_strided(inside, (size,), (0,)), around
    view = inside[::step][:size]
    view[...] = values
    return view, around


def numbers(dtype, size=SIZE):
    return np.arange(1, size + 1).astype(dtype)


def check_written(target, around, expected):
    np.testing.assert_array_equal(target, expected)
    beside = around.size - target.size + (expected == CANARY).sum()
    assert (around == CANARY).sum() == beside, "something beside was written"


@EVERY_DTYPE
@EVERY_STEP
def test_every_part_of_a_vector_is_read_and_written(dtype, step, target_step):
    check_parts(dtype, step, target_step, copy_part)


def check_parts(dtype, step, target_step, copy_part):
    source, _ = spread(numbers(dtype), step)
    for n in range(1, LANES + 1):
        for i, j in ((0, 0), (5, 9), (SIZE - n, SIZE - n)):
            target, around = spread(np.full(SIZE, CANARY, dtype), target_step)
            expected = np.full(SIZE, CANARY, dtype)
            expected[j : j + n] = source[i : i + n]
            if n == LANES:
                copy_all(carried(source), i, carried(target), j)
            else:
                copy_part(carried(source), i, carried(target), j, n)
            check_written(target, around, expected)


@pytest.mark.parametrize("sizes", [(), (2, 4, 8)], ids=["eight, four, two, one", "masks"])
@EVERY_DTYPE
def test_parts_with_and_without_masks(dtype, sizes, monkeypatch):
    """Both ways work everywhere; which one is taken is for speed."""
    monkeypatch.setattr(floats, "MASKED_LOADS", sizes)
    monkeypatch.setattr(floats, "MASKED_STORES", sizes)

    @compiled
    def copy(source, i, target, j, n):
        _copy_part(source, i, target, j, n)

    check_parts(dtype, 1, 1, copy)


@EVERY_DTYPE
@EVERY_STEP
def test_the_rest_of_a_part_is_zero(dtype, step, target_step):
    """And not what stands there, which may be another channel's, or no memory."""
    source, _ = spread(numbers(dtype), step)
    for n in range(1, LANES):
        target, _ = spread(np.full(LANES, CANARY, dtype), target_step or 1)
        load_part(carried(source), SIZE - LANES, carried(target), n)
        np.testing.assert_array_equal(target, np.where(np.arange(LANES) < n, source[-LANES:], np.zeros((), dtype)))


@EVERY_DTYPE
@EVERY_STEP
def test_runs_of_every_length(dtype, step, target_step):
    for size in (1, LANES - 1, LANES, LANES + 1, 2 * LANES - 1, 2 * LANES, 3 * LANES + 5):
        source, _ = spread(numbers(dtype, size), step)
        target, around = spread(np.zeros(size, dtype), target_step)
        copy_run(carried(source), carried(target))
        check_written(target, around, np.array(source))


def test_nothing_of_an_empty_run_is_touched():
    source, target = np.ones(0, np.float32), np.full(8, CANARY, np.float32)
    copy_run(source, target)
    assert (target == CANARY).all()


# --- sums --------------------------------------------------------------------------------


@traced
def _total(x, n, total):
    (found,) = over(0, n, lambda i, n, so_far: [so_far[0] + wide(load(x, i, n))], [splat(0.0)])
    write_total(total, (0,), found)


@traced
def _total_of_halves(x, halves, total):
    def add(begin, _):
        add_halves(halves, HALF, wide(load(x, begin)), begin == 0)

    each(0, 3 * LANES, LANES, add)
    write_total(total, (0,), load_half(halves, HALF))


@compiled
def total(x, n, found):
    _total(x, n, found)


@compiled
def total_of_halves(x, halves, found):
    _total_of_halves(x, halves, found)


@traced
def _first(x, n, target):
    store(target, 0, first(load(x, 0), n))


@compiled
def first_of(x, n, target):
    _first(x, n, target)


def half_and_half(vector):
    while vector.size > 1:
        vector = vector[: vector.size // 2] + vector[vector.size // 2 :]
    return vector[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_sum_has_sixteen_parts_that_are_added_half_and_half(dtype):
    """To the bit, of numbers whose sum depends on its order."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=100) * 10.0 ** rng.integers(-9, 9, 100)).astype(dtype)
    orders = set()
    for n in range(1, 101):
        parts = np.zeros(-(-n // LANES) * LANES)
        parts[:n] = x[:n]
        lanes = np.zeros(LANES)
        for vector in parts.reshape(-1, LANES):
            lanes = lanes + vector
        found = np.full(1, np.nan)
        total(x, n, found)
        assert found[0] == half_and_half(lanes), n
        orders.add(found[0] == x[:n].astype(np.float64).cumsum()[-1])
    assert orders == {True, False}, "these numbers' sums do not depend on their order"


def test_vectors_are_added_to_what_is_there_half_and_half():
    """And what was there before the first one counts for nothing."""
    x = np.random.default_rng(0).normal(size=3 * LANES).astype(np.float32)
    halves, found = np.full(3 * HALF, np.nan), np.zeros(1)
    total_of_halves(x, halves, found)
    expected = sum(vector[:HALF] + vector[HALF:] for vector in x.astype(np.float64).reshape(3, LANES))
    np.testing.assert_array_equal(halves[HALF : 2 * HALF], expected)
    assert np.isnan(halves[:HALF]).all()
    assert np.isnan(halves[2 * HALF :]).all()
    assert found[0] == half_and_half(expected)


def test_what_is_beyond_the_first_is_zero():
    """Whatever it is: a weight of 0 does not make 0 of NaN."""
    x = np.full(LANES, np.nan, np.float32)
    for n in range(1, LANES + 1):
        x[:n], target = np.arange(n) + 1, np.full(LANES, CANARY, np.float32)
        first_of(x, n, target)
        np.testing.assert_array_equal(target, np.where(np.arange(LANES) < n, np.arange(LANES) + 1, 0))


# --- rules -------------------------------------------------------------------------------

# combine() is of a GPU's threads
RULES = [rule for rule in dict.fromkeys(rule for rule, _, _ in VALUES) if rule is not rules.combine]
CASES = [[(arguments, expected) for other, arguments, expected in VALUES if other is rule] for rule in RULES]


@traced
def _answers(values, results):
    """results[k, j] = the j-th answer of the k-th rule to values[k], a number for each case in each place."""
    for k, rule in enumerate(RULES):
        given = [load(part(values, (k, j), 0, LANES), 0) for j in range(len(CASES[k][0][0]))]
        if rule in (rules.drop, rules.choose):
            given[0] = given[0] != 0
        found = getattr(vector_rules, rule.__name__)(*given)
        if rule in (rules.is_far, rules.is_left_out, rules.is_not_finite):
            found = vector_rules.choose(found, splat(1.0), splat(0.0))
        for j, answer in enumerate(found if isinstance(found, tuple) else [found]):
            store(part(results, (k, j), 0, LANES), 0, answer)


@compiled
def answers(values, results):
    _answers(values, results)


def test_the_rules_of_one_number_are_those_of_sixteen():
    assert max(len(cases) for cases in CASES) <= LANES
    values, results = np.zeros((len(RULES), 9, LANES)), np.zeros((len(RULES), 4, LANES))
    for k, cases in enumerate(CASES):
        for place in range(LANES):
            arguments, _ = cases[place % len(cases)]
            values[k, : len(arguments), place] = arguments
    answers(values, results)
    for k, cases in enumerate(CASES):
        for place in range(LANES):
            arguments, expected = cases[place % len(cases)]
            expected = np.atleast_1d(np.array(expected, float))
            found = results[k, : expected.size, place]
            assert np.array_equal(found, expected, equal_nan=True), (RULES[k].__name__, arguments, found)
