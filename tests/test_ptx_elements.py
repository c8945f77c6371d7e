"""The machine code of the kernels for elements of any dtype and strides, as far as it can be read without a GPU."""

import os
import re
from importlib.util import find_spec

import numpy as np
import pytest
from ml_dtypes import bfloat16

if find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (extra: cuda)", allow_module_level=True)
if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("Numba's simulator compiles nothing", allow_module_level=True)

from nbbn.engine.cuda.schedule import Thresholds
from nbbn.kernels.cuda import broadcast, strided
from tests.helpers.ptx import innermost, loops, ptx_of, resources

CC = (9, 0)
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def copied(source, target, rank):
    return strided.copy(np.dtype(source), np.dtype(target), rank)


def summed(name, dtype, rank, weights=None, rows=True):
    return broadcast.sums(name, np.dtype(dtype), weights, FLOAT32, rows, Thresholds().threads, (rank, rank))


CASES = {
    **{
        f"copy {np.dtype(source).name} to {np.dtype(target).name}, {rank} dimensions": copied(source, target, rank)
        for source, target, rank in (
            (np.uint16, np.uint16, 1),
            (np.uint64, np.uint64, 4),
            (np.bool_, np.float32, 2),
            (np.int64, np.float32, 1),
            (np.float16, np.float64, 3),
            (np.float64, bfloat16, 2),
            (np.int32, np.int64, 1),
        )
    },
    **{
        f"sum {name} {np.dtype(dtype).name}, {rank} dimensions": summed(name, dtype, rank, weights, rows)
        for name, dtype, rank, weights, rows in (
            ("scale", np.float16, 1, None, True),
            ("scale", bfloat16, 2, FLOAT32, False),
            ("scale", np.float64, 4, FLOAT64, True),
            ("bias", np.float32, 2, None, False),
            ("value", np.float64, 1, None, True),
        )
    },
    "add": strided.add(FLOAT32),
    "first_steps": strided.first_steps(FLOAT32),
    "numbers": strided.numbers(8),
}


def compiled(kernel):
    return ptx_of(kernel.build(), kernel.signature, CC)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_registers_alone(case):
    """The digits of an index, and the strides that they are multiplied with, are registers."""
    ptx = compiled(case)
    assert not re.search(r"\.local\b", ptx)
    found = resources(ptx, CC)
    assert (found.stack, found.local) == (0, 0)
    assert found.registers * Thresholds().threads * 2 <= 1 << 16


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_nothing_depends_on_the_order_of_threads(case):
    assert not re.search(r"\b(atom|red)\.", compiled(case))


@pytest.mark.parametrize("case", [copied(np.uint8, np.float32, 1), summed("scale", np.float32, 1)])
def test_dimensions_that_follow_each_other_are_not_divided(case):
    """Where nothing is left to be merged, an element costs no division."""
    inner = [loop for loop in innermost(loops(compiled(case))) if loop.count(r"ld\.global")]
    assert inner
    assert not any(loop.count(r"(div|rem)\.[su](32|64)") for loop in inner)


def test_a_float16_of_a_float64_is_rounded_once():
    """And a bfloat16 twice, as ml_dtypes does it."""
    assert "cvt.rn.f16.f64" in compiled(copied(np.float64, np.float16, 1))
    assert "cvt.rn.f32.f64" in compiled(copied(np.float64, bfloat16, 1))
