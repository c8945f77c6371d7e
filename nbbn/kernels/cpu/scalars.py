"""Reading and writing one element of any supported dtype inside a kernel.

Numba cannot type 16-bit floats on the CPU: arrays of uint16 carry float16 and arrays of int16 carry bfloat16
(nbbn.core.dtypes.carrier). Elements are float32 or float64 between load() and store().
"""

import platform

import llvmlite.binding
import numpy as np
from numba import types
from numba.core import cgutils, config

from nbbn.kernels import conversions
from nbbn.runtime import intrinsic


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


def _plain_load(array, i):
    if array is None:
        return None
    return np.float32(array[i]) if array.itemsize == 2 else array[i]


def _plain_store(array, i, value):
    if array is not None:
        array[i] = value


@intrinsic(plain=_plain_load)
def load(typingctx, array, i):
    """The i-th element of a one-dimensional array as a float that arithmetic can use; None of None. 0 <= i."""
    if isinstance(array, types.NoneType):
        return array(array, i), lambda context, builder, signature, args: args[0]
    result, convert = _LOADS.get(array.dtype, (array.dtype, _same))

    def emit(context, builder, signature, args):
        return convert(builder, builder.load(_place(context, builder, array, args[0], args[1])))

    return result(array, i), emit


@intrinsic(plain=_plain_store)
def store(typingctx, array, i, value):
    """Write the i-th element of a one-dimensional array, rounded to nearest even; nothing to None. 0 <= i."""
    if isinstance(array, types.NoneType):
        return types.void(array, i, value), lambda context, builder, signature, args: context.get_dummy_value()
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


_LOADS = {
    types.uint16: (types.float32, conversions.half_to_float if HALF_INSTRUCTIONS else conversions.bits_half_to_float),
    types.int16: (types.float32, conversions.bfloat_to_float),
}
_STORES = {
    types.uint16: (types.float32, conversions.float_to_half if HALF_INSTRUCTIONS else conversions.bits_float_to_half),
    types.int16: (types.float32, conversions.float_to_bfloat),
}
