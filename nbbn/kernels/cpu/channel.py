"""The middle stage, compiled for the CPU."""

from nbbn.kernels import channel
from nbbn.kernels.cpu.elements import element

_functions = channel.functions(element)
add_chunks, moments, train, freeze = _functions.add_chunks, _functions.moments, _functions.train, _functions.freeze
output_coefficients, infer = _functions.output_coefficients, _functions.infer
parameter_gradients, input_coefficients = _functions.parameter_gradients, _functions.input_coefficients
