"""Global memory by address: neighbouring elements in one access, and the small arrays of the middle stage.

Kernels get addresses instead of arrays: an array is seven arguments, and whichever library owns the memory, nothing
has to be wrapped for a launch. Elements are float32 or float64 between reading and writing. In Numba's simulator
memory is the host's, and NumPy views stand in for the instructions.
"""

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.np.arrayobj import populate_array

from nbbn.kernels.conversions import bfloat_to_float, float_to_bfloat, float_to_half, half_to_float
from nbbn.kernels.cuda.target import SIMULATED

VECTOR_BYTES = 16  # the widest access

_GLOBAL = 1  # the address space
_I32, _I64 = ir.IntType(32), ir.IntType(64)
# name of a dtype: how an element is stored, and the conversions
_STORED: dict[str, tuple[ir.Type, Any, Any]] = {
    "float16": (ir.IntType(16), half_to_float, float_to_half),
    "bfloat16": (ir.IntType(16), bfloat_to_float, float_to_bfloat),
    "float32": (ir.FloatType(), None, None),
    "float64": (ir.DoubleType(), None, None),
}


def vector(dtype: np.dtype, width: int) -> SimpleNamespace:
    """Access to `width` elements at once, which lie side by side from a multiple of their size on.

    fetch(address, raw, i): to raw[i:] as they are, `words` of the type `word`. decode(raw, i, values): from there to
    values[:width], which is float32, or float64 for float64. So all that a thread reads is on its way before it waits
    for any: a conversion waits. write(address, values): the other way, rounded to nearest even.
    """
    return (_simulated_vector if SIMULATED else _vector)(dtype, width)


def _vector(dtype: np.dtype, width: int) -> SimpleNamespace:
    stored, load, store = _STORED[dtype.name]
    # LLVM stores only four 16-bit elements at once: they are packed into words, two in each.
    packed = 2 if dtype.itemsize == 2 and width > 1 else 1
    words = width // packed
    word = _I32 if packed == 2 else stored
    access = ir.VectorType(word, words) if words > 1 else word

    def place(builder: Any, address: Any) -> Any:
        return builder.inttoptr(address, ir.PointerType(access, addrspace=_GLOBAL))

    def lanes(context: Any, builder: Any, array: Any, value: Any, first: Any, count: int) -> list[Any]:
        data = builder.gep(context.make_array(array)(context, builder, value).data, [first])
        return [builder.gep(data, [_I32(lane)]) for lane in range(count)]

    def unpack(builder: Any, parts: list[Any]) -> list[Any]:
        if packed == 1:
            return parts
        return [builder.trunc(builder.lshr(p, _I32(shift)), stored) for p in parts for shift in (0, 16)]

    def pack(builder: Any, values: list[Any]) -> Any:
        if packed == 2:
            wide = [builder.zext(v, _I32) for v in values]
            values = [builder.or_(a, builder.shl(b, _I32(16))) for a, b in zip(wide[::2], wide[1::2], strict=True)]
        if words == 1:
            return values[0]
        found = ir.Constant(access, ir.Undefined)
        for i, value in enumerate(values):
            found = builder.insert_element(found, value, _I32(i))
        return found

    @intrinsic
    def fetch(typingctx, address, raw, first):
        def emit(context, builder, signature, args):
            found = builder.load(place(builder, args[0]))
            found.align = width * dtype.itemsize
            parts = [builder.extract_element(found, _I32(i)) for i in range(words)] if words > 1 else [found]
            for part, target in zip(parts, lanes(context, builder, raw, *args[1:], words), strict=True):
                builder.store(part, target)
            return context.get_dummy_value()

        return types.void(types.int64, raw, types.int64), emit

    @intrinsic
    def decode(typingctx, raw, first, values):
        def emit(context, builder, signature, args):
            parts = [builder.load(part) for part in lanes(context, builder, raw, *args[:2], words)]
            targets = lanes(context, builder, values, args[2], _I64(0), width)
            for value, target in zip(unpack(builder, parts), targets, strict=True):
                builder.store(load(builder, value) if load else value, target)
            return context.get_dummy_value()

        return types.void(raw, types.int64, values), emit

    @intrinsic
    def write(typingctx, address, values):
        def emit(context, builder, signature, args):
            found = [builder.load(lane) for lane in lanes(context, builder, values, args[1], _I64(0), width)]
            found = pack(builder, [store(builder, v) if store else v for v in found])
            builder.store(found, place(builder, args[0])).align = width * dtype.itemsize
            return context.get_dummy_value()

        return types.void(types.int64, values), emit

    kind = types.uint32 if packed == 2 else _WORDS[dtype.itemsize]
    return SimpleNamespace(fetch=fetch, decode=decode, write=write, words=words, word=kind)


def matrices(dtype: Any) -> Any:
    """array(address, (rows, columns)): the C-contiguous array of any rank that lies there."""
    if SIMULATED:
        return lambda address, shape: _host_view(address, shape, np.dtype(dtype))

    @intrinsic
    def array(typingctx, address, shape):
        result = types.Array(_TYPES[np.dtype(dtype)], len(shape), "C")

        def emit(context, builder, signature, args):
            sizes = [builder.extract_value(args[1], i) for i in range(result.ndim)]
            itemsize = _I64(np.dtype(dtype).itemsize)
            strides = [itemsize]
            for size in reversed(sizes[1:]):
                strides.insert(0, builder.mul(strides[0], size))
            view = context.make_array(result)(context, builder)
            data = builder.inttoptr(args[0], view.data.type)
            populate_array(view, data=data, shape=sizes, strides=strides, itemsize=itemsize, meminfo=None)
            return view._getvalue()

        return result(types.int64, types.UniTuple(types.int64, len(shape))), emit

    return array


_TYPES = {np.dtype(t.name): t for t in (types.float32, types.float64, types.uint32)}
_WORDS = {2: types.uint16, 4: types.float32, 8: types.float64}  # an element as it lies, by its size


def _host_view(address: int, shape: Any, dtype: np.dtype) -> Any:
    count = int(np.prod(shape))
    if count == 0:
        return np.empty(shape, dtype)
    memory: Any = (ctypes.c_char * (count * dtype.itemsize)).from_address(int(address))
    return np.frombuffer(memory, dtype).reshape(shape)


def _simulated_vector(dtype: np.dtype, width: int) -> SimpleNamespace:
    def view(address: int) -> Any:
        assert address % (width * dtype.itemsize) == 0, "a GPU would fault"
        return _host_view(address, (width,), dtype)

    def fetch(address: int, raw: Any, first: int) -> None:
        raw[first : first + width] = view(address)

    def decode(raw: Any, first: int, values: Any) -> None:
        values[:width] = raw[first : first + width]

    def write(address: int, values: Any) -> None:
        view(address)[:] = values[:width].astype(dtype)

    return SimpleNamespace(fetch=fetch, decode=decode, write=write, words=width, word=dtype)
