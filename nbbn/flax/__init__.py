"""Batch normalization for Flax: `linen.BatchNorm`, which is also `BatchNorm`, and `nnx.BatchNorm`.

They stand in the place of Flax's own modules: its arguments, its names of parameters and statistics, and nbbn's options
as further keyword arguments.
"""

from nbbn.flax import linen, nnx
from nbbn.flax.linen import BatchNorm

__all__ = ["BatchNorm", "linen", "nnx"]
