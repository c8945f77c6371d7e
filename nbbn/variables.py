"""The arrays that a layer owns, and how they change while other threads read them.

gamma and beta are changed in place, by whoever trains. The moving statistics are replaced all at once by one
assignment: a reader takes the reference and has a consistent set, without a lock.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbbn.layout import Sizes
from nbbn.runtime import StateLock

Array = np.ndarray

PARAMETERS = ("gamma", "beta")
STATISTICS = ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")


@dataclass(frozen=True)
class Shapes:
    """What build() fixed: the input's rank and feature dimensions, and the parameters' shape and dtype."""

    rank: int
    features: Mapping[int, int]
    params: Sizes
    dtype: np.dtype

    def check_input(self, shape: Sizes) -> None:
        """Raises: ValueError if an input of this shape is not what the layer was built for."""
        if len(shape) == self.rank and all(shape[a] == size for a, size in self.features.items()):
            return
        expected = ", ".join(str(self.features.get(i, "any")) for i in range(self.rank))
        raise ValueError(f"inputs must have the shape ({expected}) that the layer was built for; received {shape}")


class Variables:
    """Parameters (2, C) [gamma, beta] and statistics (2, C) or, with renorm, (5, C), in the order of STATISTICS.

    names: those that exist for the user, in TensorFlow's order; gamma is all ones, beta all zeros where they do not.
    """

    def __init__(self, shapes: Shapes, values: Mapping[str, Array]) -> None:
        self.shapes = shapes
        self.names = tuple(n for n in (*PARAMETERS, *STATISTICS) if n in values)
        channels = int(np.prod(shapes.params))
        absent = {"gamma": np.ones(channels, shapes.dtype), "beta": np.zeros(channels, shapes.dtype)}
        self.params = np.stack([values.get(n, absent[n]).ravel() for n in PARAMETERS])
        self.state = np.stack([values[n].ravel() for n in STATISTICS if n in values])
        self.training_calls = 0
        self.lock = StateLock()

    def __getitem__(self, name: str) -> Array:
        """The variable in TensorFlow's shape: a view."""
        row: Array = self.params[PARAMETERS.index(name)] if name in PARAMETERS else self.state[STATISTICS.index(name)]
        return row.reshape(self.shapes.params)

    def check(self, name: str, value: Any) -> Array:
        """`value` in the variables' dtype. Raises: ValueError if its shape is not theirs."""
        array = np.asarray(value, self.shapes.dtype)
        if array.shape != self.shapes.params:
            raise ValueError(f"{name} must have shape {self.shapes.params}; received {array.shape}")
        return array

    def assign(self, values: Mapping[str, Array]) -> None:
        """Set variables from checked arrays; the statistics among them change together."""
        with self.lock:
            state = self.state.copy()
            for name, value in values.items():
                if name in PARAMETERS:
                    self.params[PARAMETERS.index(name)] = value.ravel()
                else:
                    state[STATISTICS.index(name)] = value.ravel()
            self.state = state

    def replace_state(self, state: Array) -> None:
        """The statistics after one more training call. The caller holds the lock."""
        self.state = state.astype(self.shapes.dtype, copy=False)
        self.training_calls += 1
