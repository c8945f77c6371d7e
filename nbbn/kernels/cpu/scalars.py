"""Reading and writing one element of any supported dtype inside a kernel.

Numba cannot type 16-bit floats on the CPU: arrays of uint16 carry float16 and arrays of int16 carry bfloat16
(nbbn.dtypes.carrier). Elements are float32 or float64 between load() and store().
"""

import platform

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

F32, I16, I32, HALF = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.HalfType()


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


@intrinsic
def load(typingctx, array, i):
    """The i-th element of a one-dimensional array as a float that arithmetic can use; None of None. 0 <= i."""
    if isinstance(array, types.NoneType):
        return array(array, i), lambda context, builder, signature, args: args[0]
    result, convert = _LOADS.get(array.dtype, (array.dtype, _same))

    def emit(context, builder, signature, args):
        return convert(builder, builder.load(_place(context, builder, array, args[0], args[1])))

    return result(array, i), emit


@intrinsic
def store(typingctx, array, i, value):
    """Write the i-th element of a one-dimensional array, rounded to nearest even. 0 <= i."""
    argument, convert = _STORES.get(array.dtype, (array.dtype, _same))

    def emit(context, builder, signature, args):
        builder.store(convert(builder, args[2]), _place(context, builder, array, args[0], args[1]))
        return context.get_dummy_value()

    return types.void(array, i, argument), emit


def _place(context, builder, array, value, i):
    """Where the i-th element lies."""
    view = context.make_array(array)(context, builder, value)
    if array.layout == "C":
        return builder.gep(view.data, [i])
    stride = cgutils.unpack_tuple(builder, view.strides, 1)[0]
    return cgutils.pointer_add(builder, view.data, builder.mul(i, stride), return_type=view.data.type)


def _same(builder, value):
    return value


def _half_to_float(builder, value):
    return builder.fpext(builder.bitcast(value, HALF), F32)


def _float_to_half(builder, value):
    return builder.bitcast(builder.fptrunc(value, HALF), I16)


def _bfloat_to_float(builder, value):
    return builder.bitcast(builder.shl(builder.zext(value, I32), I32(16)), F32)


def _float_to_bfloat(builder, value):
    bits = builder.bitcast(value, I32)
    odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
    rounded = builder.add(bits, builder.add(odd, I32(0x7FFF)))
    quiet_nan = builder.or_(bits, I32(0x400000))  # rounding could carry a NaN's payload into infinity
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet_nan, rounded)
    return builder.trunc(builder.lshr(chosen, I32(16)), I16)


def _bits_half_to_float(builder, value):
    """float16 to float32 in integer arithmetic: the exponent is moved by a multiplication with 2^112, which also
    normalizes subnormals; infinity and NaN get their exponent by hand."""
    bits = builder.zext(value, I32)
    magnitude = builder.shl(builder.and_(bits, I32(0x7FFF)), I32(13))
    scaled = builder.fmul(builder.bitcast(magnitude, F32), ir.Constant(F32, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, I32(0x7C00 << 13))
    exponent = builder.select(special, I32(0x7F800000), I32(0))
    sign = builder.shl(builder.and_(bits, I32(0x8000)), I32(16))
    return builder.bitcast(builder.or_(builder.or_(builder.bitcast(scaled, I32), exponent), sign), F32)


def _bits_float_to_half(builder, value):
    """float32 to float16 in integer arithmetic, rounded to nearest even.

    Normal results round by an integer addition before the shift; subnormal ones by adding 0.5, whose last place is
    that of float16's subnormals.
    """
    bits = builder.bitcast(value, I32)
    sign = builder.and_(builder.lshr(bits, I32(16)), I32(0x8000))
    magnitude = builder.and_(bits, I32(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, I32(13)), I32(1))
    rebiased = builder.sub(magnitude, I32(112 << 23))
    normal = builder.lshr(builder.add(builder.add(rebiased, I32(0xFFF)), odd), I32(13))
    half = ir.Constant(F32, 0.5)
    small = builder.bitcast(builder.fadd(builder.bitcast(magnitude, F32), half), I32)
    subnormal = builder.sub(small, builder.bitcast(half, I32))
    is_small = builder.icmp_unsigned("<", magnitude, I32(113 << 23))
    result = builder.select(is_small, subnormal, normal)
    overflow = builder.icmp_unsigned(">=", magnitude, I32(0x477FF000))  # 65520, the first that rounds to infinity
    result = builder.select(overflow, I32(0x7C00), result)
    is_nan = builder.icmp_unsigned(">", magnitude, I32(0x7F800000))
    result = builder.select(is_nan, I32(0x7E00), result)
    return builder.trunc(builder.or_(sign, result), I16)


_LOADS = {
    types.uint16: (types.float32, _half_to_float if HALF_INSTRUCTIONS else _bits_half_to_float),
    types.int16: (types.float32, _bfloat_to_float),
}
_STORES = {
    types.uint16: (types.float32, _float_to_half if HALF_INSTRUCTIONS else _bits_float_to_half),
    types.int16: (types.float32, _float_to_bfloat),
}
