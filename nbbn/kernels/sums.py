"""What one element adds to the sums of its statistic. The caller chooses the precision of the values."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from nbbn.core import rules


def functions(compiled: Callable[[Any], Any]) -> SimpleNamespace:
    """The functions, for the target whose decorator `compiled` is. None stands for an operand that is not there."""

    @compiled
    def moment_terms(x, origin, weight):
        """To sum w (x - origin), sum w (x - origin)^2, sum w and sum w^2; the last two only with weights."""
        centered = x - origin
        if weight is None:
            return centered, centered * centered, type(centered)(1), type(centered)(1)
        centered = centered if weight > 0 else type(centered)(0)  # what does not count may be NaN
        weight = type(centered)(weight)
        return weight * centered, weight * centered * centered, weight, weight * weight

    @compiled
    def gradient_terms(g, x, mean, a, b, weight):
        """To sum g a, sum g a (x - mean), sum g and sum g b; the last two only where there are a and b."""
        if weight is not None and not rules.counts(x, weight):
            zero = type(g)(0)
            return zero, zero, zero, zero
        if a is None:
            return g, g * (x - mean), type(g)(0), type(g)(0)
        return g * a, g * a * (x - mean), g, g * b

    return SimpleNamespace(moment_terms=moment_terms, gradient_terms=gradient_terms)
