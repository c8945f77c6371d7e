"""The epilogue, compiled for the CPU."""

from nbbn.kernels import epilogue
from nbbn.kernels.cpu.elements import element

_functions = epilogue.functions(element)
output, gradient = _functions.output, _functions.gradient
