"""A layer's arrays in a GPU's memory."""

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, cast

import numpy as np

from nbbn.gpu.arrays import DeviceArray, Library, find_library, wrap
from nbbn.options import Options
from nbbn.variables import PARAMETERS, STATISTICS, Array, Variables


class DeviceVariables(Variables):
    """The same arrays, `params`, `state` and `seen`, as DeviceArrays of the library that made the layer's first input.

    They stay where they are: training writes the new state over the old one, so that a stream is the order of the calls
    and a captured graph can be run again. Whatever else changes or reads them goes by way of the host, and waits.
    """

    params: DeviceArray  # type: ignore[assignment]
    state: DeviceArray  # type: ignore[assignment]
    seen: DeviceArray  # type: ignore[assignment]  # float64, for kernels

    def __init__(self, host: Variables, library: Library, device: int) -> None:
        self.shapes, self.names, self.lock = host.shapes, host.names, host.lock
        self.library, self.device = library, device
        arrays = (host.params, host.state, host.seen.astype(np.float64))
        self.params, self.state, self.seen = (wrap(library.from_host(a, device), library) for a in arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.on_host(), cast(ModuleType, self.library).__name__, self.device)

    def __getitem__(self, name: str) -> Any:
        """The variable in TensorFlow's shape: an array of the library, a view where it has views."""
        whole, names = (self.params, PARAMETERS) if name in PARAMETERS else (self.state, STATISTICS)
        return whole.owner[names.index(name)].reshape(self.shapes.params)

    def on_host(self) -> Variables:
        """A copy, in NumPy arrays."""
        copy = object.__new__(Variables)
        copy.shapes, copy.names, copy.lock = self.shapes, self.names, type(self.lock)()
        copy.params, copy.state = (np.array(self.library.to_host(a.owner)) for a in (self.params, self.state))
        copy.seen = self.library.to_host(self.seen.owner).astype(np.int64)
        return copy

    def check(self, name: str, value: Any) -> Array:
        return super().check(name, to_host(value))

    def assign(self, values: Mapping[str, Array]) -> None:
        with self.lock:
            host = self.on_host()
            host.assign(values)
            if set(values) & set(PARAMETERS):
                self.write(self.params, host.params)
            if set(values) & set(STATISTICS):
                self.write(self.state, host.state)

    def absorb(self, batch: Any, counted: Array, parts: Sequence[str], options: Options) -> None:
        host = self.on_host()
        host.absorb(to_host(batch.owner), counted, parts, options)
        self.write(self.state, host.state)
        self.write(self.seen, host.seen)

    def write(self, target: DeviceArray, values: Array) -> None:
        """Replace what is in one of the arrays, in its place."""
        value = self.library.from_host(np.ascontiguousarray(values, target.dtype), self.device)
        self.library.assign(target, target.shape, tuple(range(target.ndim)), value)


def _restored(host: Variables, library: str, device: int) -> DeviceVariables:
    return DeviceVariables(host, cast(Library, importlib.import_module(library)), device)


def to_host(value: Any) -> Any:
    """An array on a GPU as a NumPy array; anything else as it is."""
    library = None if isinstance(value, np.ndarray) else find_library(value)
    return value if library is None else library.to_host(value)
