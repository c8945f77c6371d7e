"""What the loops of both schedules share: the arithmetic of a vector of elements.

A coefficient is a vector that all of a run share, or an array with one number for each of its elements.
"""

from nbbn.kernels import channel, epilogue, sums
from nbbn.kernels.cpu.lanes import first, load, vector_rules, wide, write_run

_epilogue = epilogue.functions(lambda function: function, vector_rules)
_sums = sums.functions(lambda function: function, vector_rules)

# Rows of the coefficients: of the output, the last two only with an adjustment; of the input's gradient.
OUTPUT = channel.Y_MEAN, channel.Y_SCALE, channel.Y_SHIFT, channel.Y_GAMMA, channel.Y_BETA
GRADIENT = channel.DX_MEAN, channel.DX_SCALE, channel.DX_BIAS, channel.DX_SLOPE


def plus(a, b):
    """The sums a with the terms b added; None where there are none."""
    return [None if t is None else s + t for s, t in zip(a, b, strict=True)]


def moment_terms(x, weights, origin, i, n):
    """What elements add to the sums of the moments, in float64."""
    return _sums.moment_terms(first(wide(load(x, i, n)) - origin, n), wide(load(weights, i, n)))


def _output_arguments(inputs, forward, i, n):
    x, residual, a, b = (load(array, i, n) for array in inputs)
    mean, scale, shift, gamma, beta = (load(coefficient, i, n) for coefficient in forward)
    return x, mean, scale, shift, a, b, gamma, beta, residual


def _gradient(dy, inputs, forward, relu, i, n):
    """What the activation lets through of dy."""
    g = load(dy, i, n)
    return g if relu is None else _epilogue.gradient(g, *_output_arguments(inputs, forward, i, n), relu)


def gradient_terms(dy, inputs, weights, forward, relu, mean, i, n):
    """What elements add to the sums of the gradient, in float64."""
    x, _, a, b = (wide(load(array, i, n)) for array in inputs)
    g = wide(_gradient(dy, inputs, forward, relu, i, n))
    return _sums.gradient_terms(g, x, load(mean, i, n), a, b, wide(load(weights, i, n)))


def write_outputs(inputs, forward, relu, y, streamed):
    """Write a run of y = (x - mean) * scale + shift, and what is asked for of: adjusted by a and b, plus residual,
    relu. inputs: x, residual, a, b."""

    def results(i, n):
        return [_epilogue.output(*_output_arguments(inputs, forward, i, n), relu)]

    write_run([y], results, streamed, forward)


def write_gradients(dy, inputs, weights, forward, relu, coefficients, dx, dz, streamed):
    """Write a run of dx = scale * (dy * a - w * (bias + (x - mean) * slope)); a and w are 1 where they are not given.

    dy counts as far as the activation lets it through, and that is dz, if it is asked for.
    """

    def results(i, n):
        x, _, a, _ = (load(array, i, n) for array in inputs)
        g, terms = _gradient(dy, inputs, forward, relu, i, n), (load(c, i, n) for c in coefficients)
        return g, vector_rules.input_gradient(g, x, *terms, a, load(weights, i, n))

    write_run([dz, dx], results, streamed, [*forward, *coefficients])
