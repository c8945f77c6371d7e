"""Loops for contiguous runs of one statistic: arrays are [R0, K0, R1], statistics flat, one per k0.

A None argument (an operand, relu, dz) is a type to Numba: its branch is gone from the compiled loop.
"""

import numpy as np

from nbbn.core import rules
from nbbn.kernels import channel
from nbbn.kernels.cpu.elements import element, summing
from nbbn.kernels.cpu.memory import BLOCK, DIRECT, STREAMED, expect, fence, local, segment, write
from nbbn.kernels.cpu.scalars import load, store
from nbbn.kernels.cpu.shared import gradient, gradient_terms, moment_terms, output, output_of


@element
def extent(x):
    return x.shape[0], x.shape[1], x.shape[2], 1


@element
def statistics(bounds, grid):
    """The first statistic that a task covers, and the one after the last."""
    return bounds.k0, bounds.k0 + 1


@element
def shifts(x, weights, bounds, grid, shift):
    """Write each statistic's first value that counts, in float64; 0 where none does."""
    k0 = bounds.k0
    shift[k0] = 0.0 if weights is not None else load(segment(x, (0, k0), 0, 1), 0)
    if weights is not None:
        found = False
        for r0 in range(x.shape[0]):
            for r1 in range(x.shape[2]):
                if not found and weights[r0, k0, r1] > 0:
                    shift[k0] = load(segment(x, (r0, k0), r1, r1 + 1), 0)
                    found = True


@summing
def moments(x, weights, shift, bounds, grid, partial):
    """Write sum (x - shift), sum (x - shift)^2 and, with weights, their sum and that of their squares."""
    chunk, k0 = bounds.chunk, bounds.k0
    begin, end = bounds.r1_begin, bounds.r1_end
    total, squares, count, count2, origin = 0.0, 0.0, 0.0, 0.0, shift[k0]
    for r0 in range(bounds.r0_begin, bounds.r0_end):
        v, w = segment(x, (r0, k0), begin, end), segment(weights, (r0, k0), begin, end)
        for i in range(end - begin):
            t, q, n, n2 = moment_terms(np.float64(load(v, i)), origin, load(w, i))
            total += t
            squares += q
            if weights is not None:
                count += n
                count2 += n2
    partial[chunk, 0, k0] = total
    partial[chunk, 1, k0] = squares
    if weights is not None:
        partial[chunk, 2, k0] = count
        partial[chunk, 3, k0] = count2


@element
def normalize(x, residual, a, b, coefficients, relu, bounds, grid, y):
    """Write y = (x - mean) * scale + shift, and what is asked for of: adjusted by a and b, plus residual, relu."""
    k0, r1_begin, r1_end = bounds.k0, bounds.r1_begin, bounds.r1_end
    mode, block = grid.store, local(y)
    mean, scale, shift, gamma, beta = output_of(coefficients, k0, a)
    step = max(1, r1_end - r1_begin) if mode == DIRECT else BLOCK
    for r0 in range(bounds.r0_begin, bounds.r0_end):
        for begin in range(r1_begin, r1_end, step):
            place, end = (r0, k0), min(r1_end, begin + step)
            v, rv = segment(x, place, begin, end), segment(residual, place, begin, end)
            av, bv, out = segment(a, place, begin, end), segment(b, place, begin, end), segment(y, place, begin, end)
            expect(out, mode)
            target = out if mode == DIRECT else block
            for i in range(end - begin):
                ai, bi, ri = load(av, i), load(bv, i), load(rv, i)
                store(target, i, output(load(v, i), mean, scale, shift, ai, bi, gamma, beta, ri, relu))
            write(block, out, mode)
    if mode == STREAMED:
        fence()


@summing
def gradient_sums(dy, x, residual, weights, a, b, saved_mean, forward, relu, bounds, grid, partial):
    """Write sum dy * a and sum dy * a * (x - mean); with a and b also sum dy and sum dy * b.

    dy counts as far as the activation lets it through; forward: the coefficients of normalize().
    """
    chunk, k0, begin, end = bounds.chunk, bounds.k0, bounds.r1_begin, bounds.r1_end
    total, centered, plain, offset = 0.0, 0.0, 0.0, 0.0
    mean, scale, shift, gamma, beta = output_of(forward, k0, a)
    exact_mean = saved_mean[k0]
    for r0 in range(bounds.r0_begin, bounds.r0_end):
        place = r0, k0
        v, g, wv = segment(x, place, begin, end), segment(dy, place, begin, end), segment(weights, place, begin, end)
        rv, av, bv = segment(residual, place, begin, end), segment(a, place, begin, end), segment(b, place, begin, end)
        for i in range(end - begin):
            xi, ai, bi = load(v, i), load(av, i), load(bv, i)
            gi = np.float64(gradient(load(g, i), xi, mean, scale, shift, ai, bi, gamma, beta, load(rv, i), relu))
            t, c, p, o = gradient_terms(gi, np.float64(xi), exact_mean, ai, bi, load(wv, i))
            total += t
            centered += c
            if a is not None:
                plain += p
                offset += o
    partial[chunk, channel.SUM_DYA, k0] = total
    partial[chunk, channel.SUM_DYA_X, k0] = centered
    if a is not None:
        partial[chunk, channel.SUM_DY, k0] = plain
        partial[chunk, channel.SUM_DYB, k0] = offset


@element
def input_gradient(dy, x, residual, weights, a, b, forward, relu, coefficients, bounds, grid, dx, dz):
    """Write dx = scale * (dy * a - w * (bias + (x - mean) * slope)); a and w are 1 where they are not given.

    dy counts as far as the activation lets it through, and that is dz, if it is asked for.
    """
    k0, r1_begin, r1_end = bounds.k0, bounds.r1_begin, bounds.r1_end
    mode, block, dz_block = grid.store, local(dx), local(dz)
    mean, scale = coefficients[channel.DX_MEAN, k0], coefficients[channel.DX_SCALE, k0]
    bias, slope = coefficients[channel.DX_BIAS, k0], coefficients[channel.DX_SLOPE, k0]
    fmean, fscale, fshift, gamma, beta = output_of(forward, k0, a)
    step = max(1, r1_end - r1_begin) if mode == DIRECT else BLOCK
    for r0 in range(bounds.r0_begin, bounds.r0_end):
        for begin in range(r1_begin, r1_end, step):
            place, end = (r0, k0), min(r1_end, begin + step)
            v, g, out = segment(x, place, begin, end), segment(dy, place, begin, end), segment(dx, place, begin, end)
            rv, wv = segment(residual, place, begin, end), segment(weights, place, begin, end)
            av, bv = segment(a, place, begin, end), segment(b, place, begin, end)
            dz_out = segment(dz, place, begin, end)
            expect(out, mode)
            expect(dz_out, mode)
            target = out if mode == DIRECT else block
            dz_target = dz_out if mode == DIRECT else dz_block
            for i in range(end - begin):
                xi, ai, bi, ri = load(v, i), load(av, i), load(bv, i), load(rv, i)
                gi = gradient(load(g, i), xi, fmean, fscale, fshift, ai, bi, gamma, beta, ri, relu)
                store(dz_target, i, gi)
                store(target, i, rules.input_gradient(gi, xi, mean, scale, bias, slope, ai, load(wv, i)))
            write(dz_block, dz_out, mode)
            write(block, out, mode)
    if mode == STREAMED:
        fence()
