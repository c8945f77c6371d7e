"""A layer that takes the short way, and a copy of it that never does."""

import pickle

import numpy as np

from tests.helpers.engines import forgetful


def twin_of(layer):
    """A copy that never takes the short way."""
    return forgetful(pickle.loads(pickle.dumps(layer)))


def assert_same_bits(one, two):
    for y, z in zip(one, two, strict=True):
        assert (y.dtype, y.shape) == (z.dtype, z.shape)
        assert y.tobytes() == z.tobytes()


def check_gradients(layer, twin, xs, added, general, twins):
    def pull(one, x, dy, **more):
        y, pullback = one.vjp(x, training=True, **added)
        return y, *(g for g in pullback(dy, **more) if g is not None)

    pull(layer, xs[0], xs[2])
    general.clear(), twins.clear()
    out = np.empty_like(xs[0])
    for more in ({}, {"out": out}):
        twin._variables.state = layer._variables.state.copy()
        found, expected = pull(layer, xs[1], xs[2], **more), pull(twin, xs[1], xs[2])
        assert_same_bits(found, expected)
    assert found[1] is out
    assert (general, twins) == ([], ["train", "backward"] * 2)
    assert_same_bits(layer.get_weights(), twin.get_weights())
