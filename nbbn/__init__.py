"""Batch normalization for Python arrays, complete and fast."""

from nbbn import constraints, initializers, nn, regularizers
from nbbn.dispatcher import Dispatcher, Force
from nbbn.layers import BatchNormalization, Gradients, explain, force
from nbbn.options import Options

__version__ = "0.1.0"

__all__ = [
    "BatchNormalization",
    "Dispatcher",
    "Force",
    "Gradients",
    "Options",
    "constraints",
    "explain",
    "force",
    "initializers",
    "nn",
    "regularizers",
]
