"""More elements than 32 bits can count. float16 keeps it to 6 GB for each array."""

import pytest

import nbbn

NEEDED = 32 << 30  # bytes: x, y, dx, one more of their size, and room
PIECE = 1 << 26
# 3e9 elements and a few: planes, of one channel and of several, and rows
SHAPES = {
    "planes": ((3, 2, 500_000_006), 1),
    "one plane": ((1, 1, 3_000_000_008), 1),
    "rows": ((46_875_001, 64), -1),
    "few columns": ((1_000_000_003, 3), -1),
}


@pytest.fixture
def memory(torch):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free memory; there are {free >> 30}")
    yield
    torch.cuda.empty_cache()


def moments(x, axis):
    """Mean and biased variance of the first channels in float64, piece by piece."""
    found = []
    for c in range(min(3, x.shape[axis])):
        column = x.select(axis, c).reshape(-1)
        mean = sum(p.double().sum() for p in column.split(PIECE)) / column.numel()
        found.append((mean, sum(((p.double() - mean) ** 2).sum() for p in column.split(PIECE)) / column.numel()))
    return found


@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
def test_more_than_31_bits_of_elements(torch, memory, shape, axis):
    x = torch.empty(shape, dtype=torch.float16, device="cuda").normal_(1.0, 2.0)
    assert x.numel() > 2**31
    layer = nbbn.BatchNormalization(axis, momentum=0.0, epsilon=1e-3, bessel_correction=False)
    y, pullback = layer.vjp(x, training=True)
    expected = moments(x, axis)
    _, _, mean, variance = layer.get_weights()
    for c, (m, v) in enumerate(expected):
        assert mean[c] == pytest.approx(float(m), rel=1e-6, abs=1e-6)  # float32's rounding
        assert variance[c] == pytest.approx(float(v), rel=1e-6)
    flat_x, flat_y = x.reshape(-1), y.reshape(-1)
    size = x.numel()
    for begin in (0, 2**31 - 512, size - 1024):
        _check_piece(torch, flat_x[begin : begin + 1024], flat_y[begin : begin + 1024], begin, shape, axis, expected)
    # And between these pieces: nothing that would move the mean.
    for c in range(len(expected)):
        column = y.select(axis, c).reshape(-1)
        assert abs(float(column.sum(dtype=torch.float64)) / column.numel()) < 1e-3
    dx = pullback(y).inputs  # y has no part of its own gradient: dx is 0 but for epsilon and float16's rounding
    assert float(dx.abs().max()) < 0.02
    del x, y, dx, pullback


def _check_piece(torch, x, y, begin, shape, axis, expected):
    """Elements in a row, of the channels whose moments are known. float16: half a unit of 8 at most."""
    at = torch.arange(begin, begin + x.numel(), device="cuda")
    channels = at % shape[-1] if axis == -1 else at // shape[2] % shape[1]
    for c, (mean, variance) in enumerate(expected):
        chosen = channels == c
        right = (x[chosen].double() - mean) / (variance + 1e-3).sqrt()
        torch.testing.assert_close(y[chosen].double(), right, rtol=2**-11, atol=1e-5)
