"""Warns of every public name that no page of the reference describes."""

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

import nbbn
import nbbn.compat.v1
import nbbn.numba


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True}


def check(app: Sphinx, env: Any) -> None:
    described = env.domaindata["py"]["objects"]
    modules = {"nbbn": nbbn, "nbbn.compat.v1": nbbn.compat.v1, "nbbn.numba": nbbn.numba}
    exported = {name: value for path, module in modules.items() for name, value in exports(module, path)}
    # A class may have a second name, which is described as such.
    classes = {path: value for path, value in exported.items() if isinstance(value, type)}
    paths = {value: path for path, value in classes.items() if path.endswith(f".{value.__name__}")}
    missing = [path for path in exported if path not in described]
    for cls in paths:
        # A member may be described where a public base has it.
        bases = [paths[base] for base in inspect.getmro(cls) if base in paths]
        missing += [f"{bases[0]}.{m}" for m in members(cls) if not any(f"{b}.{m}" in described for b in bases)]
    for path in missing:
        logging.getLogger(__name__).warning("the reference lacks %s", path)


def exports(module: ModuleType, path: str) -> Iterator[tuple[str, Any]]:
    """What a module and its public modules export: __all__, else what they define."""
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
