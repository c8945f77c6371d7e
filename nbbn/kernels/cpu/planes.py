"""Loops for contiguous runs of one statistic: arrays are [R0, K0, R1], statistics flat, one per k0.

A None argument (an operand, relu, dresidual) is a type to Numba: its branch is gone from the compiled loop.
"""

import numpy as np

from nbbn import rules
from nbbn.kernels.cpu.elements import element, summing
from nbbn.kernels.cpu.epilogue import gradient, output
from nbbn.kernels.cpu.memory import BLOCK, DIRECT, STREAMED, expect, fence, local, run, write
from nbbn.kernels.cpu.scalars import load, store
from nbbn.kernels.tasks import STORE


@element
def extent(x):
    return x.shape[0], x.shape[1], x.shape[2], 1


@element
def statistics(bounds, grid):
    """The first statistic that a task covers, and the one after the last."""
    return bounds[1], bounds[1] + 1


@element
def shifts(x, weights, bounds, grid, shift):
    """Write each statistic's first value that counts, in float64; 0 where none does."""
    k0 = bounds[1]
    shift[k0] = 0.0 if weights is not None else load(run(x, (0, k0), 0, 1), 0)
    if weights is not None:
        found = False
        for r0 in range(x.shape[0]):
            for r1 in range(x.shape[2]):
                if not found and weights[r0, k0, r1] > 0:
                    shift[k0] = load(run(x, (r0, k0), r1, r1 + 1), 0)
                    found = True


@summing
def moments(x, weights, shift, bounds, grid, partial):
    """Write sum (x - shift), sum (x - shift)^2 and, with weights, their count."""
    chunk, k0, r0_begin, r0_end, r1_begin, r1_end, _, _ = bounds
    count, total, squares, origin = 0.0, 0.0, 0.0, shift[k0]
    for r0 in range(r0_begin, r0_end):
        v, w = run(x, (r0, k0), r1_begin, r1_end), run(weights, (r0, k0), r1_begin, r1_end)
        for i in range(r1_end - r1_begin):
            centered = np.float64(load(v, i)) - origin
            if weights is None:
                total += centered
                squares += centered * centered
            else:
                wi = load(w, i)
                centered = centered if wi > 0 else 0.0  # what does not count may be NaN
                count += wi
                total += wi * centered
                squares += wi * centered * centered
    partial[chunk, 0, k0] = total
    partial[chunk, 1, k0] = squares
    if weights is not None:
        partial[chunk, 2, k0] = count


@element
def normalize(x, residual, a, b, coefficients, relu, bounds, grid, y):
    """Write y = (x - mean) * scale + shift, and what is asked for of: adjusted by a and b, plus residual, relu."""
    _, k0, r0_begin, r0_end, r1_begin, r1_end, _, _ = bounds
    mode, block = grid[STORE], local(y)
    mean, scale, shift = coefficients[0, k0], coefficients[1, k0], coefficients[2, k0]
    gamma, beta = coefficients[-2, k0], coefficients[-1, k0]  # where there is an adjustment
    step = max(1, r1_end - r1_begin) if mode == DIRECT else BLOCK
    for r0 in range(r0_begin, r0_end):
        for begin in range(r1_begin, r1_end, step):
            place, end = (r0, k0), min(r1_end, begin + step)
            v, rv = run(x, place, begin, end), run(residual, place, begin, end)
            av, bv, out = run(a, place, begin, end), run(b, place, begin, end), run(y, place, begin, end)
            expect(out, mode)
            target = out if mode == DIRECT else block
            for i in range(end - begin):
                ai, bi, ri = load(av, i), load(bv, i), load(rv, i)
                store(target, i, output(load(v, i), mean, scale, shift, ai, bi, gamma, beta, ri, relu))
            write(block, out, mode)
    if mode == STREAMED:
        fence()


@summing
def gradient_sums(dy, x, residual, a, b, saved_mean, forward, relu, bounds, grid, partial):
    """Write sum dy * a and sum dy * a * (x - mean); with a and b also sum dy and sum dy * b.

    dy counts as far as the activation lets it through; forward: the coefficients of normalize().
    """
    chunk, k0, r0_begin, r0_end, r1_begin, r1_end, _, _ = bounds
    total, centered, plain, offset = 0.0, 0.0, 0.0, 0.0
    mean, scale, shift, exact_mean = forward[0, k0], forward[1, k0], forward[2, k0], saved_mean[k0]
    gamma, beta = forward[-2, k0], forward[-1, k0]
    for r0 in range(r0_begin, r0_end):
        place = r0, k0
        v, g = run(x, place, r1_begin, r1_end), run(dy, place, r1_begin, r1_end)
        rv, av = run(residual, place, r1_begin, r1_end), run(a, place, r1_begin, r1_end)
        bv = run(b, place, r1_begin, r1_end)
        for i in range(r1_end - r1_begin):
            xi, ai, bi = load(v, i), load(av, i), load(bv, i)
            gi = np.float64(gradient(load(g, i), xi, mean, scale, shift, ai, bi, gamma, beta, load(rv, i), relu))
            if a is None:
                total += gi
                centered += gi * (np.float64(xi) - exact_mean)
            else:
                total += gi * ai
                centered += gi * ai * (np.float64(xi) - exact_mean)
                plain += gi
                offset += gi * bi
    partial[chunk, 0, k0] = total
    partial[chunk, 1, k0] = centered
    if a is not None:
        partial[chunk, 2, k0] = plain
        partial[chunk, 3, k0] = offset


@element
def input_gradient(dy, x, residual, weights, a, b, forward, relu, coefficients, bounds, grid, dx, dresidual):
    """Write dx = scale * (dy * a - w * (bias + (x - mean) * slope)); a and w are 1 where they are not given.

    dy counts as far as the activation lets it through, and that is dresidual, if it is asked for.
    """
    _, k0, r0_begin, r0_end, r1_begin, r1_end, _, _ = bounds
    mode, block, second_block = grid[STORE], local(dx), local(dx)
    mean, scale, bias, slope = coefficients[0, k0], coefficients[1, k0], coefficients[2, k0], coefficients[3, k0]
    fmean, fscale, fshift = forward[0, k0], forward[1, k0], forward[2, k0]
    gamma, beta = forward[-2, k0], forward[-1, k0]
    step = max(1, r1_end - r1_begin) if mode == DIRECT else BLOCK
    for r0 in range(r0_begin, r0_end):
        for begin in range(r1_begin, r1_end, step):
            place, end = (r0, k0), min(r1_end, begin + step)
            v, g, out = run(x, place, begin, end), run(dy, place, begin, end), run(dx, place, begin, end)
            rv, wv, av = run(residual, place, begin, end), run(weights, place, begin, end), run(a, place, begin, end)
            bv, second_out = run(b, place, begin, end), run(dresidual, place, begin, end)
            expect(out, mode)
            target = out if mode == DIRECT else block
            if dresidual is not None:
                expect(second_out, mode)
                second = second_out if mode == DIRECT else second_block
            for i in range(end - begin):
                xi, ai, bi, ri = load(v, i), load(av, i), load(bv, i), load(rv, i)
                gi = gradient(load(g, i), xi, fmean, fscale, fshift, ai, bi, gamma, beta, ri, relu)
                if dresidual is not None:
                    store(second, i, gi)
                store(target, i, rules.input_gradient(gi, xi, mean, scale, bias, slope, ai, load(wv, i)))
            write(block, out, mode)
            if dresidual is not None:
                write(second_block, second_out, mode)
    if mode == STREAMED:
        fence()
