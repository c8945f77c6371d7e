"""The middle stage on a GPU: what a thread does for one statistic, and for one channel.

What all others of a block wait for is short, and done for all statistics at once: numbers go from the sums to the
coefficients without a way through memory, where each costs some hundreds of clock cycles. The moving statistics, for
which nobody waits, come after.
"""

import numpy as np

from nbbn.core import rules
from nbbn.kernels import channel
from nbbn.kernels.channel import MOMENT_ROWS, SAVED_ROWS
from nbbn.kernels.cuda.blocks import combine_moments
from nbbn.kernels.cuda.target import cuda, device

_stage = channel.functions(device)
group_variance, add_group, update, save = _stage.group_variance, _stage.add_group, _stage.update, _stage.save
freeze, output_coefficients = _stage.freeze, _stage.output_coefficients
add_parameter_gradients, input_coefficients = _stage.add_parameter_gradients, _stage.input_coefficients


# Chunks whose sums are on their way before the first of them is added: a load takes some hundreds of clock cycles, and
# the whole step waits for the last block. Chunks are added in their order. Moments have four rows: with more of them on
# their way some GPUs' multiprocessors would not have registers for two blocks.
AHEAD, MOMENTS_AHEAD = 4, 2


@device
def add_chunks(s, partial, first, last, step, target, column):
    """Add up the sums of a statistic in every `step`-th chunk from the first to before the last, in a column of
    `target`."""
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
        target[row, column] = total


@device
def combine_chunks(s, partial, first, last, step, target, column):
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
        target[row, column] = total[row, 0]


@device
def train_statistic(s, c, own, params, hyper, a, renorm, saved, coefficients):
    """From the moments of a statistic, the first rows of `own`, a column of SAVED_ROWS, to what the gradient needs and
    the coefficients of the output. These need train_channel() with renorm, and come after it.

    Where there are several groups, R is this one's variance until then: its divisions have a thread each.
    """
    epsilon, bessel = hyper[channel.EPSILON], hyper[channel.BESSEL]
    variance = rules.per(own[channel.M2, 0], own[channel.COUNT, 0])
    save(0, c, rules.reciprocal_stddev(variance, epsilon), 1.0, 0.0, params, own)
    if renorm is None:
        output_coefficients(0, s, own, a, coefficients)
    if saved.shape[1] > params.shape[1]:
        own[channel.R, 0] = group_variance(0, own[channel.COUNT, 0], own[channel.SQUARES, 0], own, bessel)
    for row in range(SAVED_ROWS):
        saved[row, s] = own[row, 0]


@device
def train_channel(c, channels, state, hyper, renorm, debias, skip, new_state, saved):
    """From what train_statistic() has left for each group to the new state, and r and d."""
    present, mean, variance, several = 0.0, 0.0, 0.0, saved.shape[1] > channels
    s = c
    while s < saved.shape[1]:
        n, squares, bessel = saved[channel.COUNT, s], saved[channel.SQUARES, s], hyper[channel.BESSEL]
        own = saved[channel.R, s] if several else group_variance(s, n, squares, saved, bessel)
        present, mean, variance = add_group(s, n, own, saved, bessel, present, mean, variance)
        s += channels
    r, d = update(c, present, mean, variance, state, hyper, renorm, debias, skip, new_state)
    s = c
    while s < saved.shape[1]:
        saved[channel.R, s] = r
        saved[channel.D, s] = d
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
