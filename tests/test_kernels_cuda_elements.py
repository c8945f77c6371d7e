"""Copies and casts on a GPU, between any strides and dtypes, and sums along any dimensions."""

import os

import numpy as np
import pytest
from ml_dtypes import bfloat16

pytest.importorskip("numba_cuda", reason="needs the extra cuda")
from numba import cuda

if not cuda.is_available():
    pytest.skip("needs a GPU, or NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)

from nbbn.arrays import moving, numba_cuda
from nbbn.arrays.device import wrap
from nbbn.arrays.gpu import device_place
from nbbn.core.layout import layout
from nbbn.engine.base import Batch, Operands
from nbbn.engine.cuda import adjustment
from nbbn.engine.cuda.schedule import Thresholds
from nbbn.kernels.cuda.elements import place, split

PLACE = device_place(numba_cuda, 0)
FLOATS = [np.dtype(t) for t in (np.float16, bfloat16, np.float32, np.float64)]
OTHERS = [np.dtype(t) for t in (bool, np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64)]
# Ties of float16 and bfloat16, which by way of float32 some would be rounded beside; what is too large, and too small.
NUMBERS = [0, -0.0, 1, -1.5, 1 + 2**-11, 1 + 2**-11 + 2**-40, 1 + 2**-8 + 2**-40, 65519.99, 65520, 1e30, 1e300, 1e-7]
NUMBERS += [np.inf, -np.inf, np.nan]


def device(array):
    return wrap(cuda.to_device(np.ascontiguousarray(array)), numba_cuda)


def bits(array):
    return array.view(f"u{array.itemsize}").tolist()


@pytest.mark.parametrize("target", FLOATS, ids=str)
@pytest.mark.parametrize("source", [*FLOATS, *OTHERS], ids=str)
def test_a_cast_is_numpys(source, target):
    with np.errstate(all="ignore"):
        values = np.array(NUMBERS[: 15 if source in FLOATS else 4]).astype(source)
        expected = values.astype(target)
    found = PLACE.to_host(PLACE.astype(device(values), target))
    numbers = ~np.isnan(expected.astype(float))  # of NaN the payload is nobody's
    assert bits(found[numbers]) == bits(expected[numbers])
    assert np.isnan(found[~numbers].astype(float)).all()


@pytest.mark.parametrize("dtype", [bool, np.float16, np.int32, np.float64], ids=lambda t: t.__name__)
def test_copies_between_any_strides(dtype):
    """With as many dimensions as there are left, and a broadcast source."""
    memory = np.arange(3 * 4 * 2 * 10).reshape(3, 4, 2, 10).astype(dtype)
    whole = device(np.zeros((4, 3, 2, 5), dtype))
    source, target = wrap(cuda.to_device(memory)[:, ::2, :, 1::2], numba_cuda), PLACE.cut(whole, slice(1, 3))
    PLACE.put(target, moving.transposed(source, (3, 2, 2, 5), (1, 0, 2, 3)))
    expected = np.zeros((4, 3, 2, 5), dtype)
    expected[1:3] = memory[:, ::2, :, 1::2].transpose(1, 0, 2, 3)
    np.testing.assert_array_equal(PLACE.to_host(whole), expected)
    PLACE.put(target, device(memory[0, 0, :, :1]))
    expected[1:3] = memory[0, 0, :, :1]
    np.testing.assert_array_equal(PLACE.to_host(whole), expected)


def test_columns_and_rows_are_views():
    memory = np.arange(12, dtype=np.float32).reshape(3, 4)
    array = device(memory)
    part = PLACE.cut(array, slice(1, 3), slice(1, 3))
    found = PLACE.empty(part.shape, part.dtype)
    PLACE.put(found, part)
    np.testing.assert_array_equal(PLACE.to_host(found), memory[1:3, 1:3])
    PLACE.add(found, device(np.ones((2, 2), np.float32)))
    np.testing.assert_array_equal(PLACE.to_host(found), memory[1:3, 1:3] + 1)
    PLACE.put(part, found)
    memory[1:3, 1:3] += 1
    np.testing.assert_array_equal(PLACE.to_host(array), memory)


def test_nothing_is_launched_for_nothing():
    empty = PLACE.empty((0, 3), np.dtype(np.float32))
    PLACE.put(empty, device(np.ones((1, 3))))
    assert PLACE.astype(empty, np.dtype(np.float64)).shape == (0, 3)


@pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") != "1", reason="a GPU's functions are none of Python")
def test_indices_beyond_32_bits():
    big = (1 << 31) + 5
    assert split(big * 3 + 2, 3) == (big, 2)
    assert split(big + 7, big) == (1, 7)
    assert split(17, 5) == (3, 2)
    assert place(big * 6 + 4, 100, (big, 2, 3), (8, 1, 10)) == 100 + big * 8 + 1 + 10


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 4, 1), (1, 1, 6), (3, 1, 6), (1, 1, 1), (3, 4, 6)], ids=str)
@pytest.mark.parametrize("few", [{}, {"blocks": 1}, {"max_chunks": 2}, {"vectors": 4}], ids=str)
def test_sums_of_any_cut(few, shape):
    """Of as many chunks and threads as there are, and of arrays that do not lie as they are counted."""
    thresholds = Thresholds(threads=8, columns=4, **{"vectors": 1, **few})
    rng = np.random.default_rng(0)
    x, dz = rng.normal(size=(2, 3, 4, 6)).astype(np.float32)
    saved = rng.uniform(0.5, 2, (9, 4))
    a, b = device(np.ones(shape, np.float32)), device(np.ones(6, np.float32))
    for order in ((0, 1, 2), (0, 2, 1)):
        back = np.argsort(order)
        there = [moving.transposed(device(v.transpose(order).copy()), v.transpose(order).shape, back) for v in (x, dz)]
        batch = Batch(layout(x.shape, (1,)), there[0], Operands(a=a, b=b))
        found = adjustment.gradients(batch, there[1], device(saved), thresholds)
        mean, rstd, r, d, gamma = saved[[1, 4, 5, 6, 7]][:, None, :, None]
        terms = dz * gamma * ((x - mean) * rstd * r + d), dz * gamma
        for one, term, kept in zip(found, terms, (shape, (1, 1, 6)), strict=True):
            axes = tuple(i for i in range(3) if kept[i] == 1)
            expected = term.sum(axis=axes).reshape(one.shape)
            np.testing.assert_allclose(PLACE.to_host(one), expected, rtol=1e-6, atol=1e-6)
