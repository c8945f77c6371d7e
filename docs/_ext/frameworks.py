"""Stands in for the frameworks, without which the pages are built, so that nbbn's modules for them can be imported.

What such a module imports is a name and nothing else: as a decorator it changes nothing, and a subclass of it has what
it defines itself. Sphinx's own autodoc_mock_imports does not do: `Tensor | None` is an error there, and subclasses lose
their signatures.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any, Union

FRAMEWORKS = ("flax", "jax", "keras", "torch")
ANSWERS = {"keras.backend.backend": "numpy"}  # of what is called when a module is imported


def setup(app: Any) -> dict[str, bool]:
    sys.meta_path.insert(0, Finder())
    return {"parallel_read_safe": True}


class Finder:
    """Finds them, also where they are installed: the pages are the same everywhere."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in FRAMEWORKS else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return attribute(self.__name__, name)


class Name:
    def __init__(self, module: str, name: str) -> None:
        self.__module__, self.__name__, self.__qualname__ = module, name, name

    def __repr__(self) -> str:
        return f"{self.__module__}.{self.__name__}"

    def __getattr__(self, name: str) -> Any:
        return attribute(repr(self), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        decorates = len(args) == 1 and not kwargs and isinstance(args[0], (type, FunctionType))
        return args[0] if decorates else ANSWERS.get(repr(self), self)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type]:
        return (type(self.__name__, (), {"__module__": self.__module__}),)

    def __setitem__(self, key: Any, value: Any) -> None:
        """A table in which something is registered."""

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007  # which is what this operator is for classes


def attribute(module: str, name: str) -> Name:
    if name.startswith("__"):
        raise AttributeError(name)
    return Name(module, name)
