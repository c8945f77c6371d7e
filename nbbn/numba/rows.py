"""Parameters and moving statistics in compiled functions, as kernels take them."""

from typing import Any

import numpy as np
from numba import types
from numba.np import numpy_support

from nbbn.kernels import channel
from nbbn.numba.arrays import helper
from nbbn.numba.checks import is_absent, statistic
from nbbn.numba.intrinsics import beside


def are_rows(*kinds: Any) -> bool:
    """Whether kernels can take them where they lie."""
    return all(isinstance(k, types.Array) and k.layout == "C" for k in kinds)


@helper
def params_of(gamma, beta, channels, x):
    """gamma and beta as kernels take them."""
    if are_rows(gamma, beta):
        return lambda gamma, beta, channels, x: beside(gamma, beta)
    dtype = numpy_support.as_dtype(statistic(x))

    def packed(gamma, beta, channels, x):
        found = np.empty((2, channels), dtype)
        for c in range(channels):
            found[channel.GAMMA, c] = 1 if gamma is None else gamma[c]
            found[channel.BETA, c] = 0 if beta is None else beta[c]
        return found

    return packed


@helper
def state_of(mean, variance, renorm, channels, x):
    """The moving statistics as kernels take them: in their place where that is possible."""
    if is_absent(renorm) and are_rows(mean, variance):
        return lambda mean, variance, renorm, channels, x: beside(mean, variance)
    dtype = numpy_support.as_dtype(statistic(x) if is_absent(mean) else mean.dtype)
    if is_absent(mean):
        return lambda mean, variance, renorm, channels, x: np.ones((2, channels), dtype)
    rows = 2 if is_absent(renorm) else 5

    def packed(mean, variance, renorm, channels, x):
        found = np.empty((rows, channels), dtype)
        for c in range(channels):
            found[channel.MEAN, c], found[channel.VARIANCE, c] = mean[c], variance[c]
            if renorm is not None:
                found[channel.STDDEV, c], found[channel.RENORM_MEAN, c] = renorm[0][c], renorm[1][c]
                found[channel.RENORM_STDDEV, c] = renorm[2][c]
        return found

    return packed


@helper
def update(mean, variance, renorm, state):
    """Write a new state to where it belongs, if it is not there."""
    if is_absent(mean) or (is_absent(renorm) and are_rows(mean, variance)):
        return lambda mean, variance, renorm, state: None

    def unpacked(mean, variance, renorm, state):
        for c in range(state.shape[1]):
            mean[c], variance[c] = state[channel.MEAN, c], state[channel.VARIANCE, c]
            if renorm is not None:
                renorm[0][c], renorm[1][c] = state[channel.STDDEV, c], state[channel.RENORM_MEAN, c]
                renorm[2][c] = state[channel.RENORM_STDDEV, c]

    return unpacked
