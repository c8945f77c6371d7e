"""The middle stage: C numbers per statistic, and every option of batch normalization.

Arithmetic is float64; what the elements use is rounded once, to the statistics' dtype. The rounded mean's error goes
into the shift, so that a mean much larger than the deviation costs no digits.
"""

import numpy as np

from nbbn import rules
from nbbn.kernels.cpu.elements import element

# Rows of the arrays that the stages exchange. A statistic of group g and channel c is in column g * C + c.
GAMMA, BETA = range(2)  # parameters (2, C)
MEAN, VARIANCE, STDDEV, RENORM_MEAN, RENORM_STDDEV = range(5)  # state (2, C); (5, C) with renorm
COUNT, BATCH_MEAN, RSTD, R, D = range(5)  # saved (5, G * C), float64
EPSILON, MOMENTUM, BESSEL, RENORM_MOMENTUM, RMIN, RMAX, DMAX = range(7)  # hyper (7,), float64


def keep_batch(hyper: np.ndarray) -> None:
    """Make the new state of a training step the batch's own statistics, for who blends them into the state later."""
    hyper[MOMENTUM] = hyper[RENORM_MOMENTUM] = 0


@element
def batch_moments(sums, shift, count, saved):
    """Write count, mean and biased variance (in row RSTD) of every statistic from its shifted sums.

    count: values per statistic; with weights the sums hold each statistic's own.
    """
    for s in range(saved.shape[1]):
        n = count if sums.shape[0] == 2 else sums[2, s]
        mean, m2 = rules.shifted_moments(n, shift[s], sums[0, s], sums[1, s])
        saved[COUNT, s] = n
        saved[BATCH_MEAN, s] = mean
        saved[RSTD, s] = rules.biased_variance(n, m2)


@element
def train(params, state, hyper, new_state, saved, coefficients):
    """From moments to the new state, what the gradient needs, and the coefficients of the output.

    saved: (5, G * C), with the moments that batch_moments() wrote; RSTD, R and D are filled in.
    coefficients: (3 or 5, G * C) statistic dtype: mean, scale, shift; with 5 also gamma and beta of an adjustment.
    """
    channels = params.shape[1]
    for c in range(channels):
        r, d = update_channel(c, state, hyper, new_state, saved)
        gamma, beta = np.float64(params[GAMMA, c]), np.float64(params[BETA, c])
        for s in range(c, saved.shape[1], channels):
            rstd = 1.0 / rules.stddev(saved[RSTD, s], hyper[EPSILON])
            saved[RSTD, s], saved[R, s], saved[D, s] = rstd, r, d
            mean, scale = saved[BATCH_MEAN, s], rstd * r * gamma
            coefficients[0, s] = mean
            coefficients[1, s] = scale
            shift = d * gamma - (mean - np.float64(coefficients[0, s])) * scale
            coefficients[2, s] = shift if coefficients.shape[0] == 5 else shift + beta
            if coefficients.shape[0] == 5:
                coefficients[3, s] = gamma
                coefficients[4, s] = beta


@element
def update_channel(c, state, hyper, new_state, saved):
    """Write one channel's moving statistics; returns r and d of renorm, 1 and 0 without it.

    The batch's statistics are the average over its groups; a group without any value has none.
    """
    groups, mean, variance = 0, 0.0, 0.0
    for s in range(c, saved.shape[1], state.shape[1]):
        n = saved[COUNT, s]
        if n > 0:
            groups += 1
            mean += saved[BATCH_MEAN, s]
            variance += saved[RSTD, s] * (rules.bessel_factor(n) if hyper[BESSEL] != 0 else 1.0)
    if groups > 0:
        mean, variance = mean / groups, variance / groups
    for row in range(state.shape[0]):
        new_state[row, c] = state[row, c]
    if state.shape[0] == 5:
        return update_renorm(c, groups > 0, mean, variance, state, hyper, new_state)
    if groups > 0:
        new_state[MEAN, c] = rules.moving_average(np.float64(state[MEAN, c]), mean, hyper[MOMENTUM])
        new_state[VARIANCE, c] = rules.moving_average(np.float64(state[VARIANCE, c]), variance, hyper[MOMENTUM])
    return 1.0, 0.0


@element
def update_renorm(c, counts, mean, variance, state, hyper, new_state):
    """The part of update_channel() with renorm. counts: whether the batch has any value."""
    epsilon, momentum, renorm_momentum = hyper[EPSILON], hyper[MOMENTUM], hyper[RENORM_MOMENTUM]
    sigma = rules.stddev(variance, epsilon)
    renorm_mean, renorm_stddev = np.float64(state[RENORM_MEAN, c]), np.float64(state[RENORM_STDDEV, c])
    if counts:
        moving_stddev = rules.moving_average(np.float64(state[STDDEV, c]), sigma, momentum)
        new_state[MEAN, c] = rules.moving_average(np.float64(state[MEAN, c]), mean, momentum)
        new_state[STDDEV, c] = moving_stddev
        new_state[VARIANCE, c] = rules.variance_of_stddev(moving_stddev, epsilon)
        new_state[RENORM_MEAN, c] = rules.moving_average(renorm_mean, mean, renorm_momentum)
        new_state[RENORM_STDDEV, c] = rules.moving_average(renorm_stddev, sigma, renorm_momentum)
    return rules.renorm_correction(
        mean, sigma, renorm_mean, renorm_stddev, epsilon, hyper[RMIN], hyper[RMAX], hyper[DMAX]
    )


@element
def infer(params, state, hyper, coefficients):
    """Write mean, scale and shift of the output from the moving statistics."""
    for c in range(params.shape[1]):
        coefficients[0, c] = state[MEAN, c]
        coefficients[1, c] = np.float64(params[GAMMA, c]) / rules.stddev(np.float64(state[VARIANCE, c]), hyper[EPSILON])
        coefficients[2, c] = params[BETA, c]


@element
def backward(sums, params, saved, coefficients, dparams):
    """Write the gradients of gamma and beta, and the coefficients of dx: mean, scale, bias, slope.

    saved: with a count of 0 the statistics are constants, and bias and slope are 0.
    """
    channels = params.shape[1]
    for c in range(channels):
        dgamma, dbeta = 0.0, 0.0
        for s in range(c, saved.shape[1], channels):
            total, centered, rstd, mean = sums[0, s], sums[1, s], saved[RSTD, s], saved[BATCH_MEAN, s]
            dgamma += rules.gamma_gradient(total, centered, rstd, saved[R, s], saved[D, s])
            dbeta += total if sums.shape[0] == 2 else sums[2, s]
            if sums.shape[0] == 4:
                dgamma += sums[3, s]
            bias, slope = rules.input_gradient_terms(saved[COUNT, s], total, centered, rstd)
            coefficients[0, s] = mean
            coefficients[1, s] = np.float64(params[GAMMA, c]) * saved[R, s] * rstd
            coefficients[2, s] = bias - (mean - np.float64(coefficients[0, s])) * slope
            coefficients[3, s] = slope
        dparams[GAMMA, c] = dgamma
        dparams[BETA, c] = dbeta
