"""The middle stage on a GPU: a thread has one channel, in all groups."""

import numpy as np

from nbbn.core import rules
from nbbn.kernels import channel
from nbbn.kernels.channel import MOMENT_ROWS
from nbbn.kernels.cuda.blocks import combine_moments
from nbbn.kernels.cuda.target import cuda, device

_stage = channel.functions(device)
add_group, update, save = _stage.add_group, _stage.update, _stage.save
freeze, output_coefficients = _stage.freeze, _stage.output_coefficients
add_parameter_gradients, statistic_gradient = _stage.add_parameter_gradients, _stage.input_coefficients


# Chunks whose sums are on their way before the first of them is added: a load takes some hundreds of clock cycles, and
# the whole step waits for the last block. Chunks are added in their order. Moments have four rows: with more of them on
# their way some GPUs' multiprocessors would not have registers for two blocks.
AHEAD, MOMENTS_AHEAD = 4, 2


@device
def add_chunks(s, partial, first, last, step):
    """Add up the sums of a statistic in every `step`-th chunk from the first to before the last, in the place of the
    first one's."""
    loaded = cuda.local.array(AHEAD, np.float64)
    for row in range(partial.shape[1]):
        total, chunk = partial[first, row, s], first + step
        while chunk + (AHEAD - 1) * step < last:
            for i in range(AHEAD):
                loaded[i] = partial[chunk + i * step, row, s]
            for i in range(AHEAD):
                total += loaded[i]
            chunk += AHEAD * step
        while chunk < last:
            total += partial[chunk, row, s]
            chunk += step
        partial[first, row, s] = total


@device
def combine_chunks(s, partial, first, last, step):
    """The same for moments."""
    loaded = cuda.local.array((MOMENT_ROWS, MOMENTS_AHEAD), np.float64)
    total = cuda.local.array((MOMENT_ROWS, 1), np.float64)
    for row in range(MOMENT_ROWS):
        total[row, 0] = partial[first, row, s]
    chunk = first + step
    while chunk + (MOMENTS_AHEAD - 1) * step < last:
        for row in range(MOMENT_ROWS):
            for i in range(MOMENTS_AHEAD):
                loaded[row, i] = partial[chunk + i * step, row, s]
        for i in range(MOMENTS_AHEAD):
            combine_moments(total, 0, loaded, i)
        chunk += MOMENTS_AHEAD * step
    while chunk < last:
        combine_moments(total, 0, partial[chunk], s)
        chunk += step
    for row in range(MOMENT_ROWS):
        partial[first, row, s] = total[row, 0]


@device
def train(c, params, state, hyper, a, renorm, debias, skip, new_state, saved, coefficients):
    """From moments to the new state, what the gradient needs, and the coefficients of the output."""
    present, mean, variance, channels = 0.0, 0.0, 0.0, params.shape[1]
    s = c
    while s < saved.shape[1]:
        n, squares = saved[channel.COUNT, s], saved[channel.SQUARES, s]
        present, mean, variance = add_group(s, n, squares, saved, hyper[channel.BESSEL], present, mean, variance)
        s += channels
    r, d = update(c, present, mean, variance, state, hyper, renorm, debias, skip, new_state)
    s = c
    while s < saved.shape[1]:
        own = rules.per(saved[channel.M2, s], saved[channel.COUNT, s])
        save(s, c, rules.reciprocal_stddev(own, hyper[channel.EPSILON]), r, d, params, saved)
        output_coefficients(s, s, saved, a, coefficients)
        s += channels


@device
def parameter_gradients(c, sums, saved, adjusted, dparams):
    """Write the gradients of gamma and beta."""
    dgamma, dbeta = 0.0, 0.0
    s = c
    while s < saved.shape[1]:
        dgamma, dbeta = add_parameter_gradients(s, sums, saved, adjusted, dgamma, dbeta)
        s += dparams.shape[1]
    dparams[channel.GAMMA, c] = dgamma
    dparams[channel.BETA, c] = dbeta


@device
def input_coefficients(c, channels, sums, saved, coefficients):
    """Write mean, scale, bias and slope of dx."""
    s = c
    while s < saved.shape[1]:
        statistic_gradient(s, sums, saved, coefficients)
        s += channels
