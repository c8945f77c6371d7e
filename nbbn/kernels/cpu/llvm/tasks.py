"""A step's tasks as a function of LLVM's own, and what stands in it for what Numba's function has."""

from llvmlite import ir
from numba import types
from numba.core import cgutils

from nbbn.kernels.cpu.llvm.control import counted
from nbbn.kernels.cpu.llvm.memory import Memory, reserve
from nbbn.kernels.cpu.llvm.sharing import emit_sharing
from nbbn.kernels.cpu.llvm.values import I64, Value, here, tracing


def symbol(kind, value):
    """What stands for an argument of Numba's in a traced function."""
    if isinstance(kind, types.NoneType):
        return None
    if isinstance(kind, types.BaseTuple):
        return tuple(symbol(k, v) for k, v in zip(kind, cgutils.unpack_tuple(here(), value), strict=True))
    return Memory.of(kind, value) if isinstance(kind, types.Array) else Value(value)


def emit_tasks(context, builder, function, kinds, values):
    """Code that runs function(task, *given) for all tasks. values: pool, how many tasks there are, and what is given,
    of these kinds; see lanes.per_task().

    The function becomes one of LLVM's, of a task's number and of the place where the rest lies.
    """
    pool, tasks, *values = values
    with tracing(context, builder):
        given = [symbol(k, v) for k, v in zip(kinds, values, strict=True)]
        parts = _parts(given)
        frame = reserve(ir.LiteralStructType([v.type for v in parts]))
    for i, value in enumerate(parts):
        builder.store(value, cgutils.gep_inbounds(builder, frame, 0, i))
    run = _task(context, builder.module, function, given, frame.type)
    with builder.if_else(builder.icmp_signed("==", pool, I64(0))) as (alone, together):
        with alone, tracing(context, builder), counted(I64(0), tasks, I64(1)) as task:
            builder.call(run, [task.value, frame])
        with together:
            emit_sharing(context, builder, pool, run, frame, tasks)


def _task(context, module, function, given, frame):
    """LLVM's function of a task's number and the place of a frame, which has the parts of what is given."""
    kind = ir.FunctionType(ir.VoidType(), [I64, frame])
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
