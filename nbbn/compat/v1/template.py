"""tf.make_template: a function whose variables are made by its first call and reused by all later ones."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from nbbn.compat.v1.graph import (
    AUTO_REUSE,
    Reuse,
    Scope,
    Variable,
    global_variables,
    trainable_variables,
    variable_scope,
)
from nbbn.runtime import StateLock


class Template:
    """What make_template() returns: call it like the function that it was given.

    Attributes: name, func: as given. variable_scope: the scope of the variables, None before it is opened.
    """

    def __init__(self, name: str, func: Callable[..., Any], create_scope_now: bool, unique_name: str | None) -> None:
        self.name, self.func, self._unique_name = name, func, unique_name
        self.variable_scope: Scope | None = None
        self._reuse: Reuse = False  # of the next call
        self._making = StateLock()
        if create_scope_now:
            with self._open() as self.variable_scope:
                pass

    def _open(self) -> AbstractContextManager[Scope]:
        if self.variable_scope is None:
            return variable_scope(self._unique_name, self.name)
        return variable_scope(self.variable_scope, reuse=self._reuse)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns. Raises: what it raises; ValueError if a later call needs new variables."""
        if self._reuse is True:
            with self._open():
                return self.func(*args, **kwargs)
        with self._making, self._open() as scope:  # one thread makes the variables, others wait for them
            self.variable_scope = self.variable_scope or scope
            known = len(self.variables)
            try:
                result = self.func(*args, **kwargs)
            except BaseException:
                if len(self.variables) > known:
                    self._reuse = AUTO_REUSE  # the next call takes up what this one has made, and makes the rest
                raise
            self._reuse = True
            return result

    def _own(self, find: Callable[[str], list[Variable]]) -> list[Variable]:
        return [] if self.variable_scope is None else find(f"{re.escape(self.variable_scope.name)}/")

    @property
    def variables(self) -> list[Variable]:
        """The variables in its scope, in the order of their creation."""
        return self._own(global_variables)

    @property
    def trainable_variables(self) -> list[Variable]:
        """Those of them that are trainable."""
        return self._own(trainable_variables)

    global_variables = variables


def make_template(
    name_: str,
    func_: Callable[..., Any],
    create_scope_now_: bool = False,
    unique_name_: str | None = None,
    **kwargs: Any,
) -> Template:
    """`func_` with variables of its own: its first call makes them, later calls reuse them.

        def network(x, training):
            h = layers.batch_normalization(x @ w1, training=training)
            return layers.batch_normalization(np.maximum(h, 0) @ w2, training=training)

        run = make_template("network", network)
        run(batch, training=True)   # in each step of a loop
        run(x, training=False)      # the same variables

    Inside, layers need neither name nor reuse; but every call must ask for the same ones, in the same order.

    Args:
        name_: of the variable scope in which `func_` runs, made unique.
        func_: any function. What it returns is what the template returns.
        create_scope_now_: open the scope here, and not where the template is called first.
        unique_name_: takes the place of `name_`, and is not made unique.
        kwargs: further arguments of `func_`.
    Raises: ValueError without a name, TypeError if `func_` cannot be called.
    """
    if name_ is None:
        raise ValueError("make_template() needs name_; received None")
    if not callable(func_):
        raise TypeError(f"func_ must be a function; received {func_!r}")
    return Template(name_, partial(func_, **kwargs) if kwargs else func_, create_scope_now_, unique_name_)
