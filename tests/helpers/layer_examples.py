"""A layer whose every weight is known, and arrays for it."""

import numpy as np

from nbbn import BatchNormalization

RNG = np.random.default_rng(0)
X = RNG.normal(2, 3, size=(8, 3)).astype(np.float32)
DY = RNG.normal(size=(8, 3)).astype(np.float32)


def trained(**options):
    """A layer whose every weight differs from its initial value."""
    layer = BatchNormalization(**{"momentum": 0.5, **options})
    layer(X, training=True)
    layer.gamma[...] = [1, 2, 3]
    layer.beta[...] = [4, 5, 6]
    return layer


def assert_same_weights(one, two):
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def batches(count):
    return [np.random.default_rng(i).normal(i, 1 + i, size=(8, 3)).astype(np.float32) for i in range(count)]


def gradients_of(pullback):
    return [np.array(g) for g in pullback(DY)[:3]]


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
