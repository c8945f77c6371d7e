"""What the tests of the TensorFlow 1 faces share: arrays, and what the graph holds."""

import numpy as np

import nbbn.compat.v1 as tf1
from nbbn.compat.v1 import GraphKeys, get_collection

bn = tf1.layers.batch_normalization
X = np.random.default_rng(0).normal(2, 3, size=(8, 3)).astype(np.float32)
X2 = np.random.default_rng(1).normal(-1, 2, size=(8, 3)).astype(np.float32)


def names(key=GraphKeys.GLOBAL_VARIABLES, scope=None):
    return [v.name for v in get_collection(key, scope)]


def scopes():
    """The scopes that hold variables, in the order of their creation."""
    return [name.removesuffix("/gamma:0") for name in names() if name.endswith("/gamma:0")]


def values():
    return {v.name: v.numpy() for v in get_collection(GraphKeys.GLOBAL_VARIABLES)}


def run_updates():
    for update in get_collection(GraphKeys.UPDATE_OPS):
        update.run()
