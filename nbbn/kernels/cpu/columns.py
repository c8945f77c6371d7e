"""Which statistics the columns of a row belong to: the plain way, and that of rows in which several periods lie.

Each namespace has the same functions, over the columns of a task: statistics(), expand() and fold(), which may leave
anything in the columns.
"""

from types import SimpleNamespace

from nbbn.kernels.cpu.elements import element
from nbbn.kernels.cpu.memory import segment
from nbbn.kernels.cpu.scalars import load, store


@element
def _plain_statistics(bounds, grid):
    """The first statistic that a task covers, and the one after the last."""
    first = bounds.k0 * grid.period
    return first + bounds.k1_begin, first + bounds.k1_end


@element
def _copy(values, row, bounds, grid, columns):
    """Write every column's value of one per statistic, values[(*row, statistic)]."""
    first, last = _plain_statistics(bounds, grid)
    v = segment(values, row, first, last)
    for i in range(last - first):
        store(columns, i, load(v, i))


@element
def _copy_back(columns, bounds, grid, sums, row):
    """Write every statistic's sum of its columns, sums[(*row, statistic)]."""
    first, last = _plain_statistics(bounds, grid)
    v = segment(sums, row, first, last)
    for i in range(last - first):
        store(v, i, load(columns, i))


@element
def _folded_statistics(bounds, grid):
    """Column j belongs to statistic k0 * period + (j // span) % period; a task has whole runs and, unless it is less
    than one, whole periods."""
    first = bounds.k0 * grid.period
    return first + bounds.k1_begin // grid.span, first + min(grid.period, bounds.k1_end // grid.span)


@element
def _expand(values, row, bounds, grid, columns):
    first, last = _folded_statistics(bounds, grid)
    v, length = segment(values, row, first, last), grid.span
    for period in range(0, bounds.k1_end - bounds.k1_begin, (last - first) * length):
        for s in range(first, last):
            begin, value = period + (s - first) * length, load(v, s - first)
            for i in range(begin, begin + length):
                columns[i] = value


@element
def _halve(columns, begin, count, unit):
    """Add up `count` neighbouring units of columns, in the place of the first: half to half, which is vectorized and
    has one order."""
    while count > 1:
        half = count // 2
        distance = (count - half) * unit
        for i in range(begin, begin + half * unit):
            columns[i] += columns[i + distance]
        count -= half


@element
def _fold(columns, bounds, grid, sums, row):
    first, last = _folded_statistics(bounds, grid)
    v, length = segment(sums, row, first, last), grid.span
    period = (last - first) * length
    _halve(columns, 0, (bounds.k1_end - bounds.k1_begin) // period, period)
    for s in range(last - first):
        _halve(columns, s * length, length, 1)
        store(v, s, columns[s * length])


PLAIN = SimpleNamespace(statistics=_plain_statistics, expand=_copy, fold=_copy_back)
FOLDED = SimpleNamespace(statistics=_folded_statistics, expand=_expand, fold=_fold)
