"""Batch normalization for Python arrays, complete and fast."""

from nbbn import constraints, initializers, nn, regularizers
from nbbn.dispatcher import Dispatcher, Force
from nbbn.folding import fold_into
from nbbn.inspection import explain, force
from nbbn.layers import BatchNormalization
from nbbn.options import Options
from nbbn.pullback import Gradients
from nbbn.warming import warmup

__version__ = "0.1.0"

__all__ = [
    "BatchNormalization",
    "Dispatcher",
    "Force",
    "Gradients",
    "Options",
    "constraints",
    "explain",
    "fold_into",
    "force",
    "initializers",
    "nn",
    "regularizers",
    "warmup",
]
