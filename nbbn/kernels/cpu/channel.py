"""The middle stage, compiled for the CPU."""

from nbbn.core import rules
from nbbn.kernels import channel
from nbbn.kernels.cpu.elements import element

_functions = channel.functions(element)
add_chunks, train, freeze = _functions.add_chunks, _functions.train, _functions.freeze
output_coefficients, infer = _functions.output_coefficients, _functions.infer
parameter_gradients, input_coefficients = _functions.parameter_gradients, _functions.input_coefficients


@element
def moments(first, last, sums, shift, count, saved):
    """Write the moments of some statistics from their sums about `shift`.

    count: values per statistic; with weights the sums hold each statistic's own. Only weights can make a value of the
    data a bad shift: then the mean takes its place, and the sums are to be made again.
    Returns: whether they are.
    """
    weighted, again = sums.shape[0] == channel.WEIGHTED_SUMS, False
    for s in range(first, last):
        n, squares = (sums[2, s], sums[3, s]) if weighted else (count, count)
        mean, m2 = rules.shifted_moments(n, shift[s], sums[0, s], sums[1, s])
        saved[channel.COUNT, s] = n
        saved[channel.BATCH_MEAN, s] = mean
        saved[channel.M2, s] = m2
        saved[channel.SQUARES, s] = squares
        if weighted and not rules.is_typical(shift[s], n, mean, m2):
            shift[s] = mean
            again = True
    return again
