"""Loops for contiguous runs across statistics: arrays are [R0, K0, R1, W], a row is one x[r0, k0, r1].

The functions of planes.py, which says what each of them does, with vectors of accumulators in place of scalar ones. A
column of W is a statistic of its own, or several belong to one (columns.py): short planes lie side by side in a row,
and of few channels several periods do, so that the loops are long.

Sums take four rows at a time, which halves the time that the accumulators cost. The four are a quarter of the chunk
apart: each is a long sequence for the processor's prefetcher, which four neighbours disturb (14 instead of 33 GB/s).
"""

from types import SimpleNamespace

import numpy as np

from nbbn.core import rules
from nbbn.kernels import channel
from nbbn.kernels.cpu.columns import FOLDED, PLAIN
from nbbn.kernels.cpu.elements import adding, element, inlined
from nbbn.kernels.cpu.memory import DIRECT, STREAMED, ahead, expect, fence, local, local_sums, segment, write
from nbbn.kernels.cpu.scalars import load, store
from nbbn.kernels.cpu.shared import gradient, gradient_terms, moment_terms, output


@element
def extent(x):
    """R1 counts all rows of a k0: r0 * R1 + r1."""
    return 1, x.shape[1], x.shape[0] * x.shape[2], x.shape[3]


@element
def place(x, r, k0):
    return r // x.shape[2], k0, r % x.shape[2]


@element
def after(x, place):
    """The place of the next row: a division per row would take as long as a short row does."""
    r0, k0, r1 = place
    return (r0, k0, r1 + 1) if r1 + 1 < x.shape[2] else (r0 + 1, k0, 0)


@adding
def terms_of(v, w, i, origin):
    """What the i-th element adds to the sums of moments()."""
    return moment_terms(np.float64(load(v, i)), origin, load(w, i))


@inlined
def outputs(v, rv, av, bv, mean, scale, shift, gamma, beta, relu, target):
    """Write a row of normalize()."""
    for i in range(v.size):
        m, s, h, g, t = load(mean, i), load(scale, i), load(shift, i), load(gamma, i), load(beta, i)
        store(target, i, output(load(v, i), m, s, h, load(av, i), load(bv, i), g, t, load(rv, i), relu))


@inlined
def input_gradients(g, v, rv, wv, av, bv, forward, relu, coefficients, second, target):
    """Write a row of input_gradient()."""
    fmean, fscale, fshift, gamma, beta = forward
    mean, scale, bias, slope = coefficients
    for i in range(v.size):
        xi, ai, bi, ri = load(v, i), load(av, i), load(bv, i), load(rv, i)
        m, s, h, gm, bt = load(fmean, i), load(fscale, i), load(fshift, i), load(gamma, i), load(beta, i)
        gi = gradient(load(g, i), xi, m, s, h, ai, bi, gm, bt, ri, relu)
        store(second, i, gi)
        m, s, h, e = load(mean, i), load(scale, i), load(bias, i), load(slope, i)
        store(target, i, rules.input_gradient(gi, xi, m, s, h, e, ai, load(wv, i)))


@adding
def gradient_terms_of(g, v, rv, wv, av, bv, i, mean, scale, shift, gamma, beta, relu, exact_mean):
    """What the i-th element adds to the sums of gradient_sums()."""
    xi, ai, bi = load(v, i), load(av, i), load(bv, i)
    gi = np.float64(gradient(load(g, i), xi, mean, scale, shift, ai, bi, gamma, beta, load(rv, i), relu))
    return gradient_terms(gi, np.float64(xi), exact_mean, ai, bi, load(wv, i))


@inlined
def clear(sums, count):
    """Set the beginning of a local array to 0; None stays None."""
    for i in range(count):
        store(sums, i, 0.0)


@inlined
def add(sums, i, value):
    """Add to an element of a local array; None stays None. What is always there is faster without this call."""
    if sums is not None:
        store(sums, i, load(sums, i) + value)


def loops(columns: SimpleNamespace) -> SimpleNamespace:
    """The functions for one way of the columns."""
    statistics, expand, fold = columns.statistics, columns.expand, columns.fold

    @inlined
    def expand_output(coefficients, a, bounds, grid, mean, scale, shift, gamma, beta):
        """Write every column's coefficients of the output; gamma and beta where there is an adjustment."""
        expand(coefficients, (channel.Y_MEAN,), bounds, grid, mean)
        expand(coefficients, (channel.Y_SCALE,), bounds, grid, scale)
        expand(coefficients, (channel.Y_SHIFT,), bounds, grid, shift)
        if a is not None:
            expand(coefficients, (channel.Y_GAMMA,), bounds, grid, gamma)
            expand(coefficients, (channel.Y_BETA,), bounds, grid, beta)

    @element
    def shifts(x, weights, bounds, grid, shift):
        first, last = statistics(bounds, grid)
        k0, begin, end = bounds.k0, bounds.k1_begin, bounds.k1_end
        if weights is None:
            v = segment(x, (0, k0, 0), begin, end)
            for s in range(first, last):
                shift[s] = load(v, (s - first) * grid.span)
        else:  # a column is a statistic where there are weights
            missing = np.ones(last - first, np.bool_)
            shift[first:last] = 0.0
            for r in range(x.shape[0] * x.shape[2]):
                v, w = segment(x, place(x, r, k0), begin, end), segment(weights, place(x, r, k0), begin, end)
                for i in range(end - begin):
                    if missing[i] and load(w, i) > 0:
                        shift[first + i] = load(v, i)
                        missing[i] = False

    @adding
    def moments(x, weights, shift, bounds, grid, partial):
        chunk, k0, begin, end = bounds.chunk, bounds.k0, bounds.k1_begin, bounds.k1_end
        r_begin, r_end = bounds.r1_begin, bounds.r1_end
        origin, total, squares = local(shift), local_sums(x), local_sums(x)
        count, count2 = local_sums(weights), local_sums(weights)
        expand(shift, (), bounds, grid, origin)
        clear(total, end - begin)
        clear(squares, end - begin)
        clear(count, end - begin)
        clear(count2, end - begin)
        step = (r_end - r_begin) // 4
        p0, p1 = place(x, r_begin, k0), place(x, r_begin + step, k0)
        p2, p3 = place(x, r_begin + 2 * step, k0), place(x, r_begin + 3 * step, k0)
        for _ in range(step):
            v0, v1 = segment(x, p0, begin, end), segment(x, p1, begin, end)
            v2, v3 = segment(x, p2, begin, end), segment(x, p3, begin, end)
            w0, w1 = segment(weights, p0, begin, end), segment(weights, p1, begin, end)
            w2, w3 = segment(weights, p2, begin, end), segment(weights, p3, begin, end)
            for i in range(end - begin):
                t0, q0, n0, m0 = terms_of(v0, w0, i, load(origin, i))
                t1, q1, n1, m1 = terms_of(v1, w1, i, load(origin, i))
                t2, q2, n2, m2 = terms_of(v2, w2, i, load(origin, i))
                t3, q3, n3, m3 = terms_of(v3, w3, i, load(origin, i))
                store(total, i, load(total, i) + ((t0 + t1) + (t2 + t3)))
                store(squares, i, load(squares, i) + ((q0 + q1) + (q2 + q3)))
                add(count, i, (n0 + n1) + (n2 + n3))
                add(count2, i, (m0 + m1) + (m2 + m3))
            p0, p1, p2, p3 = after(x, p0), after(x, p1), after(x, p2), after(x, p3)
        for r in range(r_begin + 4 * step, r_end):
            v0, w0 = segment(x, place(x, r, k0), begin, end), segment(weights, place(x, r, k0), begin, end)
            for i in range(end - begin):
                t0, q0, n0, m0 = terms_of(v0, w0, i, load(origin, i))
                store(total, i, load(total, i) + t0)
                store(squares, i, load(squares, i) + q0)
                add(count, i, n0)
                add(count2, i, m0)
        fold(total, bounds, grid, partial, (chunk, 0))
        fold(squares, bounds, grid, partial, (chunk, 1))
        if weights is not None:
            fold(count, bounds, grid, partial, (chunk, 2))
            fold(count2, bounds, grid, partial, (chunk, 3))

    @element
    def normalize(x, residual, a, b, coefficients, relu, bounds, grid, y):
        """Write y = (x - mean) * scale + shift, and what is asked for of: adjusted by a and b, plus residual, relu."""
        k0, begin, end = bounds.k0, bounds.k1_begin, bounds.k1_end
        r_begin, r_end = bounds.r1_begin, bounds.r1_end
        mode, block = grid.store, local(y)
        mean, scale, shift = local(coefficients), local(coefficients), local(coefficients)
        gamma, beta = local(coefficients), local(coefficients)
        expand_output(coefficients, a, bounds, grid, mean, scale, shift, gamma, beta)
        p = place(x, r_begin, k0)
        for _ in range(r_begin, r_end):
            v, rv = segment(x, p, begin, end), segment(residual, p, begin, end)
            av, bv = segment(a, p, begin, end), segment(b, p, begin, end)
            out, following = segment(y, p, begin, end), after(x, p)
            if end - begin < x.shape[3]:  # the next row does not follow in memory
                ahead(x, following, begin, end)
                if mode == DIRECT:
                    ahead(y, following, begin, end)
            expect(out, mode)
            if mode == DIRECT:
                outputs(v, rv, av, bv, mean, scale, shift, gamma, beta, relu, out)
            else:
                outputs(v, rv, av, bv, mean, scale, shift, gamma, beta, relu, block)
                write(block, out, mode)
            p = following
        if mode == STREAMED:
            fence()

    @adding
    def gradient_sums(dy, x, residual, weights, a, b, saved_mean, forward, relu, bounds, grid, partial):
        chunk, k0, begin, end = bounds.chunk, bounds.k0, bounds.k1_begin, bounds.k1_end
        r_begin, r_end = bounds.r1_begin, bounds.r1_end
        exact_mean = local(saved_mean)
        mean, scale, shift = local(forward), local(forward), local(forward)
        gamma, beta = local(forward), local(forward)
        expand(saved_mean, (), bounds, grid, exact_mean)
        if relu is not None:
            expand_output(forward, a, bounds, grid, mean, scale, shift, gamma, beta)
        total, centered, plain, offset = local_sums(x), local_sums(x), local_sums(a), local_sums(b)
        clear(total, end - begin)
        clear(centered, end - begin)
        clear(plain, end - begin)
        clear(offset, end - begin)
        step = (r_end - r_begin) // 2
        p, p2 = place(x, r_begin, k0), place(x, r_begin + step, k0)
        for _ in range(step):
            g, g2 = segment(dy, p, begin, end), segment(dy, p2, begin, end)
            v, v2 = segment(x, p, begin, end), segment(x, p2, begin, end)
            rv, rv2 = segment(residual, p, begin, end), segment(residual, p2, begin, end)
            wv, wv2 = segment(weights, p, begin, end), segment(weights, p2, begin, end)
            av, av2 = segment(a, p, begin, end), segment(a, p2, begin, end)
            bv, bv2 = segment(b, p, begin, end), segment(b, p2, begin, end)
            for i in range(end - begin):
                m, s, h, em = load(mean, i), load(scale, i), load(shift, i), load(exact_mean, i)
                gm, bt = load(gamma, i), load(beta, i)
                t, c, q, o = gradient_terms_of(g, v, rv, wv, av, bv, i, m, s, h, gm, bt, relu, em)
                t2, c2, q2, o2 = gradient_terms_of(g2, v2, rv2, wv2, av2, bv2, i, m, s, h, gm, bt, relu, em)
                store(total, i, load(total, i) + (t + t2))
                store(centered, i, load(centered, i) + (c + c2))
                add(plain, i, q + q2)
                add(offset, i, o + o2)
            p, p2 = after(x, p), after(x, p2)
        for r in range(r_begin + 2 * step, r_end):
            p = place(x, r, k0)
            g, v, rv = segment(dy, p, begin, end), segment(x, p, begin, end), segment(residual, p, begin, end)
            wv, av, bv = segment(weights, p, begin, end), segment(a, p, begin, end), segment(b, p, begin, end)
            for i in range(end - begin):
                m, s, h, em = load(mean, i), load(scale, i), load(shift, i), load(exact_mean, i)
                gm, bt = load(gamma, i), load(beta, i)
                t, c, q, o = gradient_terms_of(g, v, rv, wv, av, bv, i, m, s, h, gm, bt, relu, em)
                store(total, i, load(total, i) + t)
                store(centered, i, load(centered, i) + c)
                add(plain, i, q)
                add(offset, i, o)
        fold(total, bounds, grid, partial, (chunk, channel.SUM_DYA))
        fold(centered, bounds, grid, partial, (chunk, channel.SUM_DYA_X))
        if a is not None:
            fold(plain, bounds, grid, partial, (chunk, channel.SUM_DY))
            fold(offset, bounds, grid, partial, (chunk, channel.SUM_DYB))

    @element
    def input_gradient(dy, x, residual, weights, a, b, forward, relu, coefficients, bounds, grid, dx, dz):
        k0, begin, end = bounds.k0, bounds.k1_begin, bounds.k1_end
        r_begin, r_end = bounds.r1_begin, bounds.r1_end
        mode, block, dz_block = grid.store, local(dx), local(dz)
        mean, scale = local(coefficients), local(coefficients)
        bias, slope = local(coefficients), local(coefficients)
        expand(coefficients, (channel.DX_MEAN,), bounds, grid, mean)
        expand(coefficients, (channel.DX_SCALE,), bounds, grid, scale)
        expand(coefficients, (channel.DX_BIAS,), bounds, grid, bias)
        expand(coefficients, (channel.DX_SLOPE,), bounds, grid, slope)
        fmean, fscale, fshift = local(forward), local(forward), local(forward)
        gamma, beta = local(forward), local(forward)
        if relu is not None:
            expand_output(forward, a, bounds, grid, fmean, fscale, fshift, gamma, beta)
        p = place(x, r_begin, k0)
        for _ in range(r_begin, r_end):
            v, g, out = segment(x, p, begin, end), segment(dy, p, begin, end), segment(dx, p, begin, end)
            rv, wv = segment(residual, p, begin, end), segment(weights, p, begin, end)
            av, bv = segment(a, p, begin, end), segment(b, p, begin, end)
            dz_out = segment(dz, p, begin, end)
            expect(out, mode)
            expect(dz_out, mode)
            where, to = (fmean, fscale, fshift, gamma, beta), (mean, scale, bias, slope)
            if mode == DIRECT:
                input_gradients(g, v, rv, wv, av, bv, where, relu, to, dz_out, out)
            else:
                input_gradients(g, v, rv, wv, av, bv, where, relu, to, dz_block, block)
                write(dz_block, dz_out, mode)
                write(block, out, mode)
            p = after(x, p)
        if mode == STREAMED:
            fence()

    functions = (shifts, moments, normalize, gradient_sums, input_gradient)
    return SimpleNamespace(extent=extent, statistics=statistics, **{f.__name__: f for f in functions})


PLAIN_ROWS, FOLDED_ROWS = loops(PLAIN), loops(FOLDED)
