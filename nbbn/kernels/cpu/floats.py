"""What this processor has instructions for: 16-bit floats as float32 and back, and a part of a vector."""

import platform

import llvmlite.binding
from numba import types
from numba.core import config

from nbbn.kernels import conversions

IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def _has(feature: str) -> bool:
    """Whether LLVM may use this, which Numba's settings can forbid."""
    features = config.CPU_FEATURES
    if features is None:
        return config.CPU_NAME is None and bool(llvmlite.binding.get_host_cpu_features().get(feature))
    return f"+{feature}" in features.split(",")


# Without the F16C instructions on x86 LLVM calls a function for half conversions that is not there, and the process
# crashes.
HALF_INSTRUCTIONS = not IS_X86 or _has("f16c")
# Sizes in bytes of the elements for which there is an instruction that loads, or stores, a part of a vector as fast as
# the whole of it. Without one LLVM goes element by element; AVX2 has one to store, which takes several times as long.
_OF_AVX512 = (*(2,) * _has("avx512bw"), *(4, 8) * _has("avx512vl"))
MASKED_LOADS, MASKED_STORES = _OF_AVX512 + (4, 8) * _has("avx"), _OF_AVX512
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
