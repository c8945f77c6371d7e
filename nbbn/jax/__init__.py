"""Batch normalization in JAX: the kernels of the CPU or of a GPU, called by the program itself."""

from nbbn.jax.norm import batch_norm, initial_state

__all__ = ["batch_norm", "initial_state"]
