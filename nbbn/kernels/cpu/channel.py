"""The middle stage on the CPU: sixteen channels at a time."""

from nbbn.kernels import channel
from nbbn.kernels.cpu.lanes import (
    each,
    is_any,
    load,
    local,
    number,
    over,
    over_columns,
    part,
    splat,
    store,
    vector_rules,
    when,
    wide,
)

_stage = channel.functions(lambda function: function, vector_rules, wide)


def add_chunks(first, last, chunks, partial):
    """Add up the sums of all chunks, in their order, in the place of the first chunk's."""

    def of_row(row, _):
        sums = part(partial, (0, row), first, last)

        def of_chunk(chunk, _):
            terms = part(partial, (chunk, row), first, last)
            over(0, last - first, lambda i, n, _: store(sums, i, load(sums, i, n) + load(terms, i, n), n))

        each(1, chunks, 1, of_chunk)

    each(0, partial.shape[1], 1, of_row)


def copy_rows(source, target):
    """Copy all rows of an array to the first ones of another."""

    def of_row(row, _):
        values, place = (part(array, (row,), 0, source.shape[1]) for array in (source, target))
        over(0, source.shape[1], lambda i, n, _: store(place, i, load(values, i, n), n))

    each(0, source.shape[0], 1, of_row)


def moments(first, last, chunks, partial, shift, count, weights, saved):
    """Write the moments of some statistics from their sums about `shift`.

    count: values per statistic; with weights the sums hold each statistic's own. Only weights can make a value of the
    data a bad shift: then the mean takes its place, and the sums are to be made again.
    Returns: whether they are; None without weights.
    """
    add_chunks(first, last, chunks, partial)
    sums, flag = partial[0], local(partial, weights)
    store(flag, 0, splat(0.0), 1)

    def write(columns, _):
        s = columns()
        n, squares = (splat(count), splat(count)) if weights is None else (sums[2, s], sums[3, s])
        origin = shift[(s,)]
        mean, m2 = vector_rules.shifted_moments(n, origin, sums[0, s], sums[1, s])
        rows = {channel.COUNT: n, channel.BATCH_MEAN: mean, channel.M2: m2, channel.SQUARES: squares}
        for row, value in rows.items():
            saved[row, s] = value
        if weights is not None:
            is_far = vector_rules.is_far(origin, n, mean, m2)
            shift[(s,)] = vector_rules.choose(is_far, mean, origin)
            when(is_any(is_far), lambda: store(flag, 0, splat(1.0), 1))

    over_columns(first, last, write)
    return None if weights is None else is_any(number(flag, 0) > 0)


def train(first, last, params, state, hyper, count, weights, a, options, new_state, saved, coefficients):
    """From moments to the new state, what the gradient needs, and the coefficients of the output, of some channels in
    all groups.

    count: values of each statistic; with weights, and where it is None, `saved` has it. options: renorm, debias and
    skip, each True or None.
    """
    channels, statistics = params.shape[1], saved.shape[1]

    def counts(s):
        if weights is not None or count is None:
            return saved[channel.COUNT, s], saved[channel.SQUARES, s]
        return splat(count), splat(count)

    def write(columns, _):
        bessel, zeros = hyper[channel.BESSEL], [splat(0.0)] * 3

        def add(group, found):
            s = columns(group)
            own = _stage.group_variance(s, *counts(s), saved, bessel)
            return _stage.add_group(s, counts(s)[0], own, saved, bessel, *found)

        sums = each(0, statistics, channels, add, zeros)
        r, d = _stage.update(columns(), *sums, state, hyper, *options, new_state)

        def finish(group, _):
            s = columns(group)
            variance = vector_rules.per(saved[channel.M2, s], counts(s)[0])
            rstd = vector_rules.reciprocal_stddev(variance, hyper[channel.EPSILON])
            _stage.save(s, columns(), rstd, r, d, params, saved)
            _stage.output_coefficients(s, s, saved, a, coefficients)

        each(0, statistics, channels, finish)

    over_columns(first, last, write)


def freeze(params, state, hyper, saved):
    """What a gradient needs of statistics that are constants."""
    over_columns(0, params.shape[1], lambda columns, _: _stage.freeze(columns(), params, state, hyper, saved))


def output_coefficients(saved, a, coefficients):
    """The coefficients of the output of all statistics."""

    def write(columns, _):
        _stage.output_coefficients(columns(), columns(), saved, a, coefficients)

    over_columns(0, saved.shape[1], write)


def infer(params, state, hyper, coefficients):
    """The coefficients of the output from the moving statistics."""

    def write(columns, _):
        _stage.inference_coefficients(columns(), params, state, hyper, coefficients)

    over_columns(0, params.shape[1], write)


def parameter_gradients(first, last, sums, saved, adjusted, dparams):
    """The gradients of gamma and beta of some channels."""

    def write(columns, _):
        def add(group, found):
            return _stage.add_parameter_gradients(columns(group), sums, saved, adjusted, *found)

        dgamma, dbeta = each(0, saved.shape[1], dparams.shape[1], add, [splat(0.0), splat(0.0)])
        dparams[channel.GAMMA, columns()] = dgamma
        dparams[channel.BETA, columns()] = dbeta

    over_columns(first, last, write)


def input_coefficients(first, last, channels, sums, saved, coefficients):
    """Mean, scale, bias and slope of dx of some channels in all groups."""

    def write(columns, _):
        def of_group(group, _):
            s = columns(group)
            total, centered = sums[channel.SUM_DYA, s], sums[channel.SUM_DYA_X, s]
            _stage.input_coefficients(s, total, centered, saved, coefficients)

        each(0, saved.shape[1], channels, of_group)

    over_columns(first, last, write)
