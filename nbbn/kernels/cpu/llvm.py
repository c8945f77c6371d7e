"""What traced functions are made of (lanes.py), as LLVM's code: vectors and numbers, memory, loops."""

from contextlib import contextmanager
from copy import copy

from llvmlite import ir
from numba import types
from numba.core import cgutils

from nbbn.kernels.cpu import floats

LANES = 16
HALF = LANES // 2
LINE = 64  # bytes of a line of the cache
BLOCK = 1024  # elements of a local array: a few of them fit into a core's L1
# Bytes between local arrays. Where a load and a store before it have the same last 12 bits of an address, the processor
# lets the load wait until it knows more: arrays that follow each other, of a power of 2 bytes, would all have that.
APART = 1024 + LINE

_I1, _I8, _I32, _I64, _DOUBLE = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.DoubleType()
_SUM = ("contract", "nsz")  # what may be done to the arithmetic of sums; nothing to that of results
_POSITIONS = ir.Constant(ir.VectorType(_I64, LANES), list(range(LANES)))
_building: list = []  # the contexts and builders of the functions that are traced now


class tracing:
    """While this is entered, code goes to a builder."""

    def __init__(self, context, builder):
        self.now = context, builder

    def __enter__(self):
        _building.append(self.now)

    def __exit__(self, *error):
        _building.pop()


def _builder():
    return _building[-1][1]


def _is_vector(value):
    return isinstance(value.type, ir.VectorType)


def _scalar(kind):
    return kind.element if isinstance(kind, ir.VectorType) else kind


def _splat(value):
    vector = ir.VectorType(value.type, LANES)
    nothing, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return _builder().shuffle_vector(_builder().insert_element(nothing, value, _I32(0)), nothing, zeros)


def _call(name, result, *arguments):
    signature = ir.FunctionType(result, [a.type for a in arguments])
    return _builder().call(cgutils.get_or_insert_function(_builder().module, signature, f"llvm.{name}"), arguments)


# -- values ------------------------------------------------------------------------------------------------------------


def _operation(of_floats, of_integers=None, swapped=False):
    def method(self, other):
        pair = self, self.like(other)
        a, b = pair[::-1] if swapped else pair
        if isinstance(_scalar(a.value.type), ir.IntType):
            return Value(getattr(_builder(), of_integers)(a.value, b.value))
        flags = a.flags or b.flags
        return Value(getattr(_builder(), of_floats)(a.value, b.value, flags=flags), flags)

    return method


def _comparison(sign):
    def method(self, other):
        builder, a, b = _builder(), self.value, self.like(other).value
        if isinstance(_scalar(a.type), ir.IntType):
            return Value(builder.icmp_signed(sign, a, b))
        return Value((builder.fcmp_unordered if sign == "!=" else builder.fcmp_ordered)(sign, a, b))

    return method


class Value:
    """A number or a condition, or sixteen of them. Whole numbers are not negative where they are divided.

    flags: what LLVM may do to its arithmetic.
    """

    def __init__(self, value, flags=()):
        self.value, self.flags = value, flags

    def like(self, other):
        """A constant as a value of this one's type."""
        if isinstance(other, Value):
            return other
        number = float(other) if _scalar(self.value.type) in (ir.FloatType(), _DOUBLE) else int(other)
        return Value(
            ir.Constant(self.value.type, [number] * self.value.type.count if _is_vector(self.value) else number)
        )

    def _same(self, name):
        kind = self.value.type
        bits = 32 if kind.element == ir.FloatType() else 64
        return Value(_call(f"{name}.v{LANES}f{bits}", kind, self.value), self.flags)

    __add__, __radd__ = _operation("fadd", "add"), _operation("fadd", "add", swapped=True)
    __sub__, __rsub__ = _operation("fsub", "sub"), _operation("fsub", "sub", swapped=True)
    __mul__, __rmul__ = _operation("fmul", "mul"), _operation("fmul", "mul", swapped=True)
    __truediv__ = _operation("fdiv")
    __floordiv__, __rfloordiv__ = _operation(None, "udiv"), _operation(None, "udiv", swapped=True)
    __mod__, __rmod__ = _operation(None, "urem"), _operation(None, "urem", swapped=True)
    __and__, __or__ = _operation(None, "and_"), _operation(None, "or_")
    __lt__, __le__, __gt__, __ge__ = (_comparison(sign) for sign in ("<", "<=", ">", ">="))
    __eq__, __ne__ = _comparison("=="), _comparison("!=")

    def __bool__(self):
        raise TypeError("a value that LLVM's code finds decides no branch of Python's: see when() and choose()")

    def __neg__(self):
        return Value(_builder().fneg(self.value), self.flags)

    def __abs__(self):
        return self._same("fabs")

    def sqrt(self):
        return self._same("sqrt")


def _int(i):
    return _I64(i) if isinstance(i, int) else i.value


def minimum(a, b):
    """Of two whole numbers."""
    a, b = _int(a), _int(b)
    return Value(_builder().select(_builder().icmp_signed("<", a, b), a, b))


def choose(condition, x, other):
    """x where the condition holds, else the other."""
    x = x if isinstance(x, Value) else other.like(x)
    return Value(_builder().select(condition.value, x.value, x.like(other).value), x.flags)


def drop(condition, x):
    """0 where the condition holds, else x."""
    return choose(condition, x.like(0), x)


def is_any(condition):
    """Whether it holds anywhere."""
    bits = _builder().bitcast(condition.value, ir.IntType(LANES))
    return Value(_builder().icmp_unsigned("!=", bits, bits.type(0)))


def splat(number):
    """A number in all places."""
    if number is None or (isinstance(number, Value) and _is_vector(number.value)):
        return number
    return Value(_splat(number.value if isinstance(number, Value) else ir.Constant(_DOUBLE, float(number))))


def wide(vector):
    """The same numbers as float64, for sums."""
    if vector is None:
        return None
    value, double = vector.value, ir.VectorType(_DOUBLE, LANES)
    return Value(value if value.type == double else _builder().fpext(value, double), _SUM)


def first(vector, n):
    """The first n numbers, and 0 in the other places."""
    return vector if n is None else choose(_mask(n), vector, 0)


class First(Value):
    """A number of elements, and which ones they are of sixteen."""

    def __init__(self, value):
        super().__init__(value)
        self.mask = Value(_POSITIONS) < Value(_splat(value))


def _mask(n):
    """Of the first n."""
    if isinstance(n, First):
        return n.mask
    if n is None:
        return Value(ir.Constant(ir.VectorType(_I1, LANES), [1] * LANES))
    return Value(_POSITIONS) < Value(_splat(_int(n)))


def _halves(value):
    """The first and the second half of LLVM's vector."""
    n, nothing = value.type.count // 2, ir.Constant(value.type, ir.Undefined)
    parts = [ir.Constant(ir.VectorType(_I32, n), list(range(k, k + n))) for k in (0, n)]
    return [_builder().shuffle_vector(value, nothing, part) for part in parts]


# -- memory ------------------------------------------------------------------------------------------------------------


class Memory:
    """An array: load() and store() take those of one dimension, and others are indexed as NumPy's are."""

    def __init__(self, dtype, data, shape, strides):
        self.dtype, self.data, self.shape, self.strides = dtype, data, shape, strides
        self.element = data.type.pointee
        self.itemsize = _building[-1][0].get_abi_sizeof(self.element)
        self.vector = ir.VectorType(self.element, LANES)

    @classmethod
    def of(cls, kind, value):
        """Numba's array."""
        context, builder = _building[-1]
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
        builder, found = _builder(), self.data
        for i, size, stride in zip(index, self.shape, self.strides, strict=False):
            if isinstance(i, int) and i <= 0:
                if i == 0:
                    continue
                i = size + i
            if stride is None:
                found = builder.gep(found, [_int(i)])
            else:
                found = builder.gep(found, [builder.mul(_int(i), stride)], source_etype=_I8)
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
            vector = Value(_builder().fptrunc(vector.value, target.vector))
        store(target, columns.i, vector, columns.n)

    def masked(self, operation, result, *arguments):
        """LLVM's masked load, store, gather or scatter."""
        kind = f"{'i' if isinstance(self.element, ir.IntType) else 'f'}{8 * self.itemsize}"
        pointer = f"v{LANES}p0" if operation in ("gather", "scatter") else "p0"
        return _call(f"masked.{operation}.v{LANES}{kind}.{pointer}", result, *arguments)

    def access(self, i, near, far):
        """near(the place of the i-th element) where the elements follow each other, else far(the places of all)."""
        builder, start = _builder(), self.place(i)
        if self.is_contiguous:
            return near(start)
        stride, found = self.strides[-1], []
        with builder.if_else(builder.icmp_signed("==", stride, _I64(self.itemsize))) as branches:
            for branch, is_near in zip(branches, (True, False), strict=True):
                with branch:
                    if is_near:
                        result = near(start)
                    else:
                        places = builder.add(
                            _splat(builder.ptrtoint(start, _I64)), builder.mul(_POSITIONS, _splat(stride))
                        )
                        result = far(builder.inttoptr(places, ir.VectorType(self.element.as_pointer(), LANES)))
                    found.append((result, builder.block))
        if found[0][0] is None:
            return None
        merged = builder.phi(self.vector)
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
    builder, align, zeros = _builder(), _I32(array.itemsize), ir.Constant(array.vector, None)

    def near(place):
        if n is not None:
            return array.masked("load", array.vector, place, align, _mask(n).value, zeros)
        return builder.load(place, align=array.itemsize, typ=array.vector)

    def far(places):
        return array.masked("gather", array.vector, places, align, _mask(n).value, zeros)

    return Value(floats.decode(builder, array.dtype, array.access(i, near, far)))


def _write(value, place, align):
    builder = _builder()
    return builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=align)


def store(array, i, vector, n=None):
    """Write elements from the i-th on, rounded to nearest even. 0 <= i."""
    if array is None:
        return
    builder, align, nothing = _builder(), _I32(array.itemsize), ir.VoidType()
    value = floats.encode(builder, array.dtype, vector.value)

    def near(place):
        if n is None:
            _write(value, place, array.itemsize)
        else:
            array.masked("store", nothing, value, place, align, _mask(n).value)

    array.access(
        i, near, lambda places: array.masked("scatter", nothing, value, places, align, _mask(n).value) and None
    )


def _border(array):
    """At which addresses _stream() may write: lines of the cache, or half ones if sixteen elements are no more."""
    return min(LINE, LANES * array.itemsize)


def _stream(array, i, vector):
    """Write sixteen elements past the caches, to a place at a border."""
    if array is None:
        return
    builder = _builder()
    value = floats.encode(builder, array.dtype, vector.value)
    stored = _write(value, array.place(i), _border(array))
    stored.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))


def number(array, *index):
    """An element, in all places."""
    return splat(Value(floats.decode(_builder(), array.dtype, _builder().load(array.place(*index)))))


def whole(array, i):
    """An element of an array of whole numbers."""
    return Value(_builder().load(array.place(i)))


def load_half(array, i):
    """HALF numbers of float64 from the i-th on."""
    return Value(_builder().load(array.place(i), align=array.itemsize, typ=ir.VectorType(_DOUBLE, HALF)))


def add_halves(array, i, vector, is_first):
    """Add the sixteen, half and half, to HALF numbers from the i-th on; write them if they are the first."""
    low, high = (Value(half, _SUM) for half in _halves(vector.value))
    before = load_half(array, i)
    found = drop(is_first, before) + (low + high)
    _write(found.value, array.place(i), array.itemsize)


def write_total(array, index, vector):
    """Write the sum of a vector to one element: half and half, and so on."""
    value = vector.value
    while value.type.count > 1:
        value = _builder().fadd(*_halves(value))
    _builder().store(_builder().extract_element(value, _I32(0)), array.place(*index))


def part(array, place, begin, end):
    """array[(*place, slice(begin, end))]; None of None, and of several arrays those of each. It may go on in the rows
    that follow, where these follow in memory."""
    if isinstance(array, (tuple, list)):
        return [part(a, place, begin, end) for a in array]
    if array is None:
        return None
    found = array.from_(*place)
    found.data, found.shape = found.place(begin), [end - begin + Value(_I64(0))]
    return found


def either(condition, a, b):
    """One of two arrays of one dimension and dtype."""
    found = copy(a)
    found.data = _builder().select(condition.value, a.data, b.data)
    return found


def _reserve(kind):
    """A place on the stack, not initialized: Numba's function writes zeros, for which LLVM makes a store of each."""
    with _builder().goto_entry_block():
        return _builder().alloca(kind)


def local(like, beside):
    """An array of BLOCK elements with the dtype of `like` on the stack, not initialized; None where there is nothing
    beside."""
    if beside is None:
        return None
    memory = _reserve(ir.ArrayType(like.element, BLOCK + APART // like.itemsize))
    memory.align = LINE
    return Memory(like.dtype, _builder().bitcast(memory, like.element.as_pointer()), [Value(_I64(BLOCK))], [None])


def fence():
    """What was streamed before is seen by every thread that this one gives a signal to."""
    _builder().fence("seq_cst")


# -- control -----------------------------------------------------------------------------------------------------------


class _Kept:
    """Vectors that a loop hands on: in memory, which LLVM makes registers of."""

    def __init__(self, sums):
        self.places = [None if s is None else _reserve(s.value.type) for s in sums]
        self.flags = [None if s is None else s.flags for s in sums]
        self.put(sums)

    def get(self):
        return [p and Value(_builder().load(p), f) for p, f in zip(self.places, self.flags, strict=True)]

    def put(self, sums):
        for place, found in zip(self.places, sums or (), strict=True):
            if place is not None:
                _builder().store(found.value, place)


@contextmanager
def _loop(begin, end, step):
    """What is entered is run for whole numbers from one to another."""
    builder = _builder()
    before, (head, body, after) = builder.block, (builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(_I64)
    i.add_incoming(begin, before)
    builder.cbranch(builder.icmp_signed("<", i, end), body, after)
    builder.position_at_end(body)
    yield Value(i)
    i.add_incoming(builder.add(i, step), builder.block)
    builder.branch(head)
    builder.position_at_end(after)


def over(begin, end, body, sums=()):
    """Run body(i, n, sums) for all elements from one to another, sixteen at a time and then those that are left.

    sums: vectors that are handed on from one to the next. Returns: those that the last one returns.
    """
    builder, kept, begin, end = _builder(), _Kept(sums), _int(begin), _int(end)
    left = builder.and_(builder.sub(end, begin), _I64(LANES - 1))
    whole = builder.sub(end, left)
    with _loop(begin, whole, _I64(LANES)) as i:
        kept.put(body(i, None, kept.get()))
    with builder.if_then(builder.icmp_signed(">", left, _I64(0))):
        kept.put(body(Value(whole), First(left), kept.get()))
    return kept.get()


def over_columns(begin, end, body, sums=()):
    """The same as body(columns, sums), where columns(offset) are the columns so far to the right of these."""
    return over(begin, end, lambda i, n, found: body(lambda offset=0: Columns(i + offset, n), found), sums)


def each(begin, end, step, body, sums=()):
    """Run body(i, sums) for whole numbers; sums: see over()."""
    kept = _Kept(sums)
    with _loop(_int(begin), _int(end), _int(step)) as i:
        kept.put(body(i, kept.get()))
    return kept.get()


def when(condition, body, otherwise=None):
    """Run one of the two."""
    with _builder().if_else(condition.value) as (then, other):
        with then:
            body()
        with other:
            if otherwise is not None:
                otherwise()


def again(body):
    """Run body() as long as it returns a condition that holds; once if it returns None."""
    builder = _builder()
    loop = builder.append_basic_block("again")
    builder.branch(loop)
    builder.position_at_end(loop)
    condition = body()
    if condition is not None:
        after = builder.append_basic_block("after")
        builder.cbranch(condition.value, loop, after)
        builder.position_at_end(after)


def write_run(targets, results, streamed):
    """Write results(i, n), a vector for each of the targets, for all their elements. streamed: past the caches.

    A target may be an input, too: all that a vector is made of is read before it is written.
    """

    def write(i, n, _):
        for target, vector in zip(targets, results(i, n), strict=True):
            store(target, i, vector, n)

    there = [t for t in targets if t is not None]
    if not all(t.is_contiguous for t in there):
        over(0, there[0].size, write)
        return
    heads = [_to_border(t) for t in there]
    past = streamed != 0
    for head in heads[1:]:
        past = past & (head == heads[0])
    when(past, lambda: _write_past(targets, results, write, heads[0]), lambda: over(0, there[0].size, write))


def _write_past(targets, results, write, head):
    """The lines at both ends of a run are written in part, and so through the caches; they are fetched ahead, as
    waiting for them then would halve the speed."""
    there = [t for t in targets if t is not None]
    size = there[0].size
    for target in there:
        for place in (target.data, target.place(size - 1)):
            _call("prefetch.p0", ir.VoidType(), place, _I32(1), _I32(3), _I32(1))

    def write_past(i, n, _):
        if n is not None:
            return write(i, n, ())
        for target, vector in zip(targets, results(i, n), strict=True):
            _stream(target, i, vector)

    head = minimum(head, size)
    when(head > 0, lambda: write(Value(_I64(0)), First(head.value), ()))
    over(head, size, write_past)


def _to_border(array):
    """How many elements there are before the first border: fewer than sixteen."""
    past = _builder().and_(_builder().neg(_builder().ptrtoint(array.data, _I64)), _I64(_border(array) - 1))
    return Value(past) // array.itemsize


def symbol(kind, value):
    """What stands for an argument of Numba's in a traced function."""
    if isinstance(kind, types.NoneType):
        return None
    if isinstance(kind, types.BaseTuple):
        return tuple(symbol(k, v) for k, v in zip(kind, cgutils.unpack_tuple(_builder(), value), strict=True))
    return Memory.of(kind, value) if isinstance(kind, types.Array) else Value(value)


# -- tasks -------------------------------------------------------------------------------------------------------------


def emit_tasks(context, builder, function, kinds, values):
    """Code that runs function(task, *given) for all tasks. values: pool, how many tasks there are, and what is given,
    of these kinds; see lanes.per_task().

    The function becomes one of LLVM's, of a task's number and of the place where the rest lies: whoever launches it
    (pool.py) need not know what that is, so that there is one launcher, which is compiled once.
    """
    pool, tasks, *values = values
    with tracing(context, builder):
        given = [symbol(k, v) for k, v in zip(kinds, values, strict=True)]
        parts = _parts(given)
        frame = _reserve(ir.LiteralStructType([v.type for v in parts]))
    for i, value in enumerate(parts):
        builder.store(value, cgutils.gep_inbounds(builder, frame, 0, i))
    run = _task(context, builder.module, function, given, frame.type)
    with builder.if_else(builder.icmp_signed("==", pool, _I64(0))) as (alone, together):
        with alone, tracing(context, builder), _loop(_I64(0), tasks, _I64(1)) as task:
            builder.call(run, [task.value, frame])
        with together:
            launch = builder.inttoptr(pool, ir.FunctionType(ir.VoidType(), [_I64] * 3).as_pointer())
            builder.call(launch, [builder.ptrtoint(run, _I64), builder.ptrtoint(frame, _I64), tasks])


def _task(context, module, function, given, frame):
    """LLVM's function of a task's number and the place of a frame, which has the parts of what is given."""
    kind = ir.FunctionType(ir.VoidType(), [_I64, frame])
    found = ir.Function(module, kind, module.get_unique_name(function.__name__))
    found.linkage = "internal"
    found.attributes.add("noinline")  # one machine code for one thread and for several: the same bits
    builder = ir.IRBuilder(found.append_basic_block("entry"))
    task, place = found.args
    parts = (builder.load(cgutils.gep_inbounds(builder, place, 0, i)) for i in range(len(frame.pointee.elements)))
    with tracing(context, builder):
        function(Value(task), *_of_parts(given, parts))
    builder.ret_void()
    return found


def _parts(given):
    """LLVM's values of which a symbol, or a list of them, is made."""
    if given is None:
        return []
    if isinstance(given, Value):
        return [given.value]
    if isinstance(given, Memory):
        return [given.data, *_parts(given.shape), *(s for s in given.strides if s is not None)]
    return [part for one in given for part in _parts(one)]


def _of_parts(like, parts):
    """Symbols like these of other values, which an iterator gives in the same order."""
    if like is None:
        return None
    if isinstance(like, Value):
        return Value(next(parts))
    if isinstance(like, Memory):
        data, shape = next(parts), _of_parts(like.shape, parts)
        return Memory(like.dtype, data, shape, [None if s is None else next(parts) for s in like.strides])
    return [_of_parts(one, parts) for one in like]
