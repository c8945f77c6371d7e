"""Arrays: their elements and parts, and places on the stack."""

from copy import copy

from llvmlite import ir
from numba.core import cgutils

from nbbn.kernels.cpu import floats
from nbbn.kernels.cpu.llvm.values import (
    BLOCK,
    DOUBLE,
    HALF,
    I8,
    I32,
    I64,
    LANES,
    LINE,
    POSITIONS,
    SUM,
    Value,
    building,
    call,
    drop,
    halves,
    here,
    in_all_places,
    integer,
    joined,
    mask_of,
    splat,
)

# Bytes between local arrays. Where a load and a store before it have the same last 12 bits of an address, the processor
# lets the load wait until it knows more: arrays that follow each other, of a power of 2 bytes, would all have that.
APART = 1024 + LINE


class Memory:
    """An array: load() and store() take those of one dimension, and others are indexed as NumPy's are."""

    def __init__(self, dtype, data, shape, strides):
        self.dtype, self.data, self.shape, self.strides = dtype, data, shape, strides
        self.element = data.type.pointee
        self.itemsize = building[-1][0].get_abi_sizeof(self.element)
        self.vector = ir.VectorType(self.element, LANES)

    @classmethod
    def of(cls, kind, value):
        """Numba's array."""
        context, builder = building[-1]
        view = context.make_array(kind)(context, builder, value)
        shape = [Value(n) for n in cgutils.unpack_tuple(builder, view.shape, kind.ndim)]
        strides = list(cgutils.unpack_tuple(builder, view.strides, kind.ndim))
        if kind.layout == "C":
            strides[-1] = None  # the elements follow each other
        return cls(kind.dtype, view.data, shape, strides)

    @property
    def ndim(self):
        return len(self.shape)

    @property
    def size(self):
        return self.shape[-1]

    @property
    def is_contiguous(self):
        return self.strides[-1] is None

    def place(self, *index):
        builder, found = here(), self.data
        for i, size, stride in zip(index, self.shape, self.strides, strict=False):
            if isinstance(i, int) and i <= 0:
                if i == 0:
                    continue
                i = size + i
            if stride is None:
                found = builder.gep(found, [integer(i)])
            else:
                found = builder.gep(found, [builder.mul(integer(i), stride)], source_etype=I8)
        return found

    def from_(self, *index):
        """What is left of the array from an index of its first dimensions on."""
        found, depth = copy(self), len(index)
        found.data, found.shape, found.strides = self.place(*index), self.shape[depth:], self.strides[depth:]
        return found

    def __getitem__(self, index):
        if isinstance(index, tuple):
            *rows, columns = index
            return load(self.from_(*rows), columns.i, columns.n)
        return number(self, index) if self.ndim == 1 else self.from_(index)

    def __setitem__(self, index, vector):
        *rows, columns = index
        target, vector = self.from_(*rows), splat(vector)
        if vector.value.type.element != target.element:
            vector = Value(here().fptrunc(vector.value, target.vector))
        store(target, columns.i, vector, columns.n, is_rare=True)

    def masked(self, operation, result, *arguments):
        """LLVM's masked load, store, gather or scatter."""
        kind = f"{'i' if isinstance(self.element, ir.IntType) else 'f'}{8 * self.itemsize}"
        pointer = f"v{LANES}p0" if operation in ("gather", "scatter") else "p0"
        return call(f"masked.{operation}.v{LANES}{kind}.{pointer}", result, *arguments)

    def access(self, i, near, far):
        """near(the place of the i-th element) where the elements follow each other, else far(that place)."""
        start, stride = self.place(i), self.strides[-1]
        if stride is None:
            return near(start)
        return _one_of(_is(stride, self.itemsize), lambda: near(start), lambda: far(start))

    def places(self, start):
        """Those of sixteen elements."""
        builder, stride = here(), in_all_places(self.strides[-1])
        found = builder.add(in_all_places(builder.ptrtoint(start, I64)), builder.mul(POSITIONS, stride))
        return builder.inttoptr(found, ir.VectorType(self.element.as_pointer(), LANES))


def _is(number, other):
    return here().icmp_signed("==", number, I64(other))


def _one_of(condition, body, otherwise):
    """What one of the two returns, a vector of LLVM's or None."""
    builder, found = here(), []
    with builder.if_else(condition) as branches:
        for branch, of in zip(branches, (body, otherwise), strict=True):
            with branch:
                found.append((of(), builder.block))
    if found[0][0] is None:
        return None
    merged = builder.phi(found[0][0].type)
    for result, block in found:
        merged.add_incoming(result, block)
    return merged


class Columns:
    """Up to sixteen columns of an array, as its last index: n of them from the i-th on."""

    def __init__(self, i, n):
        self.i, self.n = i, n


def load(array, i, n=None):
    """Elements from the i-th on. 0 <= i. What is no array comes back."""
    if not isinstance(array, Memory):
        return array
    builder, align, zeros = here(), I32(array.itemsize), ir.Constant(array.vector, None)

    def near(place):
        if n is None:
            return builder.load(place, align=array.itemsize, typ=array.vector)
        if array.itemsize in floats.MASKED_LOADS:
            return array.masked("load", array.vector, place, align, mask_of(n).value, zeros)
        return _read_first(array, place, n)

    def alike(place):
        value = in_all_places(builder.load(place))
        return value if n is None else builder.select(mask_of(n).value, value, zeros)

    def apart(place):
        return array.masked("gather", array.vector, array.places(place), align, mask_of(n).value, zeros)

    def far(place):  # often they are all the same: a weight that all channels have in common
        return _one_of(_is(array.strides[-1], 0), lambda: alike(place), lambda: apart(place))

    return Value(floats.decode(builder, array.dtype, array.access(i, near, far)))


def store(array, i, vector, n=None, is_rare=False):
    """Write elements from the i-th on, rounded to nearest even. 0 <= i. is_rare: by short code rather than quickly."""
    if array is None:
        return
    align, nothing = I32(array.itemsize), ir.VoidType()
    value = floats.encode(here(), array.dtype, vector.value)

    def near(place):
        if n is None:
            _write(value, place, array.itemsize)
        elif is_rare or array.itemsize in floats.MASKED_STORES:
            array.masked("store", nothing, value, place, align, mask_of(n).value)
        else:
            _write_first(value, place, n, array.itemsize)

    def far(place):
        array.masked("scatter", nothing, value, array.places(place), align, mask_of(n).value)

    array.access(i, near, far)


def _read_first(array, place, n):
    """The first n, fewer than sixteen, and zeros: from the last one on, as _write_first() has written them."""
    found = ir.Constant(ir.VectorType(array.element, 1), None)
    for size in (1, 2, 4, 8):
        found = _before(array, place, n, size, found)
    return found


def _before(array, place, n, size, rest):
    """The rest, and before it as many elements of the array if their number is part of n; what follows is 0."""
    builder, n, zeros = here(), integer(n), ir.Constant(rest.type, None)

    def both():
        first = builder.gep(place, [builder.and_(n, I64(-2 * size))])
        return joined(builder.load(first, align=array.itemsize, typ=rest.type), rest)

    return _one_of(_is(builder.and_(n, I64(size)), size), both, lambda: joined(rest, zeros))


def _write_first(value, place, n, align):
    """Write the first n, fewer than sixteen: eight, four, two, one."""
    builder = here()
    while value.type.count > 1:
        low, high = halves(value)
        bit = builder.and_(integer(n), I64(low.type.count))
        there = builder.icmp_signed("!=", bit, I64(0))
        with builder.if_then(there):
            _write(low, place, align)
        place, value = builder.gep(place, [bit]), builder.select(there, high, low)


def _write(value, place, align):
    builder = here()
    return builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=align)


def border(array):
    """At which addresses stream() may write: lines of the cache, or half ones if sixteen elements are no more."""
    return min(LINE, LANES * array.itemsize)


def stream(array, i, vector):
    """Write sixteen elements past the caches, to a place at a border."""
    if array is None:
        return
    builder = here()
    value = floats.encode(builder, array.dtype, vector.value)
    stored = _write(value, array.place(i), border(array))
    stored.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))


def number(array, *index):
    """An element, in all places."""
    return splat(Value(floats.decode(here(), array.dtype, here().load(array.place(*index)))))


def whole(array, i):
    """An element of an array of whole numbers."""
    return Value(here().load(array.place(i)))


def load_half(array, i):
    """HALF numbers of float64 from the i-th on."""
    return Value(here().load(array.place(i), align=array.itemsize, typ=ir.VectorType(DOUBLE, HALF)))


def add_halves(array, i, vector, is_first):
    """Add the sixteen, half and half, to HALF numbers from the i-th on; write them if they are the first."""
    low, high = (Value(half, SUM) for half in halves(vector.value))
    before = load_half(array, i)
    found = drop(is_first, before) + (low + high)
    _write(found.value, array.place(i), array.itemsize)


def write_total(array, index, vector):
    """Write the sum of a vector to one element: half and half, and so on."""
    value = vector.value
    while value.type.count > 1:
        value = here().fadd(*halves(value))
    here().store(here().extract_element(value, I32(0)), array.place(*index))


def part(array, place, begin, end):
    """array[(*place, slice(begin, end))]; None of None, and of several arrays those of each. It may go on in the rows
    that follow, where these follow in memory."""
    if isinstance(array, (tuple, list)):
        return [part(a, place, begin, end) for a in array]
    if array is None:
        return None
    found = array.from_(*place)
    found.data, found.shape = found.place(begin), [end - begin + Value(I64(0))]
    return found


def either(condition, a, b):
    """One of two arrays of one dimension and dtype."""
    found = copy(a)
    found.data = here().select(condition.value, a.data, b.data)
    return found


def reserve(kind):
    """A place on the stack, not initialized: Numba's function writes zeros, for which LLVM makes a store of each."""
    with here().goto_entry_block():
        return here().alloca(kind)


def local(like, beside):
    """An array of BLOCK elements, and room for a vector behind them, with the dtype of `like` on the stack, not
    initialized; None where there is nothing beside."""
    if beside is None:
        return None
    memory = reserve(ir.ArrayType(like.element, BLOCK + APART // like.itemsize))
    memory.align = LINE
    return Memory(like.dtype, here().bitcast(memory, like.element.as_pointer()), [Value(I64(BLOCK))], [None])


def fence():
    """What was streamed before is seen by every thread that this one gives a signal to."""
    here().fence("seq_cst")
