"""How the arrays of a step enter its kernel.

The large ones by their memory alone, which is a dense canonical view: to make a view of the right shape in Python would
cost a quarter of a microsecond for each of them. The others as they are, but borrowed: Numba would note who holds them,
and let them go again, which takes a tenth of a microsecond for each. A small call takes two.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import NativeValue, models, register_model, unbox
from numba.np.arrayobj import populate_array

from nbbn.kernels.cpu.lanes import LINE
from nbbn.kernels.cpu.tasks import SIZES
from nbbn.runtime import intrinsic

_POINTER = ir.IntType(8).as_pointer()
# Where NumPy's C interface has the address of an array's first element, and the addresses of its sizes and strides:
# behind what every object begins with, and the number of dimensions.
_ADDRESS = object.__basicsize__
_SHAPE, _STRIDES = _ADDRESS + 16, _ADDRESS + 24


class Data(types.Type):  # type: ignore[misc]  # Numba has no annotations
    """The memory of a NumPy array of this dtype, whatever its shape, or its address, an int: to make an array of what
    another library has costs half a microsecond. Nothing is checked."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(f"Data({dtype})")


@register_model(Data)
class _DataModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, data: Data) -> None:
        super().__init__(manager, data, _POINTER)


@unbox(Data)
def _unbox_data(data: Data, given: Any, c: Any) -> Any:
    builder, found = c.builder, cgutils.alloca_once(c.builder, _POINTER)
    is_int = builder.icmp_unsigned("==", c.pyapi.get_type(given), c.pyapi.get_c_object("PyLong_Type"))
    with builder.if_else(is_int) as (address, array):
        with address:
            builder.store(c.pyapi.long_as_voidptr(given), found)
        with array:
            builder.store(_field(builder, given, _ADDRESS, _POINTER), found)
    return NativeValue(builder.load(found))


def _field(builder: Any, given: Any, offset: int, kind: Any) -> Any:
    """What a NumPy array has at this offset."""
    return builder.load(cgutils.pointer_add(builder, given, offset, return_type=kind.as_pointer()))


class Borrowed(types.Array):  # type: ignore[misc]
    """A NumPy array that whoever calls keeps alive, of this dtype and number of dimensions: nothing is checked."""

    def __init__(self, dtype: Any, ndim: int, layout: str, readonly: bool = False) -> None:
        name = f"Borrowed({dtype}, {ndim}, {layout}{', readonly' if readonly else ''})"
        super().__init__(dtype, ndim, layout, readonly=readonly, name=name)


@register_model(Borrowed)
class _BorrowedModel(models.ArrayModel):  # type: ignore[misc]
    def traverse(self, builder: Any) -> list[Any]:
        """Nothing to count references of: code that does is much of what is compiled."""
        return []


@unbox(Borrowed)
def _unbox_borrowed(kind: Borrowed, given: Any, c: Any) -> Any:
    array, integer = c.context.make_array(kind)(c.context, c.builder), ir.IntType(64)
    size = ir.Constant(integer, c.context.get_abi_sizeof(array.data.type.pointee))
    sizes = ir.ArrayType(integer, kind.ndim).as_pointer()
    shape, strides = (
        cgutils.unpack_tuple(c.builder, c.builder.load(_field(c.builder, given, offset, sizes)))
        for offset in (_SHAPE, _STRIDES)
    )
    data = c.builder.bitcast(_field(c.builder, given, _ADDRESS, _POINTER), array.data.type)
    populate_array(array, data=data, shape=shape, strides=strides, itemsize=size, meminfo=None)
    return NativeValue(array._getvalue())


class Numbers(types.UniTuple):  # type: ignore[misc]
    """So many whole numbers, a tuple in kernels: for Python, an array of int64. Nothing is checked. To read a tuple of
    Python's ints, with a look at each, was most of what led from Python to a kernel."""


register_model(Numbers)(models.UniTupleModel)


@unbox(Numbers)
def _unbox_numbers(kind: Numbers, given: Any, c: Any) -> Any:
    place = _field(c.builder, given, _ADDRESS, c.context.get_value_type(kind).as_pointer())
    return NativeValue(c.builder.load(place, align=8))


def as_view(rank: int) -> Any:
    """The function for kernels that makes arrays of the first `rank` sizes that a grid names: R0, K0, R1, K1. What is
    no Data is one already."""

    def plain(array, grid):
        shape = tuple(grid[i] for i in SIZES[:rank])
        return array if array is None or array.shape == shape else array.reshape(shape)

    @intrinsic(plain=plain)
    def view_of(typingctx, array, grid):
        if not isinstance(array, Data):
            return array(array, grid), _as_it_is
        result = Borrowed(array.dtype, rank, "C")

        def emit(context, builder, signature, args):
            sizes = cgutils.unpack_tuple(builder, args[1])
            return _dense(context, builder, result, args[0], [sizes[i] for i in SIZES[:rank]])

        return result(array, grid), emit

    return view_of


def _dense(context, builder, kind, data, shape):
    """An array without gaps, in new memory where `data` is None."""
    array = context.make_array(kind)(context, builder)
    size = ir.IntType(64)(context.get_abi_sizeof(array.data.type.pointee))
    strides = [size]
    for n in shape[:0:-1]:
        strides.insert(0, builder.mul(strides[0], n))
    meminfo = None
    if data is None:
        meminfo = context.nrt.meminfo_alloc_aligned(builder, builder.mul(strides[0], shape[0]), ir.IntType(32)(LINE))
        data = context.nrt.meminfo_data(builder, meminfo)
    data = builder.bitcast(data, array.data.type)
    populate_array(array, data=data, shape=shape, strides=strides, itemsize=size, meminfo=meminfo)
    return array._getvalue()


@intrinsic(plain=lambda shape, like: np.empty(shape, like.dtype))
def empty(typingctx, shape, like):
    """numpy.empty with the dtype of another array, less than the address space: without the functions of Numba's own
    that it would have to compile in each process."""
    result = types.Array(like.dtype, len(shape), "C")

    def emit(context, builder, signature, args):
        return _dense(context, builder, result, None, cgutils.unpack_tuple(builder, args[0]))

    return result(shape, like), emit


def _as_it_is(context, builder, signature, args):
    context.nrt.incref(builder, signature.return_type, args[0])
    return args[0]
