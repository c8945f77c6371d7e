"""What TensorFlow 1 kept in its default graph: variable scopes, variables by name, collections.

Variables and collections belong to the process, the stack of open scopes to the thread.
"""

import enum
import itertools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nbbn.compat.v1.loops import Loops
from nbbn.runtime import StateLock
from nbbn.state.variables import Variables


class AutoReuse(enum.Enum):
    """The value of `reuse` that creates what does not exist and reuses what does."""

    AUTO_REUSE = enum.auto()

    def __repr__(self) -> str:
        return self.name


AUTO_REUSE = AutoReuse.AUTO_REUSE

Reuse = bool | AutoReuse | None


class GraphKeys:
    """The names of the collections that batch normalization fills."""

    GLOBAL_VARIABLES = "variables"
    TRAINABLE_VARIABLES = "trainable_variables"
    UPDATE_OPS = "update_ops"
    REGULARIZATION_LOSSES = "regularization_losses"


@dataclass(frozen=True)
class Variable:
    """One weight under its TensorFlow name, such as "bn/gamma:0"."""

    name: str
    owner: Variables = field(repr=False)

    @property
    def _key(self) -> str:
        return self.name.rpartition("/")[2].removesuffix(":0")

    def numpy(self) -> Any:
        """A copy of the value."""
        return self.owner[self._key].copy()

    def assign(self, value: Any) -> None:
        """Set the value. Raises: ValueError if its shape is not the variable's."""
        self.owner.assign({self._key: self.owner.check(self._key, value, self.name)})

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.numpy(), dtype)


@dataclass
class Scope:
    """A variable scope. `used`: the names of scopes in it since it was opened; none once it is closed."""

    name: str
    reuse: Reuse
    used: set[str] = field(default_factory=set)

    def unique(self, base: str) -> str:
        """The first of base, base_1, base_2, … that is not used."""
        names = itertools.chain([base], (f"{base}_{n}" for n in itertools.count(1)))
        return next(name for name in names if name not in self.used)

    def reuse_variables(self) -> None:
        """From here on variables of this scope are reused."""
        self.reuse = True

    def join(self, name: str) -> str:
        return f"{self.name}/{name}" if self.name else name


class Graph:
    def __init__(self) -> None:
        self.lock = StateLock()
        self.variables: dict[str, Variables] = {}  # by the name of the scope that holds them
        self.collections: dict[str, list[Any]] = {}
        self.loops = Loops()
        self.layer_names = Scope("", False)
        self._root = Scope("", False)
        self._thread = threading.local()

    @property
    def scopes(self) -> list[Scope]:
        if not hasattr(self._thread, "scopes"):
            self._thread.scopes = [self._root]
        scopes: list[Scope] = self._thread.scopes
        return scopes


_graph = Graph()


def default_graph() -> Graph:
    return _graph


def reset_default_graph() -> None:
    """Forget all variables, collections and names.

    Raises: AssertionError inside an open variable scope, as in TensorFlow.
    """
    global _graph
    if len(_graph.scopes) > 1:
        raise AssertionError(f"reset_default_graph() inside the variable scope {_graph.scopes[-1].name!r}")
    _graph = Graph()


@contextmanager
def variable_scope(
    name_or_scope: str | Scope | None, default_name: str | None = None, reuse: Reuse = None
) -> Iterator[Scope]:
    """Open a variable scope: variables created inside are named and shared under it.

    Args:
        name_or_scope: the name inside the current scope, or a scope to enter again. None takes `default_name`, made
            unique.
        reuse: True reuses variables, AUTO_REUSE creates or reuses; None and False take the enclosing scope's choice.
    Raises: TypeError without any name, ValueError for a choice of reuse with only a default name.
    """
    if reuse not in (None, True, False) and reuse is not AUTO_REUSE:
        raise ValueError(f"reuse must be True, False, None or AUTO_REUSE; received {reuse!r}")
    scopes = default_graph().scopes
    outer = scopes[-1]
    if name_or_scope is None:
        if default_name is None:
            raise TypeError("variable_scope() needs name_or_scope or default_name; received neither")
        if reuse:
            raise ValueError(f"reuse={reuse!r} needs a name; received only default_name={default_name!r}")
        with default_graph().lock:  # threads share the outermost scope
            name = outer.unique(default_name)
            outer.used.add(name)
        inner = Scope(outer.join(name), outer.reuse)
    elif isinstance(name_or_scope, Scope):
        inner = Scope(name_or_scope.name, reuse or name_or_scope.reuse, set(name_or_scope.used))
    else:
        outer.used.add(name_or_scope)
        inner = Scope(outer.join(name_or_scope), reuse or outer.reuse)
    scopes.append(inner)
    try:
        yield inner
    finally:
        scopes.pop().used.clear()


def get_variable_scope() -> Scope:
    """The scope that is open here: its `name` ("" for the outermost), `reuse` and `reuse_variables()`."""
    return default_graph().scopes[-1]


def add_to_collection(name: str, value: Any) -> None:
    """Put `value` into the collection `name`. What is put into UPDATE_OPS should have run(), as an Update does."""
    graph = default_graph()
    with graph.lock:
        graph.collections.setdefault(name, []).append(value)


def get_collection(key: str, scope: str | None = None) -> list[Any]:
    """The members of a collection; with `scope`, those whose name begins with a match of that regular expression.

    UPDATE_OPS holds the updates that have not been run, REGULARIZATION_LOSSES the losses' values now.
    """
    graph = default_graph()
    with graph.lock:
        members = graph.collections.get(key, [])
        if key == GraphKeys.UPDATE_OPS:
            members[:] = [m for m in members if not getattr(m, "done", False)]
        found = [m for m in members if scope is None or (hasattr(m, "name") and re.match(scope, m.name))]
    if key == GraphKeys.REGULARIZATION_LOSSES:
        return [m() if callable(m) else m for m in found]
    return found


def global_variables(scope: str | None = None) -> list[Variable]:
    """All variables, in the order of their creation; with `scope`, as in get_collection()."""
    return get_collection(GraphKeys.GLOBAL_VARIABLES, scope)


def trainable_variables(scope: str | None = None) -> list[Variable]:
    """The gammas and betas of the layers that are trainable; with `scope`, as in get_collection()."""
    return get_collection(GraphKeys.TRAINABLE_VARIABLES, scope)
