"""The arithmetic of one statistic: scalar functions that every target compiles and plain Python can run.

Constants take the type of an argument (`type(x)(1)`), because a literal would turn float32 into float64 on a GPU, and
there is no min or max, because those drop NaN on a GPU.
"""

import math
import sys

from numba.extending import register_jitable

LARGEST = sys.float_info.max

# -- what chooses between values: all else is arithmetic, so that a vector can stand for a number ----------------------


@register_jitable
def drop(condition, x):
    """0 where the condition holds, else x, which may be NaN where it is dropped."""
    return type(x)(0) if condition else x


@register_jitable
def choose(condition, x, other):
    """x where the condition holds, else the other."""
    return x if condition else other


@register_jitable
def is_not_finite(x):
    """Whether x is NaN or infinite."""
    return math.isfinite(x) == 0  # `not` is no operator of vectors


# -- statistics --------------------------------------------------------------------------------------------------------


@register_jitable
def divide(x, count):
    """x / count; 0 where the count is 0."""
    empty = count == 0
    return drop(empty, x / choose(empty, type(count)(1), count))


@register_jitable
def per(x, count):
    """The same, rounded twice: where many x have one count, it is divided by once, and they are multiplied.

    1 / count would be infinite for a count near the smallest number, so both are scaled there, by what float32 holds.
    """
    empty, scale = count == 0, choose(count < 1e-30, type(count)(2.0**100), type(count)(1))
    return drop(empty, x * scale * (type(count)(1) / choose(empty, type(count)(1), count * scale)))


@register_jitable
def shifted_moments(count, shift, total, squares):
    """Mean and m2 = sum (x - mean)^2 from total = sum (x - shift) and squares = sum (x - shift)^2.

    With a value of the data as `shift` the subtraction loses at most log2(count / its weight) bits, however large the
    mean. Without any value both are 0. Of finite values m2 is finite: the largest number instead of infinity.
    """
    distance = per(total, count)
    mean, m2 = drop(count == 0, shift + distance), squares - total * distance
    m2 = drop(m2 < 0, m2)
    return mean, choose(math.isinf(squares) & math.isfinite(mean), type(m2)(LARGEST), m2)


@register_jitable
def is_far(shift, count, mean, m2):
    """Whether the subtraction in shifted_moments() has lost more than 10 bits, and the shift can be nearer to the mean.

    A value with next to no weight can be any number of deviations away from all others.
    """
    distance = mean - shift
    return (count * distance * distance > 1024 * m2) & (abs(distance) > 1e-14 * abs(mean))


@register_jitable
def combine(count_a, mean_a, m2_a, squares_a, count_b, mean_b, m2_b, squares_b):
    """Count, mean, m2 and squares of two sets of values together.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    if count_b == 0:
        return count_a, mean_a, m2_a, squares_a
    if count_a == 0:
        return count_b, mean_b, m2_b, squares_b
    return combine_some(count_a, mean_a, m2_a, squares_a, count_b, mean_b, m2_b, squares_b)


@register_jitable
def combine_some(count_a, mean_a, m2_a, squares_a, count_b, mean_b, m2_b, squares_b):
    """The same, where both have values."""
    count = count_a + count_b
    delta = mean_b - mean_a
    share = count_b / count
    m2 = m2_a + m2_b + delta * delta * count_a * share
    return count, mean_a + delta * share, m2, squares_a + squares_b


@register_jitable
def unbiased_count(count, squares):
    """The divisor of m2 for the variance with Bessel's correction: that of m values times m / (m - 1), at least 1 as in
    TensorFlow.

    squares: the sum of the squared weights, where count is the sum of the weights. m = count^2 / squares is how many
    values of equal weight would be as good: it does not depend on the scale of the weights.
    """
    divisor = count - per(squares, count)
    # Where next to all weight is one value's, the difference is what rounding has left of it.
    return choose(divisor <= 1e-12 * count, count, divisor)


@register_jitable
def moving_average(old, new, momentum):
    """old - (old - new) * (1 - momentum); exactly `new` for momentum 0 and `old` for 1, be they NaN or infinite."""
    moved = old - (old - new) * (type(momentum)(1) - momentum)
    return choose(momentum == 0, new, choose(momentum == 1, old, moved))


@register_jitable
def debiased_momentum(seen, momentum, weight):
    """The weight of all batches in an average after one of `weight`, and the momentum with which it owes nothing to the
    initial value: the share of the batches before. It is 1 where there is no weight at all.

    With weight = 1 - momentum, seen is 1 - momentum^t after t batches.

    Source: Kingma, Ba, "Adam: A method for stochastic optimization", 2015, section 3.
    """
    kept = momentum * seen
    total = kept + weight
    return total, choose(total == 0, type(total)(1), divide(kept, total))


@register_jitable
def stddev(variance, epsilon):
    """sigma = sqrt(variance + epsilon)."""
    return type(variance)(math.sqrt(variance + epsilon))


@register_jitable
def reciprocal_stddev(variance, epsilon):
    """1 / sigma; 0 where sigma is 0: all values that it is of are the mean, and the output is beta."""
    sigma = stddev(variance, epsilon)
    return divide(type(sigma)(1), sigma)


@register_jitable
def output_terms(mean, rounded_mean, rstd, r, d, gamma):
    """Scale and shift of y = (x - rounded_mean) * scale + shift + beta, which is (x_hat * r + d) * gamma + beta.

    The elements get the mean rounded to their own precision. Its error goes into the shift, so that a mean much larger
    than the deviation costs no digits.
    """
    scale = rstd * r * gamma
    return scale, d * gamma - (mean - rounded_mean) * scale


@register_jitable
def inference_terms(mean, rounded_mean, variance, epsilon, gamma):
    """Scale and shift of the same for moving statistics, without r and d."""
    scale = gamma * reciprocal_stddev(variance, epsilon)
    return scale, drop(mean == rounded_mean, (rounded_mean - mean) * scale)


@register_jitable
def clip(value, low, high):
    """`value` between the bounds; NaN stays NaN."""
    return choose(value < low, low, choose(value > high, high, value))


@register_jitable
def saturate(value, most):
    """`value`, but nothing finite beyond `most`, the largest number of a dtype; infinity and NaN stay what they are."""
    return choose(math.isfinite(value), clip(value, -most, most), value)


@register_jitable
def renorm_correction(mean, sigma, renorm_mean, renorm_stddev, epsilon, rmin, rmax, dmax):
    """r and d of batch renormalization, clipped, from the moving statistics before this step.

    Source: Ioffe, "Batch Renormalization", 2017, algorithm 1; the floor of the divisor is TensorFlow's.
    """
    floor = math.sqrt(epsilon)
    divisor = choose(renorm_stddev < floor, floor, renorm_stddev)
    return clip(sigma / divisor, rmin, rmax), clip((mean - renorm_mean) / divisor, -dmax, dmax)


@register_jitable
def variance_of_stddev(sigma, epsilon):
    """The variance for which stddev() gives `sigma`, at least 0."""
    variance = sigma * sigma - epsilon
    return drop(variance < 0, variance)


@register_jitable
def input_gradient_terms(count, sum_dy, sum_dy_centered, rstd):
    """bias and slope of dx = scale * (dy - (bias + (x - mean) * slope)), where scale = gamma * r / sigma.

    With scale outside, every factor is in the range of float32 whenever dx is.
    """
    return divide(sum_dy, count), rstd * (rstd * divide(sum_dy_centered, count))


@register_jitable
def gamma_gradient(sum_dy, sum_dy_centered, rstd, r, d):
    """sum dy * (x_hat * r + d)."""
    return sum_dy_centered * rstd * r + sum_dy * d


# -- elements ----------------------------------------------------------------------------------------------------------


@register_jitable
def is_left_out(x, weight):
    """Whether an element has no part in the sums of the gradient. One without weight has, as its output depends on
    gamma and on all others, but not if there is no such output: if x is not finite."""
    return (weight <= 0) & is_not_finite(x)


@register_jitable
def normalize(x, mean, scale, shift):
    """One output. The mean is subtracted first: folding it into the shift would lose the digits at large means."""
    return (x - mean) * scale + shift


@register_jitable
def adjust(value, a, b, gamma, beta):
    """(x_hat * a + b) * gamma + beta, given value = x_hat * gamma."""
    return value * a + (b * gamma + beta)


@register_jitable
def output(x, mean, scale, shift, a, b, gamma, beta, residual):
    """One output before its activation; a and b, residual: None where there is none."""
    z = normalize(x, mean, scale, shift)
    if a is not None:
        z = adjust(z, a, b, gamma, beta)
    if residual is not None:
        z = z + residual
    return z


@register_jitable
def relu(z):
    """z where it is positive, else 0; NaN stays NaN."""
    return drop(z <= 0, z)


@register_jitable
def relu_gradient(dy, z):
    """What relu(z) lets through of the gradient of its result."""
    return drop(z <= 0, dy)


@register_jitable
def input_gradient(dy, x, mean, scale, bias, slope, a, weight):
    """One dx, with the terms of input_gradient_terms(), the a of an adjustment and the weight of x in the moments;
    None where there is none."""
    # statistics that are constants let x be infinite
    term = choose(slope == 0, bias, bias + (x - mean) * slope)
    if a is not None:
        dy = dy * a
    if weight is None:
        return scale * (dy - term)
    return drop(is_left_out(x, weight), scale * (dy - drop(weight <= 0, weight * term)))
