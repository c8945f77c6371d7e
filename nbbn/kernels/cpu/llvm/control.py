"""Loops and branches, and the loop that writes a run of results."""

from contextlib import contextmanager

from llvmlite import ir

from nbbn.kernels.cpu.llvm.memory import Columns, Memory, border, reserve, store, stream
from nbbn.kernels.cpu.llvm.values import I32, I64, LANES, First, Value, call, drop, here, integer, minimum


class _Kept:
    """Vectors that a loop hands on: in memory, which LLVM makes registers of."""

    def __init__(self, sums):
        self.places = [None if s is None else reserve(s.value.type) for s in sums]
        self.flags = [None if s is None else s.flags for s in sums]
        self.put(sums)

    def get(self):
        return [p and Value(here().load(p), f) for p, f in zip(self.places, self.flags, strict=True)]

    def put(self, sums):
        for place, found in zip(self.places, sums or (), strict=True):
            if place is not None:
                here().store(found.value, place)


@contextmanager
def counted(begin, end, step):
    """What is entered is run for whole numbers from one to another."""
    builder = here()
    before, (head, body, after) = builder.block, (builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(I64)
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
    builder, kept, begin, end = here(), _Kept(sums), integer(begin), integer(end)
    left = builder.and_(builder.sub(end, begin), I64(LANES - 1))
    whole = builder.sub(end, left)
    with counted(begin, whole, I64(LANES)) as i:
        kept.put(body(i, None, kept.get()))
    with builder.if_then(builder.icmp_signed(">", left, I64(0))):
        kept.put(body(Value(whole), First(left), kept.get()))
    return kept.get()


def over_columns(begin, end, body, sums=()):
    """The same as body(columns, sums), where columns(offset) are the columns so far to the right of these."""
    return over(begin, end, lambda i, n, found: body(lambda offset=0: Columns(i + offset, n), found), sums)


def each(begin, end, step, body, sums=()):
    """Run body(i, sums) for whole numbers; sums: see over()."""
    kept = _Kept(sums)
    with counted(integer(begin), integer(end), integer(step)) as i:
        kept.put(body(i, kept.get()))
    return kept.get()


def when(condition, body, otherwise=None):
    """Run one of the two."""
    with here().if_else(condition.value) as (then, other):
        with then:
            body()
        with other:
            if otherwise is not None:
                otherwise()


def again(body):
    """Run body() as long as it returns a condition that holds; once if it returns None."""
    builder = here()
    loop = builder.append_basic_block("again")
    builder.branch(loop)
    builder.position_at_end(loop)
    condition = body()
    if condition is not None:
        after = builder.append_basic_block("after")
        builder.cbranch(condition.value, loop, after)
        builder.position_at_end(after)


def write_run(targets, results, streamed, coefficients):
    """Write results(i, n), a vector for each of the targets, for all their elements. streamed: past the caches, where
    the coefficients that are arrays have borders where the targets have them.

    A target may be an input, too: all that a vector is made of is read before it is written.
    """

    def write(i, n, _):
        for target, vector in zip(targets, results(i, n), strict=True):
            store(target, i, vector, n)

    there = [t for t in targets if t is not None]
    if not all(t.is_contiguous for t in there):
        over(0, there[0].size, write)
        return
    heads = [to_border(t) for t in there]
    past = streamed != 0
    for head in (*heads[1:], *(to_border(c) for c in coefficients if isinstance(c, Memory))):
        past = past & (head == heads[0])
    when(past, lambda: _write_past(targets, results, write, heads[0]), lambda: over(0, there[0].size, write))


def _write_past(targets, results, write, head):
    """The lines at both ends of a run are written in part, and so through the caches; they are fetched ahead, as
    waiting for them then would halve the speed."""
    there = [t for t in targets if t is not None]
    size = there[0].size
    head = minimum(head, size)

    def fetch(i):
        for target in there:
            call("prefetch.p0", ir.VoidType(), target.place(i), I32(1), I32(3), I32(1))

    when(head > 0, lambda: fetch(0))
    when((size - head) % LANES > 0, lambda: fetch(size - 1))

    def write_past(i, n, _):
        if n is not None:
            return write(i, n, ())
        for target, vector in zip(targets, results(i, n), strict=True):
            stream(target, i, vector)

    when(head > 0, lambda: write(Value(I64(0)), First(head.value), ()))
    over(head, size, write_past)


def to_border(array, asked=None):
    """How many elements there are before the first border: fewer than sixteen. 0 where `asked`, a number, is 0."""
    past = here().and_(here().neg(here().ptrtoint(array.data, I64)), I64(border(array) - 1))
    found = Value(past) // array.itemsize
    return found if asked is None else drop(asked == 0, found)
