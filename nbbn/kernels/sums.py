"""What one element adds to the sums of its statistic. The caller chooses the precision of the values."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from nbbn.core import rules


def functions(compiled: Callable[[Any], Any], rules: Any = rules) -> SimpleNamespace:
    """The functions, for the target whose decorator `compiled` is, and whose rules these are. None stands for an
    operand that is not there."""

    @compiled
    def moment_terms(centered, weight):
        """To sum w (x - origin), sum w (x - origin)^2, sum w and sum w^2, of x - origin and w of one precision; the
        last two only with weights."""
        if weight is None:
            return centered, centered * centered, None, None
        centered = rules.drop(weight <= 0, centered)  # what does not count may be NaN
        return weight * centered, weight * centered * centered, weight, weight * weight

    @compiled
    def gradient_terms(g, x, mean, a, b, weight):
        """To sum g a, sum g a (x - mean), sum g and sum g b; the last two only where there are a and b."""
        centered = x - mean
        if weight is not None:
            left_out = rules.is_left_out(x, weight)
            g, centered = rules.drop(left_out, g), rules.drop(left_out, centered)
            if a is not None:
                a, b = rules.drop(left_out, a), rules.drop(left_out, b)
        if a is None:
            return g, g * centered, None, None
        return g * a, g * a * centered, g, g * b

    return SimpleNamespace(moment_terms=moment_terms, gradient_terms=gradient_terms)
