"""Loops for contiguous runs across statistics: arrays are [R0, K0, R1, K1], statistics flat, at k0 * K1 + k1.

The same functions as in planes.py, with a vector of accumulators in place of a scalar one. One row at a time: the
compiler vectorizes that, and an unrolled block of rows needs more alias checks than it saves.
"""

import numpy as np

from nbbn import rules
from nbbn.kernels.cpu.elements import element, summing
from nbbn.kernels.cpu.scalars import convert, load


@element
def extent(x):
    return x.shape


@element
def shifts(x, weights, shift):
    """Write each statistic's first value that counts, in float64; 0 where none does."""
    r0_size, k0_size, r1_size, k1_size = x.shape
    for k0 in range(k0_size):
        for k1 in range(k1_size):
            shift[k0 * k1_size + k1] = 0.0 if weights is not None else load(x[0, k0, 0, k1])
        if weights is not None:
            missing = np.ones(k1_size, np.bool_)
            for r0 in range(r0_size):
                for r1 in range(r1_size):
                    for k1 in range(k1_size):
                        if missing[k1] and weights[r0, k0, r1, k1] > 0:
                            shift[k0 * k1_size + k1] = load(x[r0, k0, r1, k1])
                            missing[k1] = False


@summing
def moments(x, weights, shift, bounds, partial):
    """Write sum (x - shift), sum (x - shift)^2 and, with weights, their count."""
    chunk, k0, r0_begin, r0_end, r1_begin, r1_end, k1_begin, k1_end = bounds
    begin, end = k0 * x.shape[3] + k1_begin, k0 * x.shape[3] + k1_end
    origin = shift[begin:end]
    total, squares = partial[chunk, 0, begin:end], partial[chunk, 1, begin:end]
    for i in range(origin.size):
        total[i] = 0.0
        squares[i] = 0.0
    if weights is not None:
        count = partial[chunk, 2, begin:end]
        for i in range(origin.size):
            count[i] = 0.0
    for r0 in range(r0_begin, r0_end):
        for r1 in range(r1_begin, r1_end):
            v = x[r0, k0, r1, k1_begin:k1_end]
            if weights is None:
                for i in range(v.size):
                    centered = np.float64(load(v[i])) - origin[i]
                    total[i] += centered
                    squares[i] += centered * centered
            else:
                w = weights[r0, k0, r1, k1_begin:k1_end]
                for i in range(v.size):
                    # What does not count may be NaN.
                    centered = np.float64(load(v[i])) - origin[i] if w[i] > 0 else 0.0
                    count[i] += w[i]
                    total[i] += w[i] * centered
                    squares[i] += w[i] * centered * centered


@element
def normalize(x, a, b, coefficients, bounds, y):
    """Write y = (x - mean) * scale + shift, adjusted by a and b where they are given."""
    _, k0, r0_begin, r0_end, r1_begin, r1_end, k1_begin, k1_end = bounds
    begin, end = k0 * x.shape[3] + k1_begin, k0 * x.shape[3] + k1_end
    mean, scale = coefficients[0, begin:end], coefficients[1, begin:end]
    shift = coefficients[2, begin:end]
    for r0 in range(r0_begin, r0_end):
        for r1 in range(r1_begin, r1_end):
            v, out = x[r0, k0, r1, k1_begin:k1_end], y[r0, k0, r1, k1_begin:k1_end]
            if a is None:
                for i in range(v.size):
                    out[i] = convert(rules.normalize(load(v[i]), mean[i], scale[i], shift[i]), out)
            else:
                gamma, beta = coefficients[3, begin:end], coefficients[4, begin:end]
                av, bv = a[r0, k0, r1, k1_begin:k1_end], b[r0, k0, r1, k1_begin:k1_end]
                for i in range(v.size):
                    value = rules.normalize(load(v[i]), mean[i], scale[i], shift[i])
                    out[i] = convert(rules.adjust(value, av[i], bv[i], gamma[i], beta[i]), out)


@summing
def gradient_sums(dy, x, a, b, saved_mean, bounds, partial):
    """Write sum dy * a and sum dy * a * (x - mean); with a and b also sum dy and sum dy * b."""
    chunk, k0, r0_begin, r0_end, r1_begin, r1_end, k1_begin, k1_end = bounds
    begin, end = k0 * x.shape[3] + k1_begin, k0 * x.shape[3] + k1_end
    mean = saved_mean[begin:end]
    total, centered = partial[chunk, 0, begin:end], partial[chunk, 1, begin:end]
    for i in range(mean.size):
        total[i] = 0.0
        centered[i] = 0.0
    if a is not None:
        plain, offset = partial[chunk, 2, begin:end], partial[chunk, 3, begin:end]
        for i in range(mean.size):
            plain[i] = 0.0
            offset[i] = 0.0
    for r0 in range(r0_begin, r0_end):
        for r1 in range(r1_begin, r1_end):
            v, g = x[r0, k0, r1, k1_begin:k1_end], dy[r0, k0, r1, k1_begin:k1_end]
            if a is None:
                for i in range(v.size):
                    gi = np.float64(load(g[i]))
                    total[i] += gi
                    centered[i] += gi * (np.float64(load(v[i])) - mean[i])
            else:
                av, bv = a[r0, k0, r1, k1_begin:k1_end], b[r0, k0, r1, k1_begin:k1_end]
                for i in range(v.size):
                    gi = np.float64(load(g[i]))
                    total[i] += gi * av[i]
                    centered[i] += gi * av[i] * (np.float64(load(v[i])) - mean[i])
                    plain[i] += gi
                    offset[i] += gi * bv[i]


@element
def input_gradient(dy, x, weights, a, coefficients, bounds, dx):
    """Write dx = scale * (dy * a - w * (bias + (x - mean) * slope)); a and w are 1 where they are not given."""
    _, k0, r0_begin, r0_end, r1_begin, r1_end, k1_begin, k1_end = bounds
    begin, end = k0 * x.shape[3] + k1_begin, k0 * x.shape[3] + k1_end
    mean, scale = coefficients[0, begin:end], coefficients[1, begin:end]
    bias, slope = coefficients[2, begin:end], coefficients[3, begin:end]
    one = type(coefficients[0, 0])(1)
    for r0 in range(r0_begin, r0_end):
        for r1 in range(r1_begin, r1_end):
            v, g = x[r0, k0, r1, k1_begin:k1_end], dy[r0, k0, r1, k1_begin:k1_end]
            out = dx[r0, k0, r1, k1_begin:k1_end]
            for i in range(v.size):
                gi = load(g[i]) if a is None else load(g[i]) * a[r0, k0, r1, k1_begin + i]
                wi = one if weights is None else weights[r0, k0, r1, k1_begin + i]
                out[i] = convert(rules.input_gradient(gi, load(v[i]), mean[i], scale[i], bias[i], slope[i], wi), out)
