"""tf.compat.v1.keras."""

from nbbn.compat.v1.keras import layers

__all__ = ["layers"]
