"""Batch normalization for functions that Numba compiles: in `@njit`, in loops and in `prange`."""

from nbbn.numba.functions import batch_norm_backward, batch_norm_infer, batch_norm_train
from nbbn.runtime import PLAIN

if not PLAIN:  # where nothing is compiled, functions in Python are all there is
    from nbbn.numba import overloads  # noqa: F401

__all__ = ["batch_norm_backward", "batch_norm_infer", "batch_norm_train"]
