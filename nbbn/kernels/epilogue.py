"""One element of the output with all that follows the normalization, and what its activation lets through backward.

Compiled without fast math, forward and backward alike: both must see the same sign.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from nbbn.core import rules


def functions(compiled: Callable[[Any], Any], rules: Any = rules) -> SimpleNamespace:
    """The functions, for the target whose decorator `compiled` is, and whose rules these are."""

    @compiled
    def output(x, mean, scale, shift, a, b, gamma, beta, residual, relu):
        """relu((x_hat * a + b) * gamma + beta + residual), without what is None."""
        z = rules.output(x, mean, scale, shift, a, b, gamma, beta, residual)
        return z if relu is None else rules.relu(z)

    @compiled
    def gradient(dy, x, mean, scale, shift, a, b, gamma, beta, residual, relu):
        """The gradient of what output() gives to its activation."""
        if relu is None:
            return dy
        return rules.relu_gradient(dy, rules.output(x, mean, scale, shift, a, b, gamma, beta, residual))

    return SimpleNamespace(output=output, gradient=gradient)
