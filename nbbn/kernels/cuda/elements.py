"""Single elements of any dtype, by address: for kernels in which every array has a dtype and strides of its own."""

import ctypes
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.np.numpy_support import from_dtype

from nbbn.kernels.conversions import bfloat_to_float, float_to_bfloat, float_to_half, half_to_float
from nbbn.kernels.cuda.target import SIMULATED, device

_GLOBAL = 1  # the address space
_LIMIT = 1 << 31
# 16-bit floats, which Numba does not compute with: how one becomes float32, and is made of that.
_CONVERSIONS = {"float16": (half_to_float, float_to_half), "bfloat16": (bfloat_to_float, float_to_bfloat)}


if SIMULATED:
    _divide = divmod
else:

    @intrinsic
    def _divide(typingctx, number, divisor):
        """Quotient and remainder of numbers of 32 bits."""

        def emit(context, builder, signature, args):
            a, b = (builder.trunc(value, ir.IntType(32)) for value in args)
            found = [builder.zext(f(a, b), ir.IntType(64)) for f in (builder.udiv, builder.urem)]
            return context.make_tuple(builder, signature.return_type, found)

        return types.UniTuple(types.int64, 2)(types.int64, types.int64), emit


@device
def split(i, size):
    """Quotient and remainder, in 32 bits where these hold both: a division of 64 bits takes a hundred instructions."""
    if i < _LIMIT and size < _LIMIT:
        return _divide(i, size)
    return i // size, i % size


@device
def place(i, start, shape, strides):
    """The address of the i-th element in the order of `shape`, of an array that begins at `start`."""
    last = len(shape) - 1
    for k in range(last):
        i, rest = split(i, shape[last - k])
        start += rest * strides[last - k]
    return start + i * strides[0]


@lru_cache(maxsize=64)
def element(dtype: np.dtype) -> SimpleNamespace:
    """read(address): a number; of a 16-bit float it is float32. write(address, number): rounded to nearest even."""
    return (_simulated if SIMULATED else _compiled)(dtype)


def _compiled(dtype: np.dtype) -> SimpleNamespace:
    load, store = _CONVERSIONS.get(dtype.name, (None, None))
    number = types.float32 if load else types.uint8 if dtype.kind == "b" else from_dtype(dtype)

    def at(context: Any, builder: Any, address: Any) -> Any:
        stored = ir.IntType(16) if load else context.get_value_type(number)
        return builder.inttoptr(address, ir.PointerType(stored, addrspace=_GLOBAL))

    @intrinsic
    def read(typingctx, address):
        def emit(context, builder, signature, args):
            found = builder.load(at(context, builder, args[0]), align=dtype.itemsize)
            return load(builder, found) if load else found

        return number(types.int64), emit

    @intrinsic
    def write(typingctx, address, value):
        # By way of float32 a float16 of a float64 would be rounded twice.
        needed = value if value == types.float64 and dtype.name == "float16" else number

        def emit(context, builder, signature, args):
            found = context.cast(builder, args[1], value, needed)
            found = store(builder, found) if store else found
            builder.store(found, at(context, builder, args[0]), align=dtype.itemsize)
            return context.get_dummy_value()

        return types.void(types.int64, value), emit

    return SimpleNamespace(read=read, write=write)


def _simulated(dtype: np.dtype) -> SimpleNamespace:
    def view(address: int) -> Any:
        assert address % dtype.itemsize == 0, "a GPU would fault"
        memory: Any = (ctypes.c_char * dtype.itemsize).from_address(int(address))
        return np.frombuffer(memory, dtype)

    def read(address: int) -> Any:
        found = view(address)[0]
        return np.float32(found) if dtype.name in _CONVERSIONS else found

    def write(address: int, number: Any) -> None:
        with np.errstate(over="ignore"):
            view(address)[0] = number

    return SimpleNamespace(read=read, write=write)
