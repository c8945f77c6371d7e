"""Calls that are checked bit by bit, for the processes of test_harmless.py and for those that they start."""

import zlib

import numpy as np

import nbbn
from nbbn.runtime import parallel_region
from tests.helpers.concurrency import in_threads

X = np.random.default_rng(0).normal(size=(2048, 128)).astype(np.float32)
layer = nbbn.BatchNormalization()
nbbn.force(layer, parallel=True)  # whatever the threading layer costs, its dangers are what is tested
expected = layer(X, training=True, update_statistics=False)
_mean, _variance = X.mean(0, np.float64), X.var(0, np.float64)
# float32 holds 24 bits, and a few operations on numbers below 8 lose less than 3 of them.
np.testing.assert_allclose(expected, (X - _mean) / np.sqrt(_variance + layer.epsilon), rtol=0, atol=2**-20)


def is_parallel():
    """Whether this thread, now, would get the pool, and X is large enough for it."""
    with parallel_region() as granted:
        return granted and nbbn.explain(layer, X, training=True).schedule.parallel


def work(times=20):
    """Raises if any result differs in a bit. Returns a number that must be the same in every process."""
    for _ in range(times):
        y = layer(X, training=True, update_statistics=False)
        if not np.array_equal(y, expected):
            raise ArithmeticError(f"{np.sum(y != expected)} of {y.size} values are wrong")
    return zlib.crc32(y)


def work_in_threads(count=8, times=20):
    in_threads([lambda: work(times)] * count)


def train():
    """A training call changes the statistics."""
    before = layer.moving_mean.copy()
    layer(X, training=True)
    assert not np.array_equal(before, layer.moving_mean)
