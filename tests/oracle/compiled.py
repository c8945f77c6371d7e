"""Which kernels the layer's tests compile, and which they only try where kernels are interpreted.

Each combination of a dtype, the order of memory and what stands beside an element is a kernel of its own, and compiling
it takes a second. All are one text, to which each operand adds its own lines: so compiled tests see every
pair of options, and each option in planes and in rows. With NUMBA_DISABLE_JIT=1 the same tests compile nothing, and
see all combinations; .ci/run does both.

Tests of what lies above the kernels take those that others compile: of float32, without a mask or an adjustment.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
from ml_dtypes import bfloat16

from nbbn.runtime import PLAIN as INTERPRETED


class Variant(NamedTuple):
    """What the kernels of a layer's calls are made for, beside planes or rows."""

    dtype: Any
    renorm: bool
    masked: bool
    adjusted: bool
    strided: bool


EVERY_VARIANT = [
    Variant(dtype, *flags)
    for dtype in (np.float16, bfloat16, np.float32, np.float64)
    for flags in itertools.product((False, True), repeat=4)
]
# Every pair of two columns has all its values, and each value is in planes and in rows.
PLANES = [
    Variant(np.float32, False, False, False, False),
    Variant(np.float16, False, True, False, True),
    Variant(bfloat16, False, False, True, True),
    Variant(np.float64, True, False, False, True),
]
ROWS = [
    Variant(np.float32, True, True, True, True),
    Variant(np.float16, True, False, True, False),
    Variant(bfloat16, True, True, False, False),
    Variant(np.float64, False, True, True, False),
]
# Of random configurations: each dtype, and each option. Those of ROWS are drawn with the last axis: their kernels have
# one schedule.
VARIANTS = EVERY_VARIANT if INTERPRETED else [PLANES[0], *ROWS[1:3], PLANES[3]]


# Of random configurations that try what lies above the kernels.
DTYPES = [np.float16, bfloat16, np.float32, np.float64] if INTERPRETED else [np.float32]


def variants_of(dtype: Any, planes: bool) -> list[Variant]:
    """Of configurations that are chosen."""
    chosen = EVERY_VARIANT if INTERPRETED else PLANES if planes else ROWS
    return [v for v in chosen if v.dtype is dtype]


def interpreted(*values: Any) -> list[Any]:
    """`values` where kernels are interpreted, and nothing where each of them would be compiled."""
    return list(values) if INTERPRETED else []


def interpreted_unless(compiled: bool) -> None:
    """Skip a test whose kernels only it would compile; where they are interpreted it runs."""
    if not (compiled or INTERPRETED):
        pytest.skip("these operands are compiled in other tests, in other combinations: this one is only interpreted")
