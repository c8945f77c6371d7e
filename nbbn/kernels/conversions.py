"""16-bit floats to float32 and back, as LLVM instructions; each takes an llvmlite builder and a value."""

from llvmlite import ir

F32, I16, I32, HALF = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.HalfType()


def half_to_float(builder, value):
    return builder.fpext(builder.bitcast(value, HALF), F32)


def float_to_half(builder, value):
    return builder.bitcast(builder.fptrunc(value, HALF), I16)


def bfloat_to_float(builder, value):
    return builder.bitcast(builder.shl(builder.zext(value, I32), I32(16)), F32)


def float_to_bfloat(builder, value):
    bits = builder.bitcast(value, I32)
    odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
    rounded = builder.add(bits, builder.add(odd, I32(0x7FFF)))
    quiet_nan = builder.or_(bits, I32(0x400000))  # rounding could carry a NaN's payload into infinity
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet_nan, rounded)
    return builder.trunc(builder.lshr(chosen, I32(16)), I16)


def bits_half_to_float(builder, value):
    """float16 to float32 in integer arithmetic: the exponent is moved by a multiplication with 2^112, which also
    normalizes subnormals; infinity and NaN get their exponent by hand."""
    bits = builder.zext(value, I32)
    magnitude = builder.shl(builder.and_(bits, I32(0x7FFF)), I32(13))
    scaled = builder.fmul(builder.bitcast(magnitude, F32), ir.Constant(F32, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, I32(0x7C00 << 13))
    exponent = builder.select(special, I32(0x7F800000), I32(0))
    sign = builder.shl(builder.and_(bits, I32(0x8000)), I32(16))
    return builder.bitcast(builder.or_(builder.or_(builder.bitcast(scaled, I32), exponent), sign), F32)


def bits_float_to_half(builder, value):
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
