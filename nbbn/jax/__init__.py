"""Batch normalization in JAX: on a CPU the compiled kernels, called by the program itself."""

from nbbn.jax.norm import batch_norm, initial_state

__all__ = ["batch_norm", "initial_state"]
