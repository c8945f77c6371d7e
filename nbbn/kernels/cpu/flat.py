"""The output loop for one sequence of many short runs: planes as they lie in memory, [1, 1, R0 * K0 * R1].

A block of the output holds parts of several planes, so whatever their length, only whole blocks are written. In
reductions a plane's place is its statistic's, so those loops are planes.py's.
"""

from nbbn.kernels.cpu.elements import element
from nbbn.kernels.cpu.memory import BLOCK, DIRECT, STREAMED, expect, fence, local, past_line, segment, write
from nbbn.kernels.cpu.planes import extent, gradient_sums, input_gradient, moments, shifts, statistics
from nbbn.kernels.cpu.scalars import load, store
from nbbn.kernels.cpu.shared import output, output_of

__all__ = ["extent", "gradient_sums", "input_gradient", "moments", "normalize", "shifts", "statistics"]


@element
def normalize(x, residual, a, b, coefficients, relu, bounds, grid, y):
    """planes.normalize() for the elements of r1 in the bounds, the i-th of which has statistic i // span % period."""
    begin, last, place = bounds.r1_begin, bounds.r1_end, (0, 0)
    mode, block, length = grid.store, local(y), grid.span
    plane, done = divmod(begin, length)
    k0 = plane % grid.period
    while begin < last:
        # Where blocks end at a line of the cache, none but the first and the last is written in parts.
        end = min(last, begin + BLOCK - past_line(segment(y, place, begin, begin + 1)))
        v, rv, out = segment(x, place, begin, end), segment(residual, place, begin, end), segment(y, place, begin, end)
        expect(out, mode)
        target = out if mode == DIRECT else block
        i = 0
        while i < end - begin:
            mean, scale, shift, gamma, beta = output_of(coefficients, k0, a)
            stop = min(end - begin, i + length - done)
            for j in range(i, stop):
                store(target, j, output(load(v, j), mean, scale, shift, a, b, gamma, beta, load(rv, j), relu))
            done += stop - i
            i = stop
            if done == length:
                done = 0
                k0 = k0 + 1 if k0 + 1 < grid.period else 0
        write(block, out, mode)
        begin = end
    if mode == STREAMED:
        fence()
