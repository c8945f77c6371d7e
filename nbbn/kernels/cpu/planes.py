"""Loops for contiguous runs of one statistic: arrays are [R0, K0, R1], statistics flat, one per k0.

A None argument (weights, a, b) is a type to Numba: its branch is gone from the compiled loop.
"""

import numpy as np

from nbbn import rules
from nbbn.kernels.cpu.elements import element, summing
from nbbn.kernels.cpu.scalars import convert, load


@element
def extent(x):
    return x.shape[0], x.shape[1], x.shape[2], 1


@element
def shifts(x, weights, shift):
    """Write each statistic's first value that counts, in float64; 0 where none does."""
    for k0 in range(x.shape[1]):
        shift[k0] = 0.0 if weights is not None else load(x[0, k0, 0])
        if weights is not None:
            found = False
            for r0 in range(x.shape[0]):
                for r1 in range(x.shape[2]):
                    if not found and weights[r0, k0, r1] > 0:
                        shift[k0] = load(x[r0, k0, r1])
                        found = True


@summing
def moments(x, weights, shift, bounds, partial):
    """Write sum (x - shift), sum (x - shift)^2 and, with weights, their count."""
    chunk, k0, r0_begin, r0_end, r1_begin, r1_end, _, _ = bounds
    count, total, squares, origin = 0.0, 0.0, 0.0, shift[k0]
    for r0 in range(r0_begin, r0_end):
        v = x[r0, k0, r1_begin:r1_end]
        if weights is None:
            for i in range(v.size):
                centered = np.float64(load(v[i])) - origin
                total += centered
                squares += centered * centered
        else:
            w = weights[r0, k0, r1_begin:r1_end]
            for i in range(v.size):
                # What does not count may be NaN.
                centered = np.float64(load(v[i])) - origin if w[i] > 0 else 0.0
                count += w[i]
                total += w[i] * centered
                squares += w[i] * centered * centered
    partial[chunk, 0, k0] = total
    partial[chunk, 1, k0] = squares
    if weights is not None:
        partial[chunk, 2, k0] = count


@element
def normalize(x, a, b, coefficients, bounds, y):
    """Write y = (x - mean) * scale + shift, adjusted by a and b where they are given."""
    _, k0, r0_begin, r0_end, r1_begin, r1_end, _, _ = bounds
    mean, scale, shift = coefficients[0, k0], coefficients[1, k0], coefficients[2, k0]
    for r0 in range(r0_begin, r0_end):
        v, out = x[r0, k0, r1_begin:r1_end], y[r0, k0, r1_begin:r1_end]
        if a is None:
            for i in range(v.size):
                out[i] = convert(rules.normalize(load(v[i]), mean, scale, shift), out)
        else:
            gamma, beta = coefficients[3, k0], coefficients[4, k0]
            av, bv = a[r0, k0, r1_begin:r1_end], b[r0, k0, r1_begin:r1_end]
            for i in range(v.size):
                value = rules.normalize(load(v[i]), mean, scale, shift)
                out[i] = convert(rules.adjust(value, av[i], bv[i], gamma, beta), out)


@summing
def gradient_sums(dy, x, a, b, saved_mean, bounds, partial):
    """Write sum dy * a and sum dy * a * (x - mean); with a and b also sum dy and sum dy * b."""
    chunk, k0, r0_begin, r0_end, r1_begin, r1_end, _, _ = bounds
    total, centered, plain, offset, mean = 0.0, 0.0, 0.0, 0.0, saved_mean[k0]
    for r0 in range(r0_begin, r0_end):
        v, g = x[r0, k0, r1_begin:r1_end], dy[r0, k0, r1_begin:r1_end]
        if a is None:
            for i in range(v.size):
                gi = np.float64(load(g[i]))
                total += gi
                centered += gi * (np.float64(load(v[i])) - mean)
        else:
            av, bv = a[r0, k0, r1_begin:r1_end], b[r0, k0, r1_begin:r1_end]
            for i in range(v.size):
                gi = np.float64(load(g[i]))
                total += gi * av[i]
                centered += gi * av[i] * (np.float64(load(v[i])) - mean)
                plain += gi
                offset += gi * bv[i]
    partial[chunk, 0, k0] = total
    partial[chunk, 1, k0] = centered
    if a is not None:
        partial[chunk, 2, k0] = plain
        partial[chunk, 3, k0] = offset


@element
def input_gradient(dy, x, weights, a, coefficients, bounds, dx):
    """Write dx = scale * (dy * a - w * (bias + (x - mean) * slope)); a and w are 1 where they are not given."""
    _, k0, r0_begin, r0_end, r1_begin, r1_end, _, _ = bounds
    mean, scale = coefficients[0, k0], coefficients[1, k0]
    bias, slope = coefficients[2, k0], coefficients[3, k0]
    one = type(scale)(1)
    for r0 in range(r0_begin, r0_end):
        v, g = x[r0, k0, r1_begin:r1_end], dy[r0, k0, r1_begin:r1_end]
        out = dx[r0, k0, r1_begin:r1_end]
        for i in range(v.size):
            gi = load(g[i]) if a is None else load(g[i]) * a[r0, k0, r1_begin + i]
            wi = one if weights is None else weights[r0, k0, r1_begin + i]
            out[i] = convert(rules.input_gradient(gi, load(v[i]), mean, scale, bias, slope, wi), out)
