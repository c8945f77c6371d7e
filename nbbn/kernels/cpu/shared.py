"""What all targets share of the element loops, compiled for the CPU."""

from nbbn.kernels import channel, epilogue, sums
from nbbn.kernels.cpu.elements import adding, element

_epilogue, _sums = epilogue.functions(element), sums.functions(adding)
output, gradient = _epilogue.output, _epilogue.gradient
moment_terms, gradient_terms = _sums.moment_terms, _sums.gradient_terms


@element
def output_of(coefficients, s, a):
    """Mean, scale and shift of a statistic's output, and gamma and beta where there is an adjustment, else None."""
    mean, scale = coefficients[channel.Y_MEAN, s], coefficients[channel.Y_SCALE, s]
    shift = coefficients[channel.Y_SHIFT, s]
    if a is None:
        return mean, scale, shift, None, None
    return mean, scale, shift, coefficients[channel.Y_GAMMA, s], coefficients[channel.Y_BETA, s]
