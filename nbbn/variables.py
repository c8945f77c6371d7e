"""The arrays that a layer owns, and how they change while other threads read them.

gamma and beta are changed in place, by whoever trains. The moving statistics are replaced all at once by one
assignment: a reader takes the reference and has a consistent set, without a lock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbbn import rules
from nbbn.layout import Sizes
from nbbn.operands import check_real
from nbbn.options import Options
from nbbn.runtime import StateLock

Array = np.ndarray

PARAMETERS = ("gamma", "beta")
PARTS = ("mean", "variance")
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
        self.seen = np.zeros((2, channels), np.int64)  # batches in each channel's moving mean, variance
        self.lock = StateLock()

    def __getitem__(self, name: str) -> Array:
        """The variable in TensorFlow's shape: a view."""
        row: Array = self.params[PARAMETERS.index(name)] if name in PARAMETERS else self.state[STATISTICS.index(name)]
        return row.reshape(self.shapes.params)

    def on_host(self) -> "Variables":
        """These variables, or a copy, as NumPy arrays."""
        return self

    def check(self, name: str, value: Any) -> Array:
        """A copy of `value` in the variables' dtype. Raises: ValueError, TypeError if it does not fit."""
        array = np.asarray(value)
        if array.shape != self.shapes.params:
            raise ValueError(f"{name} must have shape {self.shapes.params}; received {array.shape}")
        check_real(array, name)
        return array.astype(self.shapes.dtype)

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

    def absorb(self, batch: Array, counted: Array, parts: Sequence[str], options: Options) -> None:
        """Blend a batch's own statistics into the moving ones. The caller holds the lock.

        Args:
            batch: as `state`: what the statistics are when the batch is all there is.
            counted: (C,) bool: the channels of which the batch has any value.
            parts: "mean" and / or "variance", with what belongs to it.
        """
        state, all_seen = self.state.copy(), self.seen.copy()
        renorm = len(state) == len(STATISTICS)
        for part in parts:
            seen = all_seen[PARTS.index(part)]
            spread = "stddev" if renorm and part == "variance" else part
            momentum = seen / (seen + 1) if options.momentum is None else options.momentum
            _blend(state, batch, f"moving_{spread}", momentum, counted)
            if renorm:
                _blend(state, batch, f"renorm_{spread}", options.renorm_momentum, counted)
            if spread == "stddev":
                sigma = state[STATISTICS.index("moving_stddev"), counted].astype(np.float64)
                state[STATISTICS.index("moving_variance"), counted] = np.maximum(sigma * sigma - options.epsilon, 0)
            seen += counted
        self.state, self.seen = state, all_seen  # no interrupt comes between


def _blend(state: Array, batch: Array, name: str, momentum: Any, counted: Array) -> None:
    """Move one row of `state` towards that of `batch`; momentum may differ between channels."""
    old, new = state[STATISTICS.index(name)], batch[STATISTICS.index(name)].astype(np.float64)
    momenta = np.broadcast_to(momentum, old.shape)
    for m in np.unique(momenta[counted]):
        chosen = counted & (momenta == m)
        old[chosen] = rules.moving_average(old[chosen].astype(np.float64), new[chosen], m)
