"""The arrays that a layer owns, where they lie, and how they change while other threads read them.

On the host, gamma and beta are changed in place, by whoever trains; the statistics are replaced all at once by one
assignment: a reader takes the reference and has a consistent set, without a lock. On a GPU everything is changed in
its place: there, a stream is the order of the calls, and a captured graph can be run again.
"""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from nbbn.arrays import HOST, Array, Place, as_numpy
from nbbn.runtime import StateLock
from nbbn.state.shapes import Shapes

PARAMETERS = ("gamma", "beta")
STATISTICS = ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
# Of debiased averages: the weight of the batches that are in each channel's mean and variance, with equal weights
# (momentum=None) their number. TensorFlow has no such options, and so no such variables.
COUNTS = ("seen_mean", "seen_variance")
# What an update of the mean, or of the variance, is about.
PARTS = {
    "mean": ("moving_mean", "renorm_mean", "seen_mean"),
    "variance": ("moving_variance", "moving_stddev", "renorm_stddev", "seen_variance"),
}
# What is never negative, and the mean that belongs to it.
SPREADS = {"moving_variance": "moving_mean", "moving_stddev": "moving_mean", "renorm_stddev": "renorm_mean"}


def check_spreads(values: Mapping[str, np.ndarray]) -> None:
    """Raises: ValueError for a variance or deviation among `values` that is negative, or NaN where its mean is finite,
    and for a weight of batches that is negative or not finite.

    Training on NaN or inf leaves a mean that is not finite, and such a state can be set again.
    """
    for name, mean in SPREADS.items():
        if name in values:
            spread = values[name]
            bad = spread[(spread < 0) | (np.isnan(spread) & np.isfinite(values[mean]))]
            if bad.size:
                raise ValueError(f"{name} must not be negative, nor NaN where {mean} is finite; received {bad[0]}")
    for name in COUNTS:
        bad = values[name][~(np.isfinite(values[name]) & (values[name] >= 0))] if name in values else np.empty(0)
        if bad.size:
            raise ValueError(f"{name} must be finite and not negative; received {bad[0]}")


def state_names(renorm: bool, debias: bool) -> tuple[str, ...]:
    """The rows of the state, in their order."""
    return (STATISTICS if renorm else STATISTICS[:2]) + (COUNTS if debias else ())


class Variables:
    """Parameters (2, C) [gamma, beta] and the state, whose rows are STATISTICS, two or with renorm five, and COUNTS.

    names: those that exist for the user, in TensorFlow's order; gamma is all ones, beta all zeros where they do not.
    rows: those of the state.
    """

    def __init__(self, shapes: Shapes, values: Mapping[str, np.ndarray]) -> None:
        self.shapes, self.dtype = shapes, shapes.dtype
        self.place: Place = HOST
        self.names = tuple(n for n in (*PARAMETERS, *STATISTICS, *COUNTS) if n in values)
        self.rows = tuple(n for n in self.names if n not in PARAMETERS)
        channels = int(np.prod(shapes.params))
        absent = {"gamma": np.ones(channels, shapes.dtype), "beta": np.zeros(channels, shapes.dtype)}
        self.params: Array = np.stack([values.get(n, absent[n]).ravel() for n in PARAMETERS])
        self.state: Array = np.stack([values[n].ravel() for n in self.rows])
        self.lock = StateLock()

    def __getitem__(self, name: str) -> Any:
        """The variable in TensorFlow's shape: an array of the place's library, a view where it has views."""
        whole, names = (self.params, PARAMETERS) if name in PARAMETERS else (self.state, self.rows)
        return self.place.row(whole, names.index(name), self.shapes.params)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "params": self.place.to_host(self.params), "state": self.place.to_host(self.state)}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        self.params, self.state = self.place.from_host(self.params), self.place.from_host(self.state)

    def moved(self, place: Place) -> Self:
        """These variables in another place, by way of the host. They share the lock."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.place = place
        # What a library brings to the host can be read-only, or its own.
        copy.params, copy.state = (place.from_host(np.array(self.place.to_host(a))) for a in (self.params, self.state))
        return copy

    def on_host(self) -> Self:
        """These variables, or a copy, as NumPy arrays."""
        return self if self.place is HOST else self.moved(HOST)

    def values(self) -> dict[str, np.ndarray]:
        """Copies of all variables, on the host; those of the state are of one moment."""
        copy = self.moved(HOST)
        return {name: copy[name].copy() for name in self.names}

    def check(self, name: str, value: Any, argument: str | None = None) -> np.ndarray:
        """A copy of `value` in the variables' dtype, on the host. argument: what a message calls it, if not `name`.

        Raises: ValueError, TypeError if it does not fit.
        """
        argument = argument or name
        array = as_numpy(value, argument)
        if array.shape != self.shapes.params:
            raise ValueError(f"{argument} must have shape {self.shapes.params}; received {array.shape}")
        if name in STATISTICS:  # as kernels store them, rules.saturate()
            most = np.finfo(self.dtype).max
            array = np.where(np.isfinite(array), np.clip(array, -most, most), array)
        return array.astype(self.dtype)

    def assign(self, values: Mapping[str, np.ndarray]) -> None:
        """Set variables from checked arrays; the statistics among them change together.

        Raises: ValueError as check_spreads().
        """
        with self.lock:
            host = self.on_host()
            check_spreads({name: host[name] for name in SPREADS.values() if name in self.names} | dict(values))
            state = np.array(host.state)
            for name, value in values.items():
                if name in PARAMETERS:
                    host.params[PARAMETERS.index(name)] = value.ravel()
                else:
                    state[self.rows.index(name)] = value.ravel()
            if host is not self and set(values) & set(PARAMETERS):
                self.place.write(self.params, self.place.from_host(host.params), self.params.shape, (0, 1))
            if set(values) - set(PARAMETERS):
                self.keep(self.place.from_host(state))

    def keep(self, state: Array) -> None:
        """Make this state the layer's. The caller holds the lock."""
        if self.place is HOST:
            fits = state.dtype is self.dtype and state.flags.c_contiguous  # as kernels take it
            self.state = state if fits else np.ascontiguousarray(state, self.dtype)
        elif state is not self.state:
            self.place.write(self.state, self.place.astype(state, self.dtype), self.state.shape, (0, 1))

    def keep_part(self, state: Array, part: str) -> None:
        """Make the rows of one of PARTS of this state the layer's. The caller holds the lock."""
        target = self.state.copy() if self.place is HOST else self.state  # what others may be reading does not change
        for row, name in enumerate(self.rows):
            if name in PARTS[part]:
                self.place.put(self.place.cut(target, slice(row, row + 1)), self.place.cut(state, slice(row, row + 1)))
        self.keep(target)
