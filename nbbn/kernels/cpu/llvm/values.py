"""Numbers and conditions, one or sixteen of them, and the function that their code goes to."""

from llvmlite import ir
from numba.core import cgutils

LANES = 16
HALF = LANES // 2
LINE = 64  # bytes of a line of the cache
BLOCK = 1024  # elements of a local array: a few of them fit into a core's L1

I1, I8, I32, I64, DOUBLE = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.DoubleType()
SUM = ("nsz",)  # what may be done to the arithmetic of sums, whose products are not rounded; nothing to that of results
PLACES = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
POSITIONS = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
building: list = []  # the contexts and builders of the functions that are traced now


class tracing:
    """While this is entered, code goes to a builder."""

    def __init__(self, context, builder):
        self.now = context, builder

    def __enter__(self):
        building.append(self.now)

    def __exit__(self, *error):
        building.pop()


def here():
    """The builder that code goes to."""
    return building[-1][1]


def _is_vector(value):
    return isinstance(value.type, ir.VectorType)


def _scalar(kind):
    return kind.element if isinstance(kind, ir.VectorType) else kind


def in_all_places(value):
    vector = ir.VectorType(value.type, LANES)
    nothing, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    return here().shuffle_vector(here().insert_element(nothing, value, I32(0)), nothing, zeros)


def call(name, result, *arguments):
    signature = ir.FunctionType(result, [a.type for a in arguments])
    return here().call(cgutils.get_or_insert_function(here().module, signature, f"llvm.{name}"), arguments)


def _of_floats(name, *vectors):
    """What LLVM's function makes of vectors of floats."""
    kind = vectors[0].type
    return call(f"{name}.v{kind.count}f{32 if kind.element == ir.FloatType() else 64}", kind, *vectors)


def _operation(of_floats, of_integers=None, swapped=False):
    def method(self, other):
        pair = self, self.like(other)
        a, b = pair[::-1] if swapped else pair
        if isinstance(_scalar(a.value.type), ir.IntType):
            return Value(getattr(here(), of_integers)(a.value, b.value))
        flags = a.flags or b.flags
        if flags and of_floats in ("fadd", "fsub") and (a.factors or b.factors):
            return Value(_fused(a, b, of_floats == "fsub"), flags)
        found = Value(getattr(here(), of_floats)(a.value, b.value, flags=flags), flags)
        if flags and of_floats == "fmul":
            found.factors = a.value, b.value
        return found

    return method


def _fused(a, b, is_difference):
    """The sum of a product and a number, rounded once where there is an instruction for it. LLVM may not choose: of two
    products it would round one in a whole vector and the other one in a part, and bits would depend on where tasks
    end."""
    x, y = a.factors or b.factors
    z = b.value if a.factors else a.value
    if is_difference and a.factors:
        z = here().fneg(z)
    elif is_difference:
        x = here().fneg(x)
    return _of_floats("fmuladd", x, y, z)


def _comparison(sign):
    def method(self, other):
        builder, a, b = here(), self.value, self.like(other).value
        if isinstance(_scalar(a.type), ir.IntType):
            return Value(builder.icmp_signed(sign, a, b))
        return Value((builder.fcmp_unordered if sign == "!=" else builder.fcmp_ordered)(sign, a, b))

    return method


class Value:
    """A number or a condition, or sixteen of them. Whole numbers are not negative where they are divided.

    flags: what LLVM may do to its arithmetic. factors: whose product it is, if a sum of it is to be rounded once.
    """

    def __init__(self, value, flags=()):
        self.value, self.flags, self.factors = value, flags, None

    def like(self, other):
        """A constant as a value of this one's type."""
        if isinstance(other, Value):
            return other
        number = float(other) if _scalar(self.value.type) in (ir.FloatType(), DOUBLE) else int(other)
        return Value(
            ir.Constant(self.value.type, [number] * self.value.type.count if _is_vector(self.value) else number)
        )

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
        return Value(here().fneg(self.value), self.flags)

    def __abs__(self):
        return Value(_of_floats("fabs", self.value), self.flags)

    def sqrt(self):
        return Value(_of_floats("sqrt", self.value), self.flags)


def integer(i):
    return I64(i) if isinstance(i, int) else i.value


def minimum(a, b):
    """Of two whole numbers."""
    a, b = integer(a), integer(b)
    return Value(here().select(here().icmp_signed("<", a, b), a, b))


def choose(condition, x, other):
    """x where the condition holds, else the other."""
    x = x if isinstance(x, Value) else other.like(x)
    return Value(here().select(condition.value, x.value, x.like(other).value), x.flags)


def drop(condition, x):
    """0 where the condition holds, else x."""
    return choose(condition, x.like(0), x)


def is_any(condition):
    """Whether it holds anywhere."""
    bits = here().bitcast(condition.value, ir.IntType(LANES))
    return Value(here().icmp_unsigned("!=", bits, bits.type(0)))


def splat(number):
    """A number in all places."""
    if number is None or (isinstance(number, Value) and _is_vector(number.value)):
        return number
    return Value(in_all_places(number.value if isinstance(number, Value) else ir.Constant(DOUBLE, float(number))))


def wide(vector):
    """The same numbers as float64, for sums."""
    if vector is None:
        return None
    value, double = vector.value, ir.VectorType(DOUBLE, LANES)
    return Value(value if value.type == double else here().fpext(value, double), SUM)


def first(vector, n):
    """The first n numbers, and 0 in the other places."""
    return vector if n is None else choose(mask_of(n), vector, 0)


class First(Value):
    """A number of elements, and which ones they are of sixteen."""

    def __init__(self, value):
        super().__init__(value)
        self.mask = Value(PLACES) < Value(in_all_places(here().trunc(value, I32)))


def mask_of(n):
    """Of the first n."""
    if n is None:
        return Value(ir.Constant(ir.VectorType(I1, LANES), [1] * LANES))
    return (n if isinstance(n, First) else First(integer(n))).mask


def halves(value):
    """The first and the second half of LLVM's vector."""
    n, nothing = value.type.count // 2, ir.Constant(value.type, ir.Undefined)
    parts = [ir.Constant(ir.VectorType(I32, n), list(range(k, k + n))) for k in (0, n)]
    return [here().shuffle_vector(value, nothing, part) for part in parts]


def joined(first, second):
    """LLVM's vector of two, one after the other."""
    n = 2 * first.type.count
    return here().shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, n), list(range(n))))
