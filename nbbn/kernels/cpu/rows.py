"""Loops for contiguous runs across statistics: arrays are [R0, K0, R1, W], a row is one x[r0, k0, r1].

The functions of planes.py, which says what each of them does, with a sum for each column in place of each statistic.
A column is a statistic of its own, or several belong to one: short planes, or short runs of the same statistics, lie
side by side in a row (grid.span, grid.inner), and of few channels several rows are taken as one (grid.repeats, and
grid.written where results are), so that the loops are long.

Sums take four rows at a time, which halves the time that the sums in memory cost. The four are a quarter of the rows
apart: each is a long sequence for the processor's prefetcher, which four neighbours disturb (14 instead of 33 GB/s).
"""

from nbbn.kernels.cpu.lanes import (
    BLOCK,
    LANES,
    each,
    either,
    load,
    local,
    minimum,
    number,
    over,
    part,
    splat,
    store,
    to_border,
    when,
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


def extent(x):
    return x.shape


def write_shifts(arrays, bounds, grid, write):
    def of_k0(k0, _):
        columns = _Columns(k0, bounds, grid, 1)
        row = part(arrays, (bounds.r0, k0, 0), bounds.k1, bounds.k1_end)

        def of_block(b, _):
            write(columns.s + b * grid.inner, part(row, (), b * grid.span, b * grid.span + grid.inner))

        when(columns.is_plain, lambda: write(columns.s, row), lambda: each(0, columns.blocks, 1, of_block))

    each(bounds.k0, bounds.k0_end, 1, of_k0)


class _Columns:
    """The columns of a task at one k0, and the statistics that they belong to: blocks of `inner` statistics, each of
    which comes so many times one after the other. head: of what is streamed, how many columns there are before the
    first border; what values() copies has it there, too."""

    def __init__(self, k0, bounds, grid, repeats, head=None):
        width = bounds.k1_end - bounds.k1
        self.inner, self.times = grid.inner, grid.span // grid.inner * repeats
        self.s = (k0 + bounds.ahead) * grid.period + bounds.k1 // grid.span * grid.inner
        self.blocks, self.count = width // grid.span, width * repeats
        self.is_plain = self.times == 1  # what there is of statistics is there of columns
        self.behind = 0 if head is None else (LANES - head) % LANES
        self.is_there = self.is_plain if head is None else self.is_plain & ((head == 0) | (self.count > BLOCK))

    def of_statistics(self, array, place):
        return part(array, place, self.s, self.s + self.blocks * self.inner)

    def values(self, values, place, own):
        """Every column's value of one per statistic, values[(*place, statistic)]: these, or in the array `own`."""
        if own is None:
            return None
        v, inner, times = self.of_statistics(values, place), self.inner, self.times
        own = part(own, (), self.behind, own.size)

        def copy():
            over(0, self.count, lambda i, n, _: store(own, i, load(v, i, n), n))

        # Whole vectors: what goes beyond an end is written over next, and the array has room behind its last one.
        def fill(b, _):
            one = number(v, b)
            each(b * times, (b + 1) * times, LANES, lambda i, _: store(own, i, one))

        def repeat(b, _):
            def once(start, _):
                over(0, inner, lambda i, n, _: store(own, start + i, load(v, b * inner + i, n)))

            each(b * times * inner, (b + 1) * times * inner, inner, once)

        def expand():
            when(inner == 1, lambda: each(0, self.blocks, 1, fill), lambda: each(0, self.blocks, 1, repeat))

        when(self.is_there, lambda: None, lambda: when(self.is_plain, copy, expand))
        return either(self.is_there, v, own)

    def sums(self, partial, place, own):
        """Where the sums of columns are made: in those of their statistics, or in the array `own`; all 0."""
        if own is None:
            return None
        found = either(self.is_plain, self.of_statistics(partial, place), own)
        over(0, self.count, lambda i, n, _: store(found, i, splat(0.0), n))
        return found

    def fold(self, columns, partial, place):
        """Write every statistic's sum of its columns to partial[(*place, statistic)], if they are not there."""
        v, inner, times = self.of_statistics(partial, place), self.inner, self.times

        def within(b, _):
            def add(i, n, so_far):
                return [so_far[0] + load(columns, i, n)]

            write_total(v, (b,), over(b * times, (b + 1) * times, add, [splat(0.0)])[0])

        def across(b, _):
            def of_some(i, n, _):
                def add(t, so_far):
                    return [so_far[0] + load(columns, (b * times + t) * inner + i, n)]

                store(v, b * inner + i, each(0, times, 1, add, [splat(0.0)])[0], n)

            over(0, inner, of_some)

        def fold():
            when(inner == 1, lambda: each(0, self.blocks, 1, within), lambda: each(0, self.blocks, 1, across))

        when(self.is_plain, lambda: None, fold)


def _write_sums(arrays, there, terms, bounds, grid, partial, ends=None):
    """Write the sums of all statistics of a task. there: what has to be there for each of the sums.

    terms: of the columns of a k0, what gives the terms of elements, given the parts of the arrays in one row.
    """
    own = [local(partial, beside) for beside in there]

    def of_k0(k0, _):
        columns = _Columns(k0, bounds, grid, grid.repeats)
        add = terms(columns)
        sums = [columns.sums(partial, (bounds.chunk, row), s) for row, s in enumerate(own)]
        _over_rows(arrays, k0, bounds, grid, lambda rows: _add_rows(add, rows, sums), ends)
        for row, s in enumerate(sums):
            if s is not None:
                columns.fold(s, partial, (bounds.chunk, row))

    each(bounds.k0, bounds.k0_end, 1, of_k0)


def _over_rows(arrays, k0, bounds, grid, body, ends):
    """body(the parts of some arrays in four rows, or in one) for all rows of a task, or those before ends[r0]."""
    repeats, begin, width = grid.repeats, bounds.k1, bounds.k1_end - bounds.k1

    def of_r0(r0, _):
        end = bounds.r1_end if ends is None else whole(ends, r0)
        apart = (end - bounds.r1) // (4 * repeats) * repeats

        def four(r, _):
            body([part(arrays, (r0, k0, r + j * apart), begin, begin + repeats * width) for j in range(4)])

        def one(r, _):
            length = minimum(repeats, end - r) * width
            body([part(arrays, (r0, k0, r), begin, begin + length)])

        each(bounds.r1, bounds.r1 + apart, repeats, four)
        each(bounds.r1 + 4 * apart, end, repeats, one)

    each(bounds.r0, bounds.r0_end, 1, of_r0)


def _add_rows(terms, rows, sums):
    """Add the terms of the same columns of some rows, two and two."""

    def add(i, n, _):
        found = [terms(row, i, n) for row in rows]
        while len(found) > 1:
            found = [plus(a, b) for a, b in zip(found[::2], found[1::2], strict=True)]
        for s, vector in zip(sums, found[0], strict=True):
            if s is not None:
                store(s, i, load(s, i, n) + vector, n)

    over(0, rows[0][0].size, add)


def moments(x, weights, shift, bounds, grid, partial, ends=None):
    own = local(partial, x)

    def terms(columns):
        origins = columns.values(shift, (), own)
        return lambda row, i, n: moment_terms(*row, load(origins, i, n), i, n)

    _write_sums((x, weights), (x, x, weights, weights), terms, bounds, grid, partial, ends)


def gradient_sums(dy, inputs, weights, mean, forward, relu, bounds, grid, partial):
    own, gate_of = local(partial, dy), _coefficients(forward, OUTPUT, (relu, inputs[2]))

    def terms(columns):
        means, gate = columns.values(mean, (), own), gate_of(columns)

        def of_row(row, i, n):
            g, w, *given = row
            return gradient_terms(g, given, w, gate, relu, means, i, n)

        return of_row

    x, _, a, b = inputs
    _write_sums((dy, weights, *inputs), (x, x, a, b), terms, bounds, grid, partial)


def _coefficients(values, rows, beside):
    """What gives the coefficients of some columns. beside: what has to be there for the first three, and for others."""
    own = [local(values, beside[row > 2]) for row in rows]
    return lambda columns: [columns.values(values, (row,), array) for row, array in zip(rows, own, strict=True)]


def _write_rows(arrays, bounds, grid, of_columns, target, write):
    """write(the parts of some arrays in one row, what of_columns(columns) gave) for all rows of a task.

    target: an array that is written. Where it is streamed, coefficients are copied to where they lie at borders when it
    does: loads across a border take twice the time beside what is streamed.
    """
    width = bounds.k1_end - bounds.k1

    def of_k0(k0, _):
        head = to_border(part(target, (bounds.r0, k0, bounds.r1), bounds.k1, bounds.k1_end), grid.streamed)
        given = of_columns(_Columns(k0, bounds, grid, grid.written, head))

        def of_r1(r0, r1):
            end = bounds.k1 + minimum(grid.written, bounds.r1_end - r1) * width
            write(part(arrays, (r0, k0, r1), bounds.k1, end), given)

        def of_r0(r0, _):
            each(bounds.r1, bounds.r1_end, grid.written, lambda r1, _: of_r1(r0, r1))

        each(bounds.r0, bounds.r0_end, 1, of_r0)

    each(bounds.k0, bounds.k0_end, 1, of_k0)


def normalize(inputs, coefficients, relu, bounds, grid, y):
    def write(parts, forward):
        *given, out = parts
        write_outputs(given, forward, relu, out, grid.streamed)

    _write_rows((*inputs, y), bounds, grid, _coefficients(coefficients, OUTPUT, (y, inputs[2])), y, write)


def input_gradient(dy, inputs, weights, forward, relu, coefficients, bounds, grid, dx, dz):
    gate, terms = _coefficients(forward, OUTPUT, (relu, inputs[2])), _coefficients(coefficients, GRADIENT, (dx, dx))

    def write(parts, given):
        g, w, out, out_dz, *others = parts
        write_gradients(g, others, w, *given, out, out_dz, grid.streamed)

    def of_columns(columns):
        return gate(columns), relu, terms(columns)

    _write_rows((dy, weights, dx, dz, *inputs), bounds, grid, of_columns, dx, write)
