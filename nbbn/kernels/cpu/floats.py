"""Which instructions turn 16-bit floats into float32 and back on this processor."""

import platform

import llvmlite.binding
from numba import types
from numba.core import config

from nbbn.kernels import conversions


def _has_half_instructions() -> bool:
    """Whether LLVM may be given half conversions: without the F16C instructions on x86 it calls a function that is not
    there, and the process crashes."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    features = config.CPU_FEATURES
    if features is None:
        return config.CPU_NAME is None and bool(llvmlite.binding.get_host_cpu_features().get("f16c"))
    return "+f16c" in features.split(",")


HALF_INSTRUCTIONS = _has_half_instructions()
_HALVES = (
    (conversions.half_to_float, conversions.float_to_half)
    if HALF_INSTRUCTIONS
    else (conversions.bits_half_to_float, conversions.bits_float_to_half)
)
_CARRIED = {types.uint16: _HALVES, types.int16: (conversions.bfloat_to_float, conversions.float_to_bfloat)}


def decode(builder, dtype, value):
    """What is stored in an array of a Numba dtype as a float that arithmetic can use."""
    return _CARRIED[dtype][0](builder, value) if dtype in _CARRIED else value


def encode(builder, dtype, value):
    """A float rounded to nearest even, to be stored."""
    return _CARRIED[dtype][1](builder, value) if dtype in _CARRIED else value
