"""Layers from and to other libraries, of which none is needed for what is a dict of arrays.

Each `from_` function makes a built layer, on the host, with the weights and statistics of one layer of the other
library; `name` says which, where there are several. Options that the weights do not tell (momentum, epsilon, …) are the
other library's defaults, in nbbn's terms, unless they are given as arguments of BatchNormalization. `ndim` is the
inputs' rank, which weights of one value per channel do not tell either.

Each `to_` function takes a built layer. What inference needs is always there, but for options, which are not weights;
statistics for which the other library has no name (those of renorm outside TensorFlow and Keras) are left out.
"""

from nbbn.exchange.dicts import (
    from_flax,
    from_haiku,
    from_tensorflow,
    from_torch,
    to_flax,
    to_haiku,
    to_tensorflow,
    to_torch,
)
from nbbn.exchange.keras import from_keras, to_keras
from nbbn.exchange.onnx import from_onnx, to_onnx

__all__ = [
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_onnx",
    "from_tensorflow",
    "from_torch",
    "to_flax",
    "to_haiku",
    "to_keras",
    "to_onnx",
    "to_tensorflow",
    "to_torch",
]
