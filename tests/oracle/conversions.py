"""All values of a 16-bit float, and all places where rounding to one changes: against NumPy and ml_dtypes."""

from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def check_every_value(conversion: Any) -> None:
    """Reading is exact for all 65,536 values, and writing what was read gives them back."""
    stored = np.arange(1 << 16, dtype=np.uint16).view(conversion.dtype)
    values = conversion.read(stored)
    expected = stored.astype(np.float32)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(np.signbit(values), np.signbit(expected))
    numbers = ~np.isnan(expected)
    written = conversion.write(values)
    np.testing.assert_array_equal(written[numbers].view(np.uint16), stored[numbers].view(np.uint16))
    assert np.isnan(written[~numbers].astype(np.float32)).all(), "a NaN became a number"


def check_rounding(conversion: Any) -> None:
    """Writing is round to nearest even: at every value, halfway to the next one, and just beside both."""
    infinity = int(np.array(np.inf, conversion.dtype).view(np.uint16))
    finite = np.arange(infinity, dtype=np.uint16).view(conversion.dtype).astype(np.float64)
    halfway = np.append((finite[:-1] + finite[1:]) / 2, finite[-1] + (finite[-1] - finite[-2]) / 2)
    exact = np.concatenate([finite, halfway]).astype(np.float32)
    near = np.concatenate([exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf))])
    special = np.array([np.inf, np.nan, np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal], np.float32)
    # NaNs whose payload lies in bits that are cut off, or that rounding would carry over
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0x7FFF8000, 0x7F80FFFF], np.uint32).view(np.float32)
    values = np.concatenate([near, special, nans])
    values = np.concatenate([values, -values])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(conversion.dtype)
    written = conversion.write(values)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(written[numbers].view(np.uint16), expected[numbers].view(np.uint16))
    assert np.isnan(written[~numbers].astype(np.float32)).all(), "a NaN became a number"
