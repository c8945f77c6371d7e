"""The middle stage, compiled for the CPU."""

from nbbn.kernels import channel
from nbbn.kernels.cpu.elements import element

_functions = channel.functions(element)
add_chunks, batch_moments, train = _functions.add_chunks, _functions.batch_moments, _functions.train
forward_coefficients, infer, backward = _functions.forward_coefficients, _functions.infer, _functions.backward
