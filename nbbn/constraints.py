"""Projections of gamma and beta after an optimizer's step: Keras's names, formulas and defaults."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nbbn._registry import Configurable, Registry, floating, integers, number

Array = npt.NDArray[Any]
Axis = int | Sequence[int] | None

EPSILON = 1e-7  # keras.backend.epsilon()


class Constraint(Configurable, ABC):
    """Base class: `constraint(w)` is a new array, shape and dtype of w, which must be floating."""

    @abstractmethod
    def __call__(self, w: npt.ArrayLike) -> Array:
        """The projected w."""


class NonNeg(Constraint):
    """max(w, 0); NaN stays NaN."""

    def __call__(self, w: npt.ArrayLike) -> Array:
        w = floating(w)
        return np.asarray(np.maximum(w, np.zeros((), w.dtype)))


class _NormConstraint(Constraint):
    """w * desired(norm) / (1e-7 + norm), norm being the Euclidean one along `axis`, computed in float64."""

    axis: int | list[int] | None

    @abstractmethod
    def desired(self, norm: Array) -> Array:
        """What the norm is to become."""

    def __call__(self, w: npt.ArrayLike) -> Array:
        w = floating(w)
        wide = w.astype(np.float64)
        axis = tuple(self.axis) if isinstance(self.axis, list) else self.axis
        norm = np.sqrt(np.square(wide).sum(axis=axis, keepdims=True))
        return np.asarray(wide * (self.desired(norm) / (EPSILON + norm))).astype(w.dtype)


class MaxNorm(_NormConstraint):
    """Norms are at most max_value.

    Args:
        max_value: a number >= 0.
        axis: an integer, several, or None for all: the axes that one norm runs over.
    """

    def __init__(self, max_value: float = 2.0, axis: Axis = 0) -> None:
        self.max_value = number("max_value", max_value, low=0, finite=False)
        self.axis = _as_axis(axis)

    def desired(self, norm: Array) -> Array:
        return np.minimum(norm, self.max_value)


class UnitNorm(_NormConstraint):
    """Norms are 1; one that is 0 stays 0.

    Args:
        axis: an integer, several, or None for all: the axes that one norm runs over.
    """

    def __init__(self, axis: Axis = 0) -> None:
        self.axis = _as_axis(axis)

    def desired(self, norm: Array) -> Array:
        return np.ones_like(norm)


class MinMaxNorm(_NormConstraint):
    """Norms move towards [min_value, max_value]: rate * clip(norm) + (1 - rate) * norm.

    Args:
        min_value, max_value: numbers, 0 <= min_value <= max_value.
        rate: a number; 1 enforces the bounds at once.
        axis: an integer, several, or None for all: the axes that one norm runs over.
    """

    def __init__(self, min_value: float = 0.0, max_value: float = 1.0, rate: float = 1.0, axis: Axis = 0) -> None:
        self.min_value = number("min_value", min_value, low=0)
        self.max_value = number("max_value", max_value, low=self.min_value, finite=False)
        self.rate = number("rate", rate)
        self.axis = _as_axis(axis)

    def desired(self, norm: Array) -> Array:
        return self.rate * np.clip(norm, self.min_value, self.max_value) + (1 - self.rate) * norm


def _as_axis(axis: Axis) -> int | list[int] | None:
    if axis is None:
        return None
    return int(axis) if isinstance(axis, int | np.integer) else integers("axis", axis)


# Keras exports every class under this name as well, and configs use either.
max_norm = MaxNorm
non_neg = NonNeg
unit_norm = UnitNorm
min_max_norm = MinMaxNorm

_ALIASES = {"maxnorm": MaxNorm, "nonneg": NonNeg, "unitnorm": UnitNorm}
_REGISTRY = Registry("constraint", Constraint, vars(), _ALIASES, optional=True)
get, serialize = _REGISTRY.get, _REGISTRY.serialize


def project(constraint: Callable[..., Any], w: npt.ArrayLike, argument: str = "constraint") -> Array:
    """What any constraint makes of w, converted from what its framework returns.

    argument: what an error message calls it.

    Returns: an array, shape and dtype of w.
    Raises: ValueError if the constraint returns another shape.
    """
    w = floating(w)
    projected = np.asarray(constraint(w))
    if projected.shape != w.shape:
        raise ValueError(
            f"{argument} {constraint!r} must return the shape {w.shape} of w, received shape {projected.shape}."
        )
    return projected.astype(w.dtype)
