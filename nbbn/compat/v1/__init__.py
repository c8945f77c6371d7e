"""The TensorFlow 1 faces: import nbbn.compat.v1 as tf1, then tf1.layers.batch_normalization(...)."""

from nbbn.compat.v1 import keras, layers
from nbbn.compat.v1.graph import (
    AUTO_REUSE,
    GraphKeys,
    add_to_collection,
    get_collection,
    get_variable_scope,
    global_variables,
    reset_default_graph,
    trainable_variables,
    variable_scope,
)
from nbbn.compat.v1.template import make_template

__all__ = [
    "AUTO_REUSE",
    "GraphKeys",
    "add_to_collection",
    "get_collection",
    "get_variable_scope",
    "global_variables",
    "keras",
    "layers",
    "make_template",
    "reset_default_graph",
    "trainable_variables",
    "variable_scope",
]
