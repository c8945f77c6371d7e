"""The modules for the libraries whose arrays nbbn takes, and what it sees of those in the host's memory.

A library is imported by whoever has an array of it: nobody else is asked to.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol, cast

import numpy as np

from nbbn.arrays import availability

# Where the class of an array, or a base of it, is defined, and the module for it.
_MODULES = {"torch": "torch", "cupy": "cupy", "jax": "jax", "jaxlib": "jax", "numba.cuda": "numba_cuda"}
_ON_THE_HOST = ("torch", "jax")  # those that have arrays there


@lru_cache(maxsize=256)
def module_of(kind: type) -> str | None:
    """The name of the module for an array's class, which load() takes; None for all other classes."""
    modules = [base.__module__ + "." for base in kind.__mro__]
    return next((a for m in modules for root, a in _MODULES.items() if m.startswith(root + ".")), None)


@lru_cache(maxsize=16)
def load(name: str) -> Any:
    """The module of a library. Each import is written out, for those who look for them without running anything."""
    found: Any
    if name == "torch":
        from nbbn.arrays import torch as found
    elif name == "cupy":
        from nbbn.arrays import cupy as found
    elif name == "jax":
        from nbbn.arrays import jax as found
    elif name == "numba_cuda":
        from nbbn.arrays import numba_cuda as found
    else:  # needs Numba's CUDA target to read what is there
        availability.require("an array on a GPU")
        from nbbn.arrays import interface as found
    return found


class HostLibrary(Protocol):
    """What a module does for its library's arrays in the host's memory. `array` is one of these."""

    def is_host_array(self, value: Any) -> bool: ...

    def view(self, array: Any) -> np.ndarray:
        """The same memory as NumPy sees it. Raises: ValueError where a result would lack what the library expects."""

    def giver(self, array: Any) -> Callable[[np.ndarray], Any]:
        """What makes an array of the library of a NumPy array, a result where `array` is the input. It may be that
        array's memory, which nobody else has."""

    def to_host(self, array: Any) -> np.ndarray:
        """Its values alone: not for what has to be differentiated."""


def find_on_host(value: Any) -> HostLibrary | None:
    """The module for the library of an array in the host's memory; None for anything else, NumPy's arrays too."""
    name = module_of(type(value))  # type: ignore[arg-type]  # a type is hashable
    if name not in _ON_THE_HOST:
        return None
    library = cast(HostLibrary, load(name))
    return library if library.is_host_array(value) else None


def view(value: Any) -> Any:
    """NumPy's view of an array of another library in the host's memory; all else as it is."""
    if type(value) is np.ndarray or value is None:
        return value
    library = find_on_host(value)
    return value if library is None else library.view(value)


def giver(value: Any) -> Callable[[np.ndarray], Any] | None:
    """For an input: what makes its library's arrays of NumPy's results; None where results stay as they are."""
    library = find_on_host(value)
    return None if library is None else library.giver(value)
