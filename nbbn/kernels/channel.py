"""The middle stage: C numbers per statistic, and every option of batch normalization.

Arithmetic is float64; what the elements use is rounded once, to the statistics' dtype. The rounded mean's error goes
into the shift, so that a mean much larger than the deviation costs no digits.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from nbbn import rules

# Rows of the arrays that the stages exchange. A statistic of group g and channel c is in column g * C + c.
GAMMA, BETA = range(2)  # parameters (2, C)
MEAN, VARIANCE, STDDEV, RENORM_MEAN, RENORM_STDDEV = range(5)  # state (2, C); (5, C) with renorm
COUNT, BATCH_MEAN, RSTD, R, D = range(5)  # saved (5, G * C), float64
EPSILON, MOMENTUM, BESSEL, RENORM_MOMENTUM, RMIN, RMAX, DMAX = range(7)  # hyper (7,), float64


def keep_batch(hyper: np.ndarray) -> np.ndarray:
    """A copy that makes the new state of a training step the batch's own statistics, for who blends them in later."""
    kept = hyper.copy()
    kept[MOMENTUM] = kept[RENORM_MOMENTUM] = 0
    return kept


def functions(compiled: Callable[[Any], Any]) -> SimpleNamespace:
    """The functions of this stage, for the target whose decorator `compiled` is."""

    @compiled
    def add_chunks(first, last, partial):
        """The sums of all chunks, in their order, of some statistics; in the place of the first chunk's."""
        for chunk in range(1, partial.shape[0]):
            for row in range(partial.shape[1]):
                for s in range(first, last):
                    partial[0, row, s] += partial[chunk, row, s]

    @compiled
    def batch_moments(first, last, sums, shift, count, saved):
        """Write count, mean and biased variance (in row RSTD) of some statistics from their shifted sums.

        count: values per statistic; with weights the sums hold each statistic's own.
        """
        for s in range(first, last):
            n = count if sums.shape[0] == 2 else sums[2, s]
            mean, m2 = rules.shifted_moments(n, shift[s], sums[0, s], sums[1, s])
            saved[COUNT, s] = n
            saved[BATCH_MEAN, s] = mean
            saved[RSTD, s] = rules.biased_variance(n, m2)

    @compiled
    def train(first, last, params, state, hyper, a, renorm, new_state, saved, coefficients):
        """From moments to the new state, what the gradient needs, and the coefficients of the output, of some channels.

        saved: (5, G * C), with the moments that batch_moments() wrote; RSTD, R and D are filled in.
        """
        update(first, last, state, hyper, renorm, new_state, saved)
        channels, epsilon = params.shape[1], hyper[EPSILON]
        for g in range(saved.shape[1] // channels):
            rstd = saved[RSTD, g * channels + first : g * channels + last]
            for i in range(rstd.size):  # a loop of its own is vectorized
                rstd[i] = 1.0 / rules.stddev(rstd[i], epsilon)
            for c in range(first, last):
                output_coefficients(g * channels + c, params[GAMMA, c], params[BETA, c], saved, a, coefficients)

    @compiled
    def output_coefficients(s, gamma, beta, saved, a, coefficients):
        """Write mean, scale and shift of a statistic's output; with an adjustment (a is not None) beta is apart."""
        gamma, mean = np.float64(gamma), saved[BATCH_MEAN, s]
        scale = saved[RSTD, s] * saved[R, s] * gamma
        coefficients[0, s] = mean
        coefficients[1, s] = scale
        shift = saved[D, s] * gamma - (mean - np.float64(coefficients[0, s])) * scale
        if a is None:
            coefficients[2, s] = shift + np.float64(beta)
        else:
            coefficients[2, s] = shift
            coefficients[3, s] = gamma
            coefficients[4, s] = beta

    @compiled
    def forward_coefficients(first, last, a, params, saved, forward):
        """Write the coefficients of the output of some channels once more, for the gradient of its activation."""
        for c in range(first, last):
            for s in range(c, saved.shape[1], params.shape[1]):
                output_coefficients(s, params[GAMMA, c], params[BETA, c], saved, a, forward)

    @compiled
    def add_group(s, bessel, saved, present, mean, variance):
        """The sums over a channel's groups that have any value, with one more."""
        n = saved[COUNT, s]
        if n > 0:
            corrected = saved[RSTD, s] * (rules.bessel_factor(n) if bessel else 1.0)
            return present + 1, mean + saved[BATCH_MEAN, s], variance + corrected
        return present, mean, variance

    @compiled
    def update(first, last, state, hyper, renorm, new_state, saved):
        """Write the moving statistics of some channels, and to `saved` r and d of renorm, 1 and 0 without it.

        The batch's statistics are the average over its groups; a group without any value has none. The loop is inside:
        a call per channel, with its arrays as arguments, would take longer than what it does.
        """
        momentum, renorm_momentum, epsilon = hyper[MOMENTUM], hyper[RENORM_MOMENTUM], hyper[EPSILON]
        bessel, channels = hyper[BESSEL] != 0, state.shape[1]
        groups = saved.shape[1] // channels
        for c in range(first, last):
            present, mean, variance = add_group(c, bessel, saved, 0, 0.0, 0.0)
            for g in range(1, groups):
                present, mean, variance = add_group(g * channels + c, bessel, saved, present, mean, variance)
            if present > 1:
                mean, variance = mean / present, variance / present
            if present == 0:
                for row in range(state.shape[0]):
                    new_state[row, c] = state[row, c]
            else:
                new_state[MEAN, c] = rules.moving_average(np.float64(state[MEAN, c]), mean, momentum)
            if renorm is None:
                if present > 0:
                    new_state[VARIANCE, c] = rules.moving_average(np.float64(state[VARIANCE, c]), variance, momentum)
                continue
            sigma, old_stddev = rules.stddev(variance, epsilon), np.float64(state[STDDEV, c])
            old = np.float64(state[RENORM_MEAN, c]), np.float64(state[RENORM_STDDEV, c])
            r, d = rules.renorm_correction(mean, sigma, old[0], old[1], epsilon, hyper[RMIN], hyper[RMAX], hyper[DMAX])
            if present > 0:
                stddev = rules.moving_average(old_stddev, sigma, momentum)
                new_state[STDDEV, c] = stddev
                new_state[VARIANCE, c] = rules.variance_of_stddev(stddev, epsilon)
                new_state[RENORM_MEAN, c] = rules.moving_average(old[0], mean, renorm_momentum)
                new_state[RENORM_STDDEV, c] = rules.moving_average(old[1], sigma, renorm_momentum)
            for g in range(groups):
                saved[R, g * channels + c] = r
                saved[D, g * channels + c] = d
        if renorm is None:
            for row, value in ((R, 1.0), (D, 0.0)):
                for g in range(groups):
                    for c in range(first, last):
                        saved[row, g * channels + c] = value

    @compiled
    def infer(params, state, hyper, coefficients):
        """Write mean, scale and shift of the output from the moving statistics."""
        for c in range(params.shape[1]):
            gamma, variance = np.float64(params[GAMMA, c]), np.float64(state[VARIANCE, c])
            coefficients[0, c] = state[MEAN, c]
            coefficients[1, c] = rules.inference_scale(gamma, variance, hyper[EPSILON])
            coefficients[2, c] = params[BETA, c]

    @compiled
    def backward(first, last, sums, params, saved, coefficients, dparams):
        """Write the gradients of gamma and beta, and mean, scale, bias, slope of dx, of some channels.

        saved: with a count of 0 the statistics are constants, and bias and slope are 0.
        """
        channels = params.shape[1]
        for c in range(first, last):
            dgamma, dbeta = 0.0, 0.0
            for g in range(saved.shape[1] // channels):
                s = g * channels + c
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

    found = (add_chunks, batch_moments, train, output_coefficients, forward_coefficients, infer, backward)
    return SimpleNamespace(**{f.__name__: f for f in found})
