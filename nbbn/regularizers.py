"""Penalties on gamma and beta and their gradients: Keras's names, parameters and defaults."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from nbbn._registry import KERAS, Configurable, Registry, defined_by, floating, number

Array = npt.NDArray[Any]


class Regularizer(Configurable, ABC):
    """Base class: `regularizer(w)` is the penalty, `regularizer.gradient(w)` its derivative.

    w is an array of any shape and of a floating dtype.
    """

    @abstractmethod
    def __call__(self, w: npt.ArrayLike) -> float:
        """The penalty."""

    @abstractmethod
    def gradient(self, w: npt.ArrayLike) -> Array:
        """d penalty / d w, shape and dtype of w."""


class L1L2(Regularizer):
    """l1 * sum |w| + l2 * sum w^2, whose gradient is l1 * sign(w) + 2 * l2 * w, with sign(0) = 0.

    Computed in float64. As in Keras the class's defaults are 0 and 0, those of the name "l1_l2" are 0.01.
    """

    def __init__(self, l1: float = 0.0, l2: float = 0.0) -> None:
        self.l1 = number("l1", l1)
        self.l2 = number("l2", l2)

    def __call__(self, w: npt.ArrayLike) -> float:
        w = floating(w).astype(np.float64)
        # A factor of 0 leaves its term out: 0 * inf would be NaN.
        absolute = self.l1 * np.abs(w).sum() if self.l1 else 0.0
        squares = self.l2 * np.square(w).sum() if self.l2 else 0.0
        return float(absolute + squares)

    def gradient(self, w: npt.ArrayLike) -> Array:
        w = floating(w)
        wide = w.astype(np.float64)
        slope = self.l1 * np.sign(wide) + (2 * self.l2 * wide if self.l2 else 0.0)
        return np.asarray(slope).astype(w.dtype)


# A factor that a name does not mention is 0 for good, so the formulas above serve all three.
class L1(L1L2):
    """l1 * sum |w|."""

    def __init__(self, l1: float = 0.01) -> None:
        super().__init__(l1=l1)


class L2(L1L2):
    """l2 * sum w^2."""

    def __init__(self, l2: float = 0.01) -> None:
        super().__init__(l2=l2)


# Keras exports the classes under these names as well, and configs use either.
l1 = L1
l2 = L2


def l1_l2(l1: float = 0.01, l2: float = 0.01) -> L1L2:
    """L1L2 with the defaults that Keras has always given to this name."""
    return L1L2(l1, l2)


_REGISTRY = Registry("regularizer", Regularizer, vars(), {"l1_l2": l1_l2, "l1l2": L1L2}, optional=True)
get, serialize = _REGISTRY.get, _REGISTRY.serialize


def loss(regularizer: Callable[..., Any], w: npt.ArrayLike, argument: str = "regularizer") -> float:
    """The penalty of any regularizer, converted from what its framework returns.

    argument: what an error message calls it.

    Raises: ValueError if the result is not a scalar, TypeError if it is no real number.
    """
    value = np.asarray(_native(regularizer)(w))
    if value.shape != ():
        raise ValueError(f"{argument} {regularizer!r} must return a scalar, received shape {value.shape}.")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{argument} {regularizer!r} must return a real number, received {value.item()!r}.") from error


def gradient(regularizer: Callable[..., Any], w: npt.ArrayLike, argument: str = "regularizer") -> Array:
    """d penalty / d w of any regularizer whose gradient is known.

    Args:
        regularizer: an object with a method gradient(w), or Keras's own L1, L2 or L1L2.
        w: an array of a floating dtype.
        argument: what an error message calls the regularizer.
    Returns: an array, shape and dtype of w.
    Raises: TypeError if there is no way to know the gradient; ValueError if it does not have the shape of w.
    """
    native, w = _native(regularizer), floating(w)
    method = getattr(native, "gradient", None)
    if not callable(method):
        raise TypeError(
            f"{argument} must be L1, L2, L1L2 or have a method gradient(w) that returns d penalty / d w "
            f"as an array of the shape of w, received {regularizer!r}."
        )
    slope = np.asarray(method(w))
    if slope.shape != w.shape:
        raise ValueError(
            f"gradient(w) of {argument} {regularizer!r} must have the shape {w.shape} of w, "
            f"received shape {slope.shape}."
        )
    return slope.astype(w.dtype)


def _native(regularizer: Callable[..., Any]) -> Callable[..., Any]:
    """nbbn's equal of Keras's own L1, L2 or L1L2, else the object itself."""
    kind = type(regularizer)  # told by its names, so that Keras is not imported
    if kind.__name__ in ("L1", "L2", "L1L2") and defined_by(kind.__module__, KERAS):
        regularizer = _REGISTRY.get(_REGISTRY.serialize(regularizer))
    return regularizer
