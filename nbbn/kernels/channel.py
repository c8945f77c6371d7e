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
# State (2, C), with renorm (5, C). Debiased averages have two more rows, which come last: the weight of the batches in
# each channel's mean and variance. Of averages with equal weights it is their number.
MEAN, VARIANCE, STDDEV, RENORM_MEAN, RENORM_STDDEV = range(5)
SEEN_MEAN, SEEN_VARIANCE = -2, -1
# What a gradient needs, saved (9, G * C), float64. The first four rows are the moments, which also go alone: with
# weights COUNT is their sum, and SQUARES that of their squares; without them both are the number of values.
COUNT, BATCH_MEAN, M2, SQUARES, RSTD, R, D, USED_GAMMA, USED_BETA = range(9)
MOMENT_ROWS, SAVED_ROWS = 4, 9
# How many sums there are of the values, about a shift, without weights and with them.
PLAIN_SUMS, WEIGHTED_SUMS = 2, 4
# hyper (8,), float64. BATCH_WEIGHT is for debiased averages: 1 - momentum, or 1 of averages with equal weights, whose
# momentum is 1.
EPSILON, MOMENTUM, BESSEL, RENORM_MOMENTUM, RMIN, RMAX, DMAX, BATCH_WEIGHT = range(8)
HYPER_SIZE = 8
# Coefficients of the output; gamma and beta where there is an adjustment. Those of the input's gradient.
Y_MEAN, Y_SCALE, Y_SHIFT, Y_GAMMA, Y_BETA = range(5)
DX_MEAN, DX_SCALE, DX_BIAS, DX_SLOPE = range(4)
# Sums of the gradient, float64, with a = 1 where there is no adjustment: of dy * a and dy * a * (x - mean), with one
# also of dy and dy * b.
SUM_DYA, SUM_DYA_X, SUM_DY, SUM_DYB = range(4)
# How many coefficients of the output, and sums of the gradient, there are without an adjustment and with one.
OUTPUT_ROWS, GRADIENT_ROWS = {False: 3, True: 5}, {False: 2, True: 4}
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def functions(compiled: Callable[[Any], Any], rules: Any = rules, wide: Any = np.float64) -> SimpleNamespace:
    """The functions of this stage, for the target whose decorator `compiled` is, whose rules these are, and which makes
    float64 of a number by `wide`.

    They are about one channel c, one statistic s, or about whatever a target lets stand for several of them. Which ones
    there are, and in how many groups, is the target's. A flag is True or None: what is None is not compiled.
    """

    @compiled
    def largest(array):
        """The largest number of the dtype of an array of float32 or float64."""
        return LARGEST_FLOAT32 if array.itemsize == 4 else rules.LARGEST

    @compiled
    def group_variance(s, n, squares, saved, bessel):
        """The variance of a group as the moving statistics know it. n, squares: COUNT and SQUARES of the group."""
        return rules.per(saved[M2, s], rules.choose(bessel != 0, rules.unbiased_count(n, squares), n))

    @compiled
    def add_group(s, n, own, saved, bessel, present, mean, variance):
        """The sums over a channel's groups that have any value, with one more: how many, their means and variances.

        n, own: COUNT and group_variance() of the group."""
        # without any value its mean and its variance are 0
        return present + rules.drop(n == 0, bessel * 0 + 1), mean + saved[BATCH_MEAN, s], variance + own

    @compiled
    def update(c, present, mean, variance, state, hyper, renorm, debias, skip, new_state):
        """Write the moving statistics of a channel from the sums over its groups. Returns: r and d of renorm.

        What the state's dtype cannot hold becomes its largest number, from which later batches bring it back. The
        batch's statistics are the average over its groups; a group without any value has none, and without any at all
        nothing changes. Nor does it, with `skip`, where that average is not finite.
        """
        nothing, epsilon, most = present == 0, hyper[EPSILON], largest(new_state)
        mean, variance = rules.per(mean, present), rules.per(variance, present)
        if skip is not None:
            nothing = nothing | rules.is_not_finite(mean) | rules.is_not_finite(variance)
        mean_momentum = variance_momentum = hyper[MOMENTUM]
        if debias is not None:
            mean_momentum = weigh(SEEN_MEAN, c, state, hyper, nothing, new_state)
            variance_momentum = weigh(SEEN_VARIANCE, c, state, hyper, nothing, new_state)
        old_mean, old_variance = wide(state[MEAN, c]), wide(state[VARIANCE, c])
        new_state[MEAN, c] = moved(old_mean, mean, mean_momentum, nothing, most)
        if renorm is None:
            new_state[VARIANCE, c] = moved(old_variance, variance, variance_momentum, nothing, most)
            return 1.0, 0.0
        sigma, momentum = rules.stddev(variance, epsilon), hyper[RENORM_MOMENTUM]
        old_renorm_mean, old_renorm_stddev = wide(state[RENORM_MEAN, c]), wide(state[RENORM_STDDEV, c])
        stddev = moved(wide(state[STDDEV, c]), sigma, variance_momentum, nothing, most)
        new_variance = rules.saturate(rules.variance_of_stddev(stddev, epsilon), most)
        new_state[STDDEV, c] = stddev
        new_state[VARIANCE, c] = rules.choose(nothing, old_variance, new_variance)
        new_state[RENORM_MEAN, c] = moved(old_renorm_mean, mean, momentum, nothing, most)
        new_state[RENORM_STDDEV, c] = moved(old_renorm_stddev, sigma, momentum, nothing, most)
        return rules.renorm_correction(
            mean, sigma, old_renorm_mean, old_renorm_stddev, epsilon, hyper[RMIN], hyper[RMAX], hyper[DMAX]
        )

    @compiled
    def weigh(row, c, state, hyper, nothing, new_state):
        """Write the weight of a debiased average after this batch. Returns: the momentum that it has this time."""
        seen = wide(state[row, c])
        total, momentum = rules.debiased_momentum(seen, hyper[MOMENTUM], hyper[BATCH_WEIGHT])
        new_state[row, c] = rules.choose(nothing, seen, total)
        return momentum

    @compiled
    def moved(old, new, momentum, nothing, most):
        """A moving statistic after this batch."""
        return rules.choose(nothing, old, rules.saturate(rules.moving_average(old, new, momentum), most))

    @compiled
    def save(s, c, rstd, r, d, params, saved):
        """Write what a gradient needs beside the moments."""
        saved[RSTD, s] = rstd
        saved[R, s] = r
        saved[D, s] = d
        saved[USED_GAMMA, s] = wide(params[GAMMA, c])
        saved[USED_BETA, s] = wide(params[BETA, c])

    @compiled
    def freeze(c, params, state, hyper, saved):
        """Write what a gradient needs of statistics that are constants, which is what a count of 0 says."""
        saved[COUNT, c] = 0.0
        saved[BATCH_MEAN, c] = wide(state[MEAN, c])
        saved[M2, c] = 0.0
        saved[SQUARES, c] = 0.0
        save(c, c, rules.reciprocal_stddev(wide(state[VARIANCE, c]), hyper[EPSILON]), 1.0, 0.0, params, saved)

    @compiled
    def element_mean(s, saved, coefficients):
        """What elements subtract: their mean, unless it, or a difference, may be more than the largest number. Values
        that are so far apart have no digits to lose if nothing is subtracted."""
        mean = saved[BATCH_MEAN, s]
        if coefficients.itemsize == 8:
            return mean
        # m2 with equal weights as if they were 1
        far = saved[M2, s] * saved[COUNT, s] > LARGEST_FLOAT32 * LARGEST_FLOAT32 * saved[SQUARES, s]
        return rules.drop(far | (abs(mean) > LARGEST_FLOAT32), mean)

    @compiled
    def output_coefficients(s, target, saved, a, coefficients):
        """Write the coefficients of the output of a statistic to column `target`; with an adjustment (a is not None)
        beta is apart."""
        gamma, beta, mean = saved[USED_GAMMA, s], saved[USED_BETA, s], saved[BATCH_MEAN, s]
        coefficients[Y_MEAN, target] = element_mean(s, saved, coefficients)
        rounded = wide(coefficients[Y_MEAN, target])
        scale, shift = rules.output_terms(mean, rounded, saved[RSTD, s], saved[R, s], saved[D, s], gamma)
        coefficients[Y_SCALE, target] = scale
        if a is None:
            coefficients[Y_SHIFT, target] = shift + beta
        else:
            coefficients[Y_SHIFT, target] = shift
            coefficients[Y_GAMMA, target] = gamma
            coefficients[Y_BETA, target] = beta

    @compiled
    def inference_coefficients(c, params, state, hyper, coefficients):
        """Write the coefficients of the output from the moving statistics."""
        mean = wide(state[MEAN, c])
        # what a wider state holds may be too much
        coefficients[Y_MEAN, c] = rules.drop(abs(mean) > largest(coefficients), mean)
        rounded, gamma = wide(coefficients[Y_MEAN, c]), wide(params[GAMMA, c])
        scale, shift = rules.inference_terms(mean, rounded, wide(state[VARIANCE, c]), hyper[EPSILON], gamma)
        coefficients[Y_SCALE, c] = scale
        coefficients[Y_SHIFT, c] = shift + wide(params[BETA, c])

    @compiled
    def add_parameter_gradients(s, sums, saved, adjusted, dgamma, dbeta):
        """The gradients of gamma and beta with those of one more group. adjusted: None without an adjustment."""
        total, centered = sums[SUM_DYA, s], sums[SUM_DYA_X, s]
        own = rules.gamma_gradient(total, centered, saved[RSTD, s], saved[R, s], saved[D, s])
        if adjusted is None:
            return dgamma + own, dbeta + total
        return dgamma + own + sums[SUM_DYB, s], dbeta + sums[SUM_DY, s]

    @compiled
    def input_coefficients(s, total, centered, saved, coefficients):
        """Write mean, scale, bias and slope of dx. Where the statistics are constants bias and slope are 0.

        total, centered: SUM_DYA and SUM_DYA_X of the statistic."""
        rstd, mean, gamma, r = saved[RSTD, s], saved[BATCH_MEAN, s], saved[USED_GAMMA, s], saved[R, s]
        bias, slope = rules.input_gradient_terms(saved[COUNT, s], total, centered, rstd)
        coefficients[DX_MEAN, s] = element_mean(s, saved, coefficients)
        rounded = wide(coefficients[DX_MEAN, s])
        coefficients[DX_SCALE, s] = gamma * r * rstd
        coefficients[DX_BIAS, s] = bias - (mean - rounded) * slope
        coefficients[DX_SLOPE, s] = slope

    found = (group_variance, add_group, update, save, freeze, output_coefficients, inference_coefficients)
    return SimpleNamespace(**{f.__name__: f for f in (*found, add_parameter_gradients, input_coefficients)})
