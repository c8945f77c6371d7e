"""Loops for contiguous runs of one statistic: arrays are [R0, K0, R1], statistics flat, one per k0.

A task has many statistics, whose runs follow each other in memory. So what has to be done for a task is small beside
what is done for its elements, however short the runs are.
"""

from nbbn.kernels.cpu.lanes import (
    BLOCK,
    HALF,
    add_halves,
    each,
    load_half,
    local,
    minimum,
    number,
    over,
    part,
    splat,
    whole,
    write_total,
)
from nbbn.kernels.cpu.shared import (
    GRADIENT,
    OUTPUT,
    gradient_terms,
    moment_terms,
    plus,
    write_gradients,
    write_outputs,
)

MOST = BLOCK // HALF  # statistics whose sums are there at a time


def extent(x):
    return *x.shape, 1


def write_shifts(arrays, bounds, grid, write):
    """Have write(s, parts) called with the parts of some arrays that are the first of statistics, from the s-th on."""

    def of_k0(k0, _):
        write(k0 + bounds.ahead, part(arrays, (bounds.r0, k0), 0, 1))

    each(bounds.k0, bounds.k0_end, 1, of_k0)


def _runs(arrays, bounds, first, last, body, ends=None):
    """body(the parts of some arrays in one run, its r0, its k0) for all runs of a task with k0 from first to last, or
    what is before ends[r0] of them."""

    def of_r0(r0, _):
        end = bounds.r1_end if ends is None else whole(ends, r0)

        def of_k0(k0, _):
            body(part(arrays, (r0, k0), bounds.r1, end), r0, k0)

        each(first, last, 1, of_k0)

    each(bounds.r0, bounds.r0_end, 1, of_r0)


def _write_sums(arrays, there, terms, bounds, partial, ends=None):
    """Write the sums of all statistics of a task. there: what has to be there for each of the sums.

    terms: of the parts of the arrays in one run and its statistic, what gives the terms of elements.
    """
    sums = [local(partial, beside) for beside in there]

    def block(begin, _):
        end = minimum(bounds.k0_end, begin + MOST)

        def run(parts, r0, k0):
            add, zeros = terms(parts, k0 + bounds.ahead), [None if s is None else splat(0.0) for s in sums]
            found = over(0, parts[0].size, lambda i, n, so_far: plus(so_far, add(i, n)), zeros)
            for s, vector in zip(sums, found, strict=True):
                if s is not None:
                    add_halves(s, (k0 - begin) * HALF, vector, r0 == bounds.r0)

        def write(k0, _):
            for row, s in enumerate(sums):
                if s is not None:
                    write_total(partial, (bounds.chunk, row, k0 + bounds.ahead), load_half(s, (k0 - begin) * HALF))

        _runs(arrays, bounds, begin, end, run, ends)
        each(begin, end, 1, write)

    each(bounds.k0, bounds.k0_end, MOST, block)


def moments(x, weights, shift, bounds, grid, partial, ends=None):
    """Write sum (x - shift), sum (x - shift)^2 and, with weights, their sum and that of their squares. ends: of r1 at
    each r0, where not everything counts."""

    def terms(parts, s):
        origin = number(shift, s)
        return lambda i, n: moment_terms(*parts, origin, i, n)

    _write_sums((x, weights), (x, x, weights, weights), terms, bounds, partial, ends)


def _output_of(coefficients, inputs, s):
    """A statistic's coefficients of the output."""
    return [number(coefficients, row, s) if row < 3 or inputs[2] is not None else None for row in OUTPUT]


def normalize(inputs, coefficients, relu, bounds, grid, y):
    """Write the output: see write_outputs()."""

    def run(parts, _, k0):
        *given, out = parts
        write_outputs(given, _output_of(coefficients, given, k0 + bounds.ahead), relu, out, grid.streamed)

    _runs((*inputs, y), bounds, bounds.k0, bounds.k0_end, run)


def gradient_sums(dy, inputs, weights, mean, forward, relu, bounds, grid, partial):
    """Write sum dy * a and sum dy * a * (x - mean); with a and b also sum dy and sum dy * b.

    dy counts as far as the activation lets it through; forward: the coefficients of normalize().
    """

    def terms(parts, s):
        g, w, *given = parts
        gate, center = _output_of(forward, given, s), number(mean, s)
        return lambda i, n: gradient_terms(g, given, w, gate, relu, center, i, n)

    x, _, a, b = inputs
    _write_sums((dy, weights, *inputs), (x, x, a, b), terms, bounds, partial)


def input_gradient(dy, inputs, weights, forward, relu, coefficients, bounds, grid, dx, dz):
    """Write dx, and dz if it is asked for: see write_gradients()."""

    def run(parts, _, k0):
        (g, w, out, out_dz, *given), s = parts, k0 + bounds.ahead
        terms = [number(coefficients, row, s) for row in GRADIENT]
        write_gradients(g, given, w, _output_of(forward, given, s), relu, terms, out, out_dz, grid.streamed)

    _runs((dy, weights, dx, dz, *inputs), bounds, bounds.k0, bounds.k0_end, run)
