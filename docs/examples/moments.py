"""Mean and variance of a file that no memory holds, by several processes: python docs/examples/moments.py"""

import multiprocessing
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

import nbbn

ROWS, COLUMNS, PARTS = 200_000, 16, 4


def open_data(path, mode="r"):
    return np.memmap(path, np.float32, mode, shape=(ROWS, COLUMNS))


def measure(path, part, piece=8192):
    """The moments of one part of the file, a piece at a time. They are small, and travel back by pickle."""
    moments = nbbn.Moments()
    x = open_data(path)
    for start in range(part * ROWS // PARTS, (part + 1) * ROWS // PARTS, piece):
        moments.update(x[start : min(start + piece, (part + 1) * ROWS // PARTS)])
    return moments


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        x = open_data(path, "w+")
        x[:] = np.random.default_rng(0).normal(1000, 1, x.shape)
        x.flush()
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            moments = sum(pool.imap(partial(measure, path), range(PARTS)), nbbn.Moments())  # in their order
        right = np.allclose(moments.variance(), x.var(axis=0, dtype=np.float64), rtol=1e-12)
        right &= np.allclose(moments.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-12)
        print(f"{ROWS} rows in {PARTS} parts: mean and variance of NumPy in float64: {right}")
        print(f"float32 is off by {abs(x.var(axis=0) / moments.variance() - 1).max():.0e}")
