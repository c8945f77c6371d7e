"""nbbn.keras against Keras's layer, on the backend of PyTorch."""

import os
from collections.abc import Iterator

from benchmarks.frameworks.cases import Case


def cases(quick: bool) -> Iterator[Case]:
    """As those of keras_cases. Keras reads the backend's name when it is imported."""
    os.environ["KERAS_BACKEND"] = "torch"
    from benchmarks.frameworks import keras_cases

    return keras_cases.cases(quick, 1.0)
