"""Memory that belongs to one task, and stores that bypass the caches.

An array on the stack cannot overlap with anything else, which the compiler knows: loops that write one are vectorized
without the run-time checks that several arrays of the heap would need.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np.arrayobj import populate_array

from nbbn.kernels.cpu.elements import element
from nbbn.kernels.cpu.scalars import load, store
from nbbn.runtime import intrinsic

BLOCK = 1024  # elements of a local array: a few of them fit into a core's L1
LINE = 64  # bytes
# Bytes between local arrays. Where a load and a store before it have the same last 12 bits of an address, the processor
# lets the load wait until it knows more: arrays that follow each other, of a power of 2 bytes, would all have that.
APART = 1024 + LINE

# How a result reaches the memory of its array.
DIRECT, BUFFERED, STREAMED = range(3)

_I64 = ir.IntType(64)
_VECTOR = ir.VectorType(ir.IntType(8), LINE)


def _block(given, dtype):
    """An intrinsic's answer: an array of BLOCK elements of a Numba dtype on the stack, not initialized, which lives as
    long as the function that made it; None where None is given."""
    if isinstance(given, types.NoneType):
        return given(given), lambda context, builder, signature, args: args[0]
    result = types.Array(dtype, 1, "C")

    def emit(context, builder, signature, args):
        stored = context.get_data_type(result.dtype)
        memory = cgutils.alloca_once(builder, ir.ArrayType(stored, BLOCK + APART // context.get_abi_sizeof(stored)))
        memory.align = LINE
        array = context.make_array(result)(context, builder)
        size = ir.Constant(_I64, context.get_abi_sizeof(stored))
        populate_array(
            array,
            data=builder.bitcast(memory, array.data.type),
            shape=[ir.Constant(_I64, BLOCK)],
            strides=[size],
            itemsize=size,
            meminfo=None,
        )
        return array._getvalue()

    return result(given), emit


@intrinsic(plain=lambda like: None if like is None else np.empty(BLOCK, like.dtype))
def local(typingctx, like):
    """A block with the dtype of the array `like`; None of None."""
    return _block(like, getattr(like, "dtype", None))


@intrinsic(plain=lambda beside: None if beside is None else np.empty(BLOCK))
def local_sums(typingctx, beside):
    """A block of float64, for sums that there are if `beside` is there; None of None."""
    return _block(beside, types.float64)


def _plain_segment(array, place, begin, end):
    if array is None or place[:1] == array.shape[:1]:  # ahead() may be asked for what follows the last row
        return None
    return array[(*place, slice(begin, end))]


@intrinsic(plain=_plain_segment)
def segment(typingctx, array, place, begin, end):
    """array[(*place, slice(begin, end))], one-dimensional; None of None.

    Without a reference to the memory, whose count threads would take turns at changing, and without the code for
    negative indices.
    """
    if isinstance(array, types.NoneType):
        return array(array, place, begin, end), lambda context, builder, signature, args: args[0]
    result = array.copy(ndim=1)

    def emit(context, builder, signature, args):
        source = context.make_array(array)(context, builder, args[0])
        strides = cgutils.unpack_tuple(builder, source.strides, array.ndim)
        indices = [*cgutils.unpack_tuple(builder, args[1], array.ndim - 1), args[2]]
        offset = _I64(0)
        for index, stride in zip(indices, strides, strict=True):
            offset = builder.add(offset, builder.mul(index, stride))
        view = context.make_array(result)(context, builder)
        populate_array(
            view,
            data=cgutils.pointer_add(builder, source.data, offset, return_type=view.data.type),
            shape=[builder.sub(args[3], args[2])],
            strides=[strides[-1]],
            itemsize=source.itemsize,
            meminfo=None,
        )
        return view._getvalue()

    return result(array, place, begin, end), emit


@intrinsic(plain=lambda array: array.ctypes.data)
def _address(typingctx, array):
    def emit(context, builder, signature, args):
        return builder.ptrtoint(context.make_array(array)(context, builder, args[0]).data, _I64)

    return types.int64(array), emit


def _plain_stream_line(target, source, byte):
    line = slice(byte, byte + LINE)
    target.view(np.uint8)[line] = source.view(np.uint8)[line]


@intrinsic(plain=_plain_stream_line)
def _stream_line(typingctx, target, source, byte):
    """Copy LINE bytes, past the caches; the place in `target` is aligned to LINE."""

    def emit(context, builder, signature, args):
        places = []
        for array, value in zip((target, source), args[:2], strict=True):
            start = builder.bitcast(context.make_array(array)(context, builder, value).data, ir.IntType(8).as_pointer())
            places.append(builder.bitcast(builder.gep(start, [args[2]]), _VECTOR.as_pointer()))
        line = builder.load(places[1])
        line.align = 1
        store = builder.store(line, places[0])
        store.align = LINE
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(target, source, types.int64), emit


@intrinsic(plain=lambda array, index: None)
def _prefetch(typingctx, array, index):
    """Have the line of an element ready for writing. The element need not exist."""

    def emit(context, builder, signature, args):
        place = builder.gep(context.make_array(array)(context, builder, args[0]).data, [args[1]])
        pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32]), "llvm.prefetch.p0i8"
        )
        builder.call(function, [builder.bitcast(place, pointer), i32(1), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


@element
def ahead(array, place, begin, end):
    """Have a segment's beginning ready until the processor has seen where it goes on: it does not look past a page."""
    v = segment(array, place, begin, end)
    for line in range(4):
        _prefetch(v, line * (LINE // array.itemsize))


@element
def past_line(array):
    """How many elements the array starts after the last border between lines of the cache."""
    return _address(array) % LINE // array.itemsize


@element
def expect(target, mode):
    """Before the elements of write(target, mode) are computed: of what is streamed, the lines at both ends are written
    in part, through the caches. Waiting for them then would halve the speed."""
    if target is not None and mode == STREAMED:
        _prefetch(target, 0)
        _prefetch(target, target.size - 1)


@intrinsic(plain=lambda: None)
def fence(typingctx):
    """What was streamed before is seen by every thread that this one gives a signal to."""

    def emit(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


@element
def write(source, target, mode):
    """Copy a local array's beginning to `target`, which is contiguous where it is STREAMED; what is DIRECT is there."""
    if target is None or mode == DIRECT:
        return
    n, head, tail = target.size, 0, 0
    if mode == STREAMED:
        size = target.itemsize
        head = min(n, -_address(target) % LINE // size)
        tail = head + (n - head) * size // LINE * LINE // size
        for byte in range(head * size, tail * size, LINE):
            _stream_line(target, source, byte)
    for i in range(head):
        store(target, i, load(source, i))
    for i in range(tail, n):
        store(target, i, load(source, i))
