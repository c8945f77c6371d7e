"""A kernel before it is compiled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Kernel:
    """name, dtypes: for those who read what is compiled. choices: all that is compiled in, by which it is told from
    others of this name. signature: of its arguments. build: makes the function of Python.

    Whoever makes one keeps it: there is one for each that differs.
    """

    name: str
    dtypes: str
    choices: tuple[Any, ...]
    signature: Any
    build: Callable[[], Callable[..., None]]
