"""Batch normalization for Keras 3: Keras's layer with all of nbbn's options, on each of its backends."""

from nbbn.keras.layer import BatchNormalization

__all__ = ["BatchNormalization"]
