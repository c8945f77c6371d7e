"""The output loop for one sequence of many short runs: planes as they lie in memory, [1, 1, R0 * K0 * R1].

A block of the output holds parts of several planes, so whatever their length, only whole blocks are written. In
reductions a plane's place is its statistic's, so those loops are planes.py's.
"""

from nbbn.kernels.cpu.elements import element
from nbbn.kernels.cpu.epilogue import output
from nbbn.kernels.cpu.memory import BLOCK, DIRECT, STREAMED, expect, fence, local, past_line, run, write
from nbbn.kernels.cpu.planes import extent, gradient_sums, input_gradient, moments, shifts, statistics
from nbbn.kernels.cpu.scalars import load, store
from nbbn.kernels.tasks import PERIOD, RUN, STORE

__all__ = ["extent", "gradient_sums", "input_gradient", "moments", "normalize", "shifts", "statistics"]


@element
def normalize(x, residual, a, b, coefficients, relu, bounds, grid, y):
    """planes.normalize() for the elements of r1 in the bounds, the i-th of which has statistic i // RUN % PERIOD."""
    begin, last, place = bounds[4], bounds[5], (0, 0)
    mode, block, length = grid[STORE], local(y), grid[RUN]
    plane, done = divmod(begin, length)
    k0 = plane % grid[PERIOD]
    while begin < last:
        # Where blocks end at a line of the cache, none but the first and the last is written in parts.
        end = min(last, begin + BLOCK - past_line(run(y, place, begin, begin + 1)))
        v, rv, out = run(x, place, begin, end), run(residual, place, begin, end), run(y, place, begin, end)
        expect(out, mode)
        target = out if mode == DIRECT else block
        i = 0
        while i < end - begin:
            mean, scale, shift = coefficients[0, k0], coefficients[1, k0], coefficients[2, k0]
            stop = min(end - begin, i + length - done)
            for j in range(i, stop):
                store(target, j, output(load(v, j), mean, scale, shift, a, b, None, None, load(rv, j), relu))
            done += stop - i
            i = stop
            if done == length:
                done = 0
                k0 = k0 + 1 if k0 + 1 < grid[PERIOD] else 0
        write(block, out, mode)
        begin = end
    if mode == STREAMED:
        fence()
