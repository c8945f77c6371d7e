"""The TensorFlow 1 faces: import nbbn.compat.v1 as tf1, then tf1.layers.batch_normalization(...)."""

from nbbn.compat.v1 import keras, layers
from nbbn.compat.v1.graph import AUTO_REUSE, GraphKeys, get_collection, reset_default_graph, variable_scope

__all__ = [
    "AUTO_REUSE",
    "GraphKeys",
    "get_collection",
    "keras",
    "layers",
    "reset_default_graph",
    "variable_scope",
]
