"""The arithmetic of one statistic: scalar functions that every target compiles and plain Python can run.

Constants take the type of an argument (`type(x)(1)`), because a literal would turn float32 into float64 on a GPU, and
bounds are branches instead of min and max, because those drop NaN on a GPU.
"""

import math

from numba.extending import register_jitable


@register_jitable
def shifted_moments(count, shift, total, squares):
    """Mean and m2 = sum (x - mean)^2 from total = sum (x - shift) and squares = sum (x - shift)^2.

    With a value of the data as `shift` the subtraction loses at most log2(count) bits, however large the mean.
    Without any value both are 0.
    """
    zero = type(total)(0)
    if count == 0:
        return zero, zero
    m2 = squares - total * (total / count)
    return shift + total / count, (zero if m2 < 0 else m2)


@register_jitable
def combine(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Count, mean and m2 of two sets of values together.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    if count_b == 0:
        return count_a, mean_a, m2_a
    if count_a == 0:
        return count_b, mean_b, m2_b
    count = count_a + count_b
    delta = mean_b - mean_a
    share = count_b / count
    return count, mean_a + delta * share, m2_a + m2_b + delta * delta * count_a * share


@register_jitable
def biased_variance(count, m2):
    """The variance with divisor `count`; 0 without any value."""
    return m2 / count if count > 0 else type(m2)(0)


@register_jitable
def unbiased_variance(count, m2):
    """The variance with Bessel's correction: divisor count - 1, at least 1 as in TensorFlow."""
    one = type(count)(1)
    return m2 / (count - one if count > one + one else one)


@register_jitable
def moving_average(old, new, momentum):
    """old - (old - new) * (1 - momentum); exactly `new` for momentum 0 and `old` for 1, be they NaN or infinite."""
    one = type(momentum)(1)
    if momentum == 0:
        return new
    if momentum == one:
        return old
    return old - (old - new) * (one - momentum)


@register_jitable
def stddev(variance, epsilon):
    """sigma = sqrt(variance + epsilon)."""
    return type(variance)(math.sqrt(variance + epsilon))  # a Python float, in plain Python, would raise for 1 / 0


@register_jitable
def output_terms(mean, rounded_mean, rstd, r, d, gamma):
    """Scale and shift of y = (x - rounded_mean) * scale + shift + beta, which is (x_hat * r + d) * gamma + beta.

    The elements get the mean rounded to their own precision. Its error goes into the shift, so that a mean much larger
    than the deviation costs no digits.
    """
    scale = rstd * r * gamma
    return scale, d * gamma - (mean - rounded_mean) * scale


@register_jitable
def inference_scale(gamma, variance, epsilon):
    """gamma / sigma, for a moving variance."""
    return gamma * (type(variance)(1) / stddev(variance, epsilon))


@register_jitable
def clip(value, low, high):
    """`value` between the bounds; NaN stays NaN."""
    if value < low:
        return low
    if value > high:
        return high
    return value


@register_jitable
def renorm_correction(mean, sigma, renorm_mean, renorm_stddev, epsilon, rmin, rmax, dmax):
    """r and d of batch renormalization, clipped, from the moving statistics before this step.

    Source: Ioffe, "Batch Renormalization", 2017, algorithm 1; the floor of the divisor is TensorFlow's.
    """
    floor = math.sqrt(epsilon)
    divisor = floor if renorm_stddev < floor else renorm_stddev
    return clip(sigma / divisor, rmin, rmax), clip((mean - renorm_mean) / divisor, -dmax, dmax)


@register_jitable
def variance_of_stddev(sigma, epsilon):
    """The variance for which stddev() gives `sigma`, at least 0."""
    variance = sigma * sigma - epsilon
    return type(variance)(0) if variance < 0 else variance


@register_jitable
def input_gradient_terms(count, sum_dy, sum_dy_centered, rstd):
    """bias and slope of dx = scale * (dy - (bias + (x - mean) * slope)), where scale = gamma * r / sigma.

    With scale outside, every factor is in the range of float32 whenever dx is.
    """
    if count == 0:
        zero = type(rstd)(0)
        return zero, zero
    return sum_dy / count, rstd * (rstd * (sum_dy_centered / count))


@register_jitable
def gamma_gradient(sum_dy, sum_dy_centered, rstd, r, d):
    """sum dy * (x_hat * r + d)."""
    return sum_dy_centered * rstd * r + sum_dy * d


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
    return type(z)(0) if z <= 0 else z


@register_jitable
def relu_gradient(dy, z):
    """What relu(z) lets through of the gradient of its result."""
    return type(dy)(0) if z <= 0 else dy


@register_jitable
def input_gradient(dy, x, mean, scale, bias, slope, a, weight):
    """One dx, with the terms of input_gradient_terms(), the a of an adjustment and the weight of x in the moments;
    None where there is none."""
    term = bias if slope == 0 else bias + (x - mean) * slope  # statistics that are constants let x be infinite
    if a is not None:
        dy = dy * a
    if weight is not None:
        term = weight * term
    return scale * (dy - term)
