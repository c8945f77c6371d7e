"""Warns of every public name that no page of the reference describes."""

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

# What users import; modules that these export are public, too. The frameworks under them: frameworks.py.
MODULES = ("nbbn", "nbbn.compat.v1", "nbbn.flax", "nbbn.jax", "nbbn.keras", "nbbn.numba", "nbbn.torch")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True}


def check(app: Sphinx, env: Any) -> None:
    described = env.domaindata["py"]["objects"]
    exported = {name: value for path in MODULES for name, value in exports(importlib.import_module(path), path)}
    # A class may have a second name, which is described as such.
    classes = {path: value for path, value in exported.items() if isinstance(value, type)}
    paths = {value: path for path, value in classes.items() if path.endswith(f".{value.__name__}")}
    missing = [path for path in exported if path not in described]
    for cls in paths:
        # A member may be described where a base has it, by the base's public name or by the one of its module.
        names = [n for base in inspect.getmro(cls) for n in (paths.get(base), f"{base.__module__}.{base.__qualname__}")]
        missing += [f"{paths[cls]}.{m}" for m in members(cls) if not any(f"{n}.{m}" in described for n in names)]
    for path in missing:
        logging.getLogger(__name__).warning("the reference lacks %s", path)


def exports(module: ModuleType, path: str) -> Iterator[tuple[str, Any]]:
    """A module, and what it and its public modules export: __all__, else what they define."""
    yield path, module
    exported = getattr(module, "__all__", None)
    for name, value in list(vars(module).items()):
        if name.startswith("_") or not (is_from(value, module.__name__) if exported is None else name in exported):
            continue
        if isinstance(value, ModuleType):
            yield from exports(value, f"{path}.{name}")
        else:
            yield f"{path}.{name}", value


def members(cls: type) -> set[str]:
    return {n for base in inspect.getmro(cls) if is_from(base, "nbbn") for n in vars(base) if not n.startswith("_")}


def is_from(value: Any, module: str) -> bool:
    """Whether a class or function is defined in a module, or in a module of a package."""
    return f"{getattr(value, '__module__', None)}.".startswith(f"{module}.")
