"""The middle stage: a few numbers per channel, and every option of batch normalization.

Arithmetic is float64. What the elements use is rounded once, to the statistics' dtype.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from nbbn.core import rules

# Rows of the arrays that the stages exchange. The statistic of group g and channel c is in column g * C + c.
GAMMA, BETA = range(2)  # parameters (2, C)
# State (2, C), with renorm (5, C). Cumulative averages have two more rows, which come last: how many batches are in
# each channel's mean and variance.
MEAN, VARIANCE, STDDEV, RENORM_MEAN, RENORM_STDDEV = range(5)
SEEN_MEAN, SEEN_VARIANCE = -2, -1
# What a gradient needs, saved (9, G * C), float64. The first four rows are the moments, which also go alone: with
# weights COUNT is their sum, and SQUARES that of their squares; without them both are the number of values.
COUNT, BATCH_MEAN, M2, SQUARES, RSTD, R, D, USED_GAMMA, USED_BETA = range(9)
MOMENT_ROWS, SAVED_ROWS = 4, 9
# How many sums there are of the values, about a shift, without weights and with them.
PLAIN_SUMS, WEIGHTED_SUMS = 2, 4
EPSILON, MOMENTUM, BESSEL, RENORM_MOMENTUM, RMIN, RMAX, DMAX = range(7)  # hyper (7,), float64
# Coefficients of the output; gamma and beta where there is an adjustment. Those of the input's gradient.
Y_MEAN, Y_SCALE, Y_SHIFT, Y_GAMMA, Y_BETA = range(5)
DX_MEAN, DX_SCALE, DX_BIAS, DX_SLOPE = range(4)
# Sums of the gradient, float64, with a = 1 where there is no adjustment: of dy * a and dy * a * (x - mean), with one
# also of dy and dy * b.
SUM_DYA, SUM_DYA_X, SUM_DY, SUM_DYB = range(4)
# How many coefficients of the output, and sums of the gradient, there are without an adjustment and with one.
OUTPUT_ROWS, GRADIENT_ROWS = {False: 3, True: 5}, {False: 2, True: 4}
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def functions(compiled: Callable[[Any], Any]) -> SimpleNamespace:
    """The functions of this stage, for the target whose decorator `compiled` is. They work on channels first to last,
    or on statistics first to last. A flag is True or None: what is None is not compiled."""

    @compiled
    def add_chunks(first, last, partial):
        """Add up the sums of all chunks, in their order, in the place of the first chunk's."""
        for chunk in range(1, partial.shape[0]):
            for row in range(partial.shape[1]):
                for s in range(first, last):
                    partial[0, row, s] += partial[chunk, row, s]

    @compiled
    def largest(array):
        """The largest number of the dtype of an array of float32 or float64."""
        return LARGEST_FLOAT32 if array.itemsize == 4 else rules.LARGEST

    @compiled
    def train(first, last, params, state, hyper, a, renorm, cumulative, new_state, saved, coefficients):
        """From moments to the new state, what the gradient needs, and the coefficients of the output."""
        update(first, last, state, hyper, renorm, cumulative, new_state, saved)
        channels, epsilon = params.shape[1], hyper[EPSILON]
        for g in range(saved.shape[1] // channels):
            begin, end = g * channels + first, g * channels + last
            count, m2, rstd = saved[COUNT, begin:end], saved[M2, begin:end], saved[RSTD, begin:end]
            for i in range(rstd.size):  # a loop of its own is vectorized
                rstd[i] = rules.reciprocal_stddev(rules.biased_variance(count[i], m2[i]), epsilon)
            for c in range(first, last):
                saved[USED_GAMMA, g * channels + c] = params[GAMMA, c]
                saved[USED_BETA, g * channels + c] = params[BETA, c]
        output_coefficients(first, last, channels, saved, a, coefficients)

    @compiled
    def freeze(first, last, params, state, epsilon, saved):
        """Write what a gradient needs of statistics that are constants, which is what a count of 0 says."""
        for c in range(first, last):
            saved[COUNT, c] = 0.0
            saved[BATCH_MEAN, c] = state[MEAN, c]
            saved[M2, c] = 0.0
            saved[SQUARES, c] = 0.0
            saved[RSTD, c] = rules.reciprocal_stddev(np.float64(state[VARIANCE, c]), epsilon)
            saved[R, c] = 1.0
            saved[D, c] = 0.0
            saved[USED_GAMMA, c] = params[GAMMA, c]
            saved[USED_BETA, c] = params[BETA, c]

    @compiled
    def output_coefficients(first, last, channels, saved, a, coefficients):
        """Write the coefficients of the output of some channels; with an adjustment (a is not None) beta is apart."""
        for group in range(0, saved.shape[1], channels):
            for s in range(group + first, group + last):
                statistic_coefficients(s, s, saved, a, coefficients)

    @compiled
    def element_mean(s, saved, coefficients):
        """What elements subtract: their mean, unless it, or a difference, may be more than the largest number. Values
        that are so far apart have no digits to lose if nothing is subtracted."""
        mean = saved[BATCH_MEAN, s]
        if coefficients.itemsize == 8:
            return mean
        # m2 with equal weights as if they were 1; a division or a branch would be felt in small calls
        far = saved[M2, s] * saved[COUNT, s] > LARGEST_FLOAT32 * LARGEST_FLOAT32 * saved[SQUARES, s]
        return 0.0 if far | (abs(mean) > LARGEST_FLOAT32) else mean

    @compiled
    def statistic_coefficients(s, target, saved, a, coefficients):
        """Write the coefficients of the output of one statistic to column `target`."""
        gamma, beta, mean = saved[USED_GAMMA, s], saved[USED_BETA, s], saved[BATCH_MEAN, s]
        coefficients[Y_MEAN, target] = element_mean(s, saved, coefficients)
        rounded = np.float64(coefficients[Y_MEAN, target])
        scale, shift = rules.output_terms(mean, rounded, saved[RSTD, s], saved[R, s], saved[D, s], gamma)
        coefficients[Y_SCALE, target] = scale
        if a is None:
            coefficients[Y_SHIFT, target] = shift + beta
        else:
            coefficients[Y_SHIFT, target] = shift
            coefficients[Y_GAMMA, target] = gamma
            coefficients[Y_BETA, target] = beta

    @compiled
    def add_group(s, bessel, saved, present, mean, variance):
        """The sums over a channel's groups that have any value, with one more."""
        n = saved[COUNT, s]
        if n > 0:
            m2 = saved[M2, s]
            own = rules.unbiased_variance(n, m2, saved[SQUARES, s]) if bessel else rules.biased_variance(n, m2)
            return present + 1, mean + saved[BATCH_MEAN, s], variance + own
        return present, mean, variance

    @compiled
    def update(first, last, state, hyper, renorm, cumulative, new_state, saved):
        """Write the moving statistics of some channels, and to `saved` r and d of renorm, 1 and 0 without it.

        What the state's dtype cannot hold becomes its largest number, from which later batches bring it back. The
        batch's statistics are the average over its groups; a group without any value has none. The loop is inside:
        a call per channel, with its arrays as arguments, would take longer than what it does.
        """
        renorm_momentum, epsilon, most = hyper[RENORM_MOMENTUM], hyper[EPSILON], largest(new_state)
        mean_momentum = variance_momentum = hyper[MOMENTUM]
        bessel, channels = hyper[BESSEL] != 0, state.shape[1]
        groups = saved.shape[1] // channels
        for c in range(first, last):
            present, mean, variance = add_group(c, bessel, saved, 0, 0.0, 0.0)
            for g in range(1, groups):
                present, mean, variance = add_group(g * channels + c, bessel, saved, present, mean, variance)
            if present > 1:
                mean, variance = mean / present, variance / present
            if cumulative is not None:
                seen_mean, seen_variance = np.float64(state[SEEN_MEAN, c]), np.float64(state[SEEN_VARIANCE, c])
                mean_momentum = seen_mean / (seen_mean + 1.0)
                variance_momentum = seen_variance / (seen_variance + 1.0)
                if present > 0:
                    new_state[SEEN_MEAN, c] = seen_mean + 1.0
                    new_state[SEEN_VARIANCE, c] = seen_variance + 1.0
            if present == 0:
                for row in range(state.shape[0]):
                    new_state[row, c] = state[row, c]
            else:
                old_mean = np.float64(state[MEAN, c])
                new_state[MEAN, c] = rules.saturate(rules.moving_average(old_mean, mean, mean_momentum), most)
            if renorm is None:
                if present > 0:
                    old_variance = np.float64(state[VARIANCE, c])
                    moved = rules.moving_average(old_variance, variance, variance_momentum)
                    new_state[VARIANCE, c] = rules.saturate(moved, most)
                continue
            sigma, old_stddev = rules.stddev(variance, epsilon), np.float64(state[STDDEV, c])
            old = np.float64(state[RENORM_MEAN, c]), np.float64(state[RENORM_STDDEV, c])
            r, d = rules.renorm_correction(mean, sigma, old[0], old[1], epsilon, hyper[RMIN], hyper[RMAX], hyper[DMAX])
            if present > 0:
                stddev = rules.saturate(rules.moving_average(old_stddev, sigma, variance_momentum), most)
                renorm_mean = rules.saturate(rules.moving_average(old[0], mean, renorm_momentum), most)
                renorm_stddev = rules.saturate(rules.moving_average(old[1], sigma, renorm_momentum), most)
                new_state[STDDEV, c] = stddev
                new_state[VARIANCE, c] = rules.saturate(rules.variance_of_stddev(stddev, epsilon), most)
                new_state[RENORM_MEAN, c] = renorm_mean
                new_state[RENORM_STDDEV, c] = renorm_stddev
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
        """Write the coefficients of the output from the moving statistics."""
        for c in range(params.shape[1]):
            gamma, variance = np.float64(params[GAMMA, c]), np.float64(state[VARIANCE, c])
            mean = np.float64(state[MEAN, c])
            coefficients[Y_MEAN, c] = mean if abs(mean) <= largest(coefficients) else 0.0  # of a wider state
            rounded = np.float64(coefficients[Y_MEAN, c])
            scale, shift = rules.inference_terms(mean, rounded, variance, hyper[EPSILON], gamma)
            coefficients[Y_SCALE, c] = scale
            coefficients[Y_SHIFT, c] = shift + np.float64(params[BETA, c])

    @compiled
    def parameter_gradients(first, last, sums, saved, dparams):
        """Write the gradients of gamma and beta of some channels."""
        channels = dparams.shape[1]
        for c in range(first, last):
            dgamma, dbeta = 0.0, 0.0
            for s in range(c, saved.shape[1], channels):
                total, centered = sums[SUM_DYA, s], sums[SUM_DYA_X, s]
                dgamma += rules.gamma_gradient(total, centered, saved[RSTD, s], saved[R, s], saved[D, s])
                if sums.shape[0] == 2:
                    dbeta += total
                else:
                    dgamma += sums[SUM_DYB, s]
                    dbeta += sums[SUM_DY, s]
            dparams[GAMMA, c] = dgamma
            dparams[BETA, c] = dbeta

    @compiled
    def input_coefficients(first, last, channels, sums, saved, coefficients):
        """Write mean, scale, bias and slope of dx of some channels.

        saved: with a count of 0 the statistics are constants, and bias and slope are 0.
        """
        for c in range(first, last):
            for s in range(c, saved.shape[1], channels):
                rstd, mean = saved[RSTD, s], saved[BATCH_MEAN, s]
                bias, slope = rules.input_gradient_terms(saved[COUNT, s], sums[SUM_DYA, s], sums[SUM_DYA_X, s], rstd)
                coefficients[DX_MEAN, s] = element_mean(s, saved, coefficients)
                coefficients[DX_SCALE, s] = saved[USED_GAMMA, s] * saved[R, s] * rstd
                coefficients[DX_BIAS, s] = bias - (mean - np.float64(coefficients[DX_MEAN, s])) * slope
                coefficients[DX_SLOPE, s] = slope

    found = (add_chunks, train, freeze, output_coefficients, statistic_coefficients, infer)
    return SimpleNamespace(**{f.__name__: f for f in (*found, parameter_gradients, input_coefficients)})
