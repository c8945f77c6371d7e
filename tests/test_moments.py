"""Moments: against NumPy in float64, however the data are divided."""

import copy
import functools
import operator
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nbbn
from nbbn.runtime.machine import last_level_cache
from tests.helpers.processes import check

SCRIPT = Path(__file__).parents[1] / "docs/examples/moments.py"
EPS = np.finfo(np.float64).eps


def data(*shape, mean=3.0, std=2.0, seed=0):
    return np.random.default_rng(seed).normal(mean, std, shape)


def of(*parts, axis=-1):
    return functools.reduce(nbbn.Moments.update, parts, nbbn.Moments(axis))


def check_numpy(found, x, axis, weights=None, tolerance=1e-12):
    """Mean and variance of NumPy, of x in float64 and over `axis`. Deviations are what errors of means are small to."""
    x = np.asarray(x, np.float64)
    w = np.broadcast_to(1.0 if weights is None else weights, x.shape)
    total = w.sum(axis)
    mean = np.average(x, axis=axis, weights=w)
    variance = np.average((x - np.expand_dims(mean, axis)) ** 2, axis=axis, weights=w)
    np.testing.assert_allclose(found.count.ravel(), total.ravel(), rtol=1e-14)
    np.testing.assert_allclose(found.mean.ravel(), mean.ravel(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found.variance().ravel(), variance.ravel(), rtol=tolerance)
    np.testing.assert_array_equal(found.std(), np.sqrt(found.variance()))


# --- what it is ------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "reduced", "result"),
    [
        ((50, 3), -1, (0,), (3,)),
        ((8, 3, 5, 4), 1, (0, 2, 3), (3,)),
        ((8, 5, 4, 3), [-1], (0, 1, 2), (3,)),
        ((8, 3, 5, 2), [1, 3], (0, 2), (1, 3, 1, 2)),
        ((8, 3, 5, 2), range(1, 3), (0, 3), (1, 3, 5, 1)),
        ((7,), 0, (), (7,)),
    ],
)
def test_shapes_are_those_of_parameters(shape, axis, reduced, result):
    x = data(*shape)
    found = of(x[:1], x[1:], axis=axis) if reduced else of(x, axis=axis)
    assert found.shape == found.count.shape == found.mean.shape == found.variance().shape == result
    assert found.mean.dtype == found.count.dtype == found.std().dtype == np.float64
    check_numpy(found, x, reduced)


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ">f4", "i1", "u2", "i8", "?"]
)
def test_dtypes(dtype):
    """Every value of each of them is a float64: nothing but the sums can be rounded."""
    x = (data(60, 4) * 10).astype(dtype)
    check_numpy(of(x[:20], x[20:]), x.astype(np.float64), 0)


def test_integers_are_exact():
    """float32 would not tell these from their neighbours."""
    x = np.array([[2**24 + 1], [2**24 + 3]])
    assert of(x).mean == 2**24 + 2
    assert of(x.astype(np.uint16)).mean == 2


def test_lists_and_memory_of_any_order():
    x = data(12, 3, 4)
    assert of([[1, 2], [3, 6]]).mean.tolist() == [2, 4]
    check_numpy(of(np.asfortranarray(x)), x, (0, 1))
    check_numpy(of(x[::-2, ::2]), x[::-2, ::2], (0, 1))


def test_different_ranks_have_the_same_statistics():
    x = data(12, 3)
    assert of(x.reshape(2, 6, 3)) == of(x)
    check_numpy(of(x[:4].reshape(2, 2, 3), x[4:]), x, 0)


def test_results_are_copies():
    found = of(data(5, 2))
    for values in (found.mean, found.count, found.variance(), found.std()):
        values[:] = -1
    assert found == of(data(5, 2))


def test_extreme_means():
    """With a mean of 1e8 deviations, float64 holds 8 digits of a deviation, and so do differences of means; the mean of
    squares minus the square of the mean has none."""
    x = data(1000, 3, mean=1e8, std=1.0)
    check_numpy(of(x), x, 0)  # one part: about a value of the data, nothing is lost
    check_numpy(of(*np.array_split(x, 37)), x, 0, tolerance=4e8 * EPS)
    naive = (x**2).mean(0) - x.mean(0) ** 2
    assert (abs(naive / x.var(0) - 1) > 0.5).all()


def test_bad_values_spoil_their_own_channel_only():
    x = data(40, 5)
    bad = x.copy()
    bad[3, 1], bad[30, 3] = np.nan, np.inf
    found, rest = of(bad[:10], bad[10:]), [0, 2, 4]
    assert np.isnan(found.mean[1])
    assert np.isnan(found.variance()[[1, 3]]).all()
    assert not np.isfinite(found.mean[3])
    expected = of(x[:10], x[10:])
    np.testing.assert_array_equal(found.mean[rest], expected.mean[rest])
    np.testing.assert_array_equal(found.variance()[rest], expected.variance()[rest])


# --- nothing, and one value ------------------------------------------------------


@pytest.mark.parametrize("found", [nbbn.Moments(), of(np.empty((0, 3)))])
def test_without_a_value(found):
    """As NumPy, but without its warning, which would be an error here."""
    assert (found.count == 0).all()
    for values in (found.mean, found.variance(), found.variance(1), found.std()):
        assert np.isnan(values).all()
        assert values.shape == found.shape


def test_an_empty_one_changes_nothing():
    some, empty, shaped = of(data(5, 3)), nbbn.Moments(), of(np.empty((0, 3)))
    assert some + empty == empty + some == some + shaped == shaped + some == some
    assert empty + empty == empty != shaped
    assert (empty + shaped).shape == (3,)
    assert sum([some, some], nbbn.Moments()) == some + some
    assert of(np.empty((4, 0))).mean.shape == (0,)
    with pytest.raises(ValueError, match=r"\(3,\), as before; received \(4,\)"):
        shaped.merge(of(data(2, 4)))


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
@pytest.mark.parametrize("ddof", [0, 1, 2, 3, 0.5, np.float32(1)])
@pytest.mark.filterwarnings("ignore:Degrees of freedom", "ignore:invalid value", "ignore:divide by zero")
def test_ddof_is_that_of_numpy(rows, ddof):
    x = data(rows, 3)
    np.testing.assert_allclose(of(x).variance(ddof), x.var(0, ddof=ddof), rtol=1e-12)
    np.testing.assert_allclose(of(x).std(ddof), x.std(0, ddof=ddof), rtol=1e-12)


# --- weights ------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_weights(scale):
    x, w = data(30, 4), np.random.default_rng(1).uniform(0, 3, (30, 1)) * scale
    found = nbbn.Moments().update(x[:11], w[:11]).update(x[11:], w[11:, 0])  # of samples, as a mask
    check_numpy(found, x, 0, w)
    total = w.sum()
    m2 = (w * (x - found.mean) ** 2).sum(0)
    np.testing.assert_allclose(found.variance(1), m2 / (total - (w**2).sum() / total), rtol=1e-12)


def test_a_mask_leaves_out_what_may_be_anything():
    x, mask = data(4, 6, 3), np.random.default_rng(1).random((4, 6)) > 0.4
    bad = np.where(mask[..., None], x, np.nan)
    found = nbbn.Moments().update(bad, mask)
    check_numpy(found, x[mask], 0)
    np.testing.assert_allclose(found.variance(1), x[mask].var(0, ddof=1), rtol=1e-12)
    check_numpy(nbbn.Moments(1).update(bad.swapaxes(1, 2), mask), x[mask], 0)  # batch first, whatever the axis


def test_weights_of_their_own_for_each_value():
    x, w = data(20, 3), np.random.default_rng(1).integers(0, 4, (20, 3))
    w[:, 2] = 0
    found = nbbn.Moments().update(x, w)
    repeated = [np.repeat(x[:, c], w[:, c]) for c in range(2)]
    np.testing.assert_array_equal(found.count, w.sum(0))
    np.testing.assert_allclose(found.mean, [*(r.mean() for r in repeated), np.nan], rtol=1e-12)
    np.testing.assert_allclose(found.variance(), [*(r.var() for r in repeated), np.nan], rtol=1e-12)
    assert "count 0 to" in repr(found)


def test_one_value_that_counts_has_no_unbiased_variance():
    found = nbbn.Moments().update(data(2, 1), [1.0, 1e-20])
    assert np.isinf(found.variance(1))
    assert found.variance() < 1e-18
    assert np.isfinite(nbbn.Moments().update(data(2, 1), [1e200, 1e200]).variance())  # though squares are not


# --- parts ------------------------------------------------------


@given(st.data())
def test_any_partition_gives_the_same(draw):
    rows = draw.draw(st.integers(1, 200), "rows")
    cuts = sorted(draw.draw(st.lists(st.integers(0, rows), max_size=12), "cuts"))
    mean = draw.draw(st.sampled_from([0.0, 1.0, -300.0]), "mean")
    x = data(rows, 3, mean=mean, std=draw.draw(st.sampled_from([0.5, 1.0, 7.0]), "std"), seed=rows)
    weights = np.random.default_rng(rows).uniform(0.1, 2, rows) if draw.draw(st.booleans(), "weighted") else None
    parts = [slice(*ends) for ends in zip([0, *cuts], [*cuts, rows], strict=True)]
    moments = [nbbn.Moments().update(x[p], None if weights is None else weights[p]) for p in parts]
    order = draw.draw(st.permutations(range(len(parts))), "order")
    whole, merged = nbbn.Moments().update(x, weights), sum((moments[i] for i in order), nbbn.Moments())
    check_numpy(merged, x, 0, None if weights is None else weights[:, None])
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.variance(), whole.variance(), rtol=1e-12)


def test_the_same_order_gives_the_same_bits():
    parts = np.array_split(data(500, 7), 13)
    updated, merged = of(*parts), functools.reduce(operator.add, map(of, parts))
    assert updated == merged
    assert updated.to_bytes() == merged.to_bytes()
    assert functools.reduce(operator.add, map(of, parts[::-1])) != updated


def test_sums_are_new_objects():
    a, b = of(data(5, 3)), of(data(4, 3, seed=1))
    before, name = a.to_bytes(), a
    name += b
    assert name == a + b == a.merge(b)
    assert a.to_bytes() == before
    assert a != b


def test_a_memory_mapped_file_in_pieces(tmp_path):
    """Twice what the last cache holds, or what takes a second."""
    rows = min(2 * last_level_cache(), 1 << 28) // (64 * 4)
    file = np.memmap(tmp_path / "x", np.float32, "w+", shape=(rows, 64))
    pieces = [slice(start, start + (1 << 16)) for start in range(0, rows, 1 << 16)]
    for i, piece in enumerate(pieces):
        file[piece] = i % 7 + np.arange(64)
    file.flush()
    x = np.memmap(tmp_path / "x", np.float32, "r", shape=(rows, 64))
    found = of(*(x[piece] for piece in pieces))
    steps = np.repeat(np.arange(len(pieces)) % 7, [len(x[piece]) for piece in pieces])
    np.testing.assert_array_equal(found.count, rows)
    np.testing.assert_allclose(found.mean, steps.mean() + np.arange(64), rtol=1e-12)
    np.testing.assert_allclose(found.variance(), steps.var(), rtol=1e-12)


def test_the_example_with_processes():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split("\n")[0] == "200000 rows in 4 parts: mean and variance of NumPy in float64: True"


# --- bytes ------------------------------------------------------


SOME = [
    nbbn.Moments(),
    of(data(5, 3)),
    of(data(4, 3, 5, 2), axis=[1, 3]),
    of(np.full((2, 2), np.nan)),
    of(np.empty((2, 0))),
]


@pytest.mark.parametrize("found", SOME, ids=repr)
def test_there_and_back(found):
    for copied in (
        nbbn.Moments.from_bytes(found.to_bytes()),
        nbbn.Moments.from_bytes(memoryview(bytearray(found.to_bytes()))),
        pickle.loads(pickle.dumps(found)),
        copy.deepcopy(found),
    ):
        assert copied == found
        assert repr(copied) == repr(found)
        copied.update(np.ones((4, *found.shape[1:]) if len(found.shape) > 1 else (4, *(found.shape or (3,)))))
        assert copied != found or found.shape == (0,)


def test_another_process_has_the_same_bits():
    code = "import sys, nbbn; print(nbbn.Moments.from_bytes(bytes.fromhex(sys.stdin.read())).to_bytes().hex())"
    code = code.replace("sys.stdin.read()", repr(of(data(5, 3)).to_bytes().hex()))
    assert bytes.fromhex(check(code)) == of(data(5, 3)).to_bytes()


def test_the_format():
    """For whoever reads it in another language: it will not change unseen."""
    header = struct.pack("<8s3H", b"nbbnMOM\0", 1, 1, 1) + struct.pack("<2q", -1, 2)
    numbers = struct.pack("<8d", 2, 2, 2, 20, 2, 200, 2, 2)
    body = header + numbers
    assert of([[1.0, 10.0], [3.0, 30.0]]).to_bytes() == body + struct.pack("<I", zlib.crc32(body))


@given(st.integers(0, 10**9), st.integers(1, 255))
def test_damaged_bytes_are_found(where, change):
    damaged = bytearray(of(data(5, 3)).to_bytes())
    damaged[where % len(damaged)] ^= change
    with pytest.raises(ValueError, match=r"damaged|must be of"):
        nbbn.Moments.from_bytes(damaged)
    with pytest.raises(ValueError, match=r"damaged or incomplete|must be of"):
        nbbn.Moments.from_bytes(SOME[1].to_bytes()[: where % len(damaged)])


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (5, TypeError, "received int"),
        ("text", TypeError, "received str"),
        (b"", ValueError, "received 0 bytes"),
        (pickle.dumps(1.5) * 9, ValueError, r"Moments.to_bytes\(\); received"),
        (struct.pack("<8s3H", b"nbbnMOM\0", 2, 1, 0) + bytes(44), ValueError, "version 1 of .* received version 2"),
    ],
)
def test_what_are_no_bytes_of_moments(value, error, message):
    with pytest.raises(error, match=message):
        nbbn.Moments.from_bytes(value)


# --- errors ------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda m: m.update(data(5, 4)), ValueError, r"x must have .* shape \(3,\), as before; received \(4,\)"),
        (lambda m: m.update(3.0), ValueError, "x must have at least one dimension"),
        (lambda m: m.update(["a"]), TypeError, "x must be"),
        (lambda m: m.update(np.ones((2, 3), complex)), TypeError, "x must be .* complex"),
        (lambda m: m.update(np.ma.ones((2, 3))), TypeError, "masked"),
        (lambda m: m.update(data(5, 3), np.ones(4)), ValueError, "weights must broadcast"),
        (lambda m: m.update(data(5, 3), -np.ones(5)), ValueError, "weights must be finite"),
        (lambda m: m.merge(of(data(5, 4))), ValueError, r"other must have .* \(3,\), as before; received \(4,\)"),
        (lambda m: m + of(data(3, 5), axis=0), ValueError, "other must have axis=-1, .*; received 0"),
        (lambda m: m.merge(m.mean), TypeError, "other must be nbbn.Moments"),
        (lambda m: m + 1, TypeError, "unsupported operand"),
        (lambda m: m.variance(-1), ValueError, "ddof must be .* received -1"),
        (lambda m: m.std("1"), TypeError, "ddof must be .* received '1'"),
        (lambda m: hash(m), TypeError, "unhashable"),
        (lambda m: nbbn.Moments(axis=3).update(data(5, 3)), ValueError, "axis must be between -2 and 1"),
        (lambda m: nbbn.Moments(axis=[]), ValueError, "axis must name"),
        (lambda m: nbbn.Moments(axis=1.5), TypeError, "axis must be an int"),
    ],
)
def test_errors_change_nothing(act, error, message):
    found = of(data(5, 3))
    with pytest.raises(error, match=message):
        act(found)
    assert found == of(data(5, 3))


def test_it_shows_what_it_has():
    assert repr(nbbn.Moments(1)) == "<Moments axis=1: empty>"
    assert repr(of(data(5, 3))) == "<Moments axis=-1: shape (3,), count 5>"
    assert nbbn.Moments([2]).axis == 2
    assert nbbn.Moments([1, 2]).axis == (1, 2)
    assert of(data(5, 3)) != 5
