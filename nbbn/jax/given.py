"""What a training call is given, and what it is about."""

from typing import Any, NamedTuple

from nbbn.core.layout import Layout
from nbbn.core.options import Options
from nbbn.jax.steps import Steps


class Config(NamedTuple):
    """What is the same in every run of a program. shared: the names of mapped axes that share statistics, and the
    groups of their indices that do so among themselves, as all_gather takes them. has_gradient: whether it is the
    forward pass of a gradient."""

    steps: Steps
    shared: tuple[Any, Any] | None = None
    has_gradient: bool = False

    def layout(self, x: Any) -> Layout:
        return self.steps.dispatcher.layout(x.shape, training=True)

    @property
    def options(self) -> Options:
        return self.steps.dispatcher.options

    @property
    def names(self) -> frozenset[Any]:
        """The axes that share statistics."""
        names = () if self.shared is None else self.shared[0]
        return frozenset(names if isinstance(names, tuple) else (names,))

    def by_stages(self, x: Any) -> bool:
        """Whether the stages run one by one: statistics are shared, or the batch has parts."""
        return self.shared is not None or bool(self.layout(x).parts)


class Constants(NamedTuple):
    """What has no derivative beside the input. state: rows. hyper: as it crosses. weights broadcast against the
    input."""

    state: tuple[Any, ...]
    hyper: Any
    weights: Any = None


class Operands(NamedTuple):
    """What has one. params: gamma and beta, (C,). residual: like x. a, b: of an adjustment."""

    x: Any
    params: tuple[Any, Any]
    residual: Any = None
    a: Any = None
    b: Any = None
