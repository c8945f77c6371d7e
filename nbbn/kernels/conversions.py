"""16-bit floats to float32 and back, as LLVM instructions; each takes an llvmlite builder and a value, or a vector of
values."""

from llvmlite import ir

F32, I16, I32, HALF = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.HalfType()


def _like(value, scalar):
    """`scalar`, as a vector where the value is one."""
    return ir.VectorType(scalar, value.type.count) if isinstance(value.type, ir.VectorType) else scalar


def _number(value, scalar, number):
    kind = _like(value, scalar)
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def half_to_float(builder, value):
    return builder.fpext(builder.bitcast(value, _like(value, HALF)), _like(value, F32))


def float_to_half(builder, value):
    return builder.bitcast(builder.fptrunc(value, _like(value, HALF)), _like(value, I16))


def bfloat_to_float(builder, value):
    bits = builder.zext(value, _like(value, I32))
    return builder.bitcast(builder.shl(bits, _number(value, I32, 16)), _like(value, F32))


def float_to_bfloat(builder, value):
    bits = builder.bitcast(value, _like(value, I32))

    def number(n):
        return _number(value, I32, n)

    odd = builder.and_(builder.lshr(bits, number(16)), number(1))
    rounded = builder.add(bits, builder.add(odd, number(0x7FFF)))
    quiet_nan = builder.or_(bits, number(0x400000))  # rounding could carry a NaN's payload into infinity
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet_nan, rounded)
    return builder.trunc(builder.lshr(chosen, number(16)), _like(value, I16))


def bits_half_to_float(builder, value):
    """float16 to float32 in integer arithmetic: the exponent is moved by a multiplication with 2^112, which also
    normalizes subnormals; infinity and NaN get their exponent by hand."""
    bits = builder.zext(value, _like(value, I32))

    def number(n):
        return _number(value, I32, n)

    magnitude = builder.shl(builder.and_(bits, number(0x7FFF)), number(13))
    scaled = builder.fmul(builder.bitcast(magnitude, _like(value, F32)), _number(value, F32, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, number(0x7C00 << 13))
    exponent = builder.select(special, number(0x7F800000), number(0))
    sign = builder.shl(builder.and_(bits, number(0x8000)), number(16))
    scaled_bits = builder.bitcast(scaled, _like(value, I32))
    return builder.bitcast(builder.or_(builder.or_(scaled_bits, exponent), sign), _like(value, F32))


def bits_float_to_half(builder, value):
    """float32 to float16 in integer arithmetic, rounded to nearest even.

    Normal results round by an integer addition before the shift; subnormal ones by adding 0.5, whose last place is
    that of float16's subnormals.
    """
    bits = builder.bitcast(value, _like(value, I32))

    def number(n):
        return _number(value, I32, n)

    sign = builder.and_(builder.lshr(bits, number(16)), number(0x8000))
    magnitude = builder.and_(bits, number(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, number(13)), number(1))
    rebiased = builder.sub(magnitude, number(112 << 23))
    normal = builder.lshr(builder.add(builder.add(rebiased, number(0xFFF)), odd), number(13))
    half = _number(value, F32, 0.5)
    small = builder.bitcast(builder.fadd(builder.bitcast(magnitude, _like(value, F32)), half), _like(value, I32))
    subnormal = builder.sub(small, number(0x3F000000))
    is_small = builder.icmp_unsigned("<", magnitude, number(113 << 23))
    result = builder.select(is_small, subnormal, normal)
    overflow = builder.icmp_unsigned(">=", magnitude, number(0x477FF000))  # 65520, the first that rounds to infinity
    result = builder.select(overflow, number(0x7C00), result)
    is_nan = builder.icmp_unsigned(">", magnitude, number(0x7F800000))
    result = builder.select(is_nan, number(0x7E00), result)
    return builder.trunc(builder.or_(sign, result), _like(value, I16))
