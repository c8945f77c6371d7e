"""How the threads of Numba's pool share the tasks of a step, without a parallel loop for Numba to compile.

A kernel calls the function by which Numba runs such loops. It starts no thread: its pool has to run.
"""

from llvmlite import ir

from nbbn.kernels.cpu.llvm.control import counted
from nbbn.kernels.cpu.llvm.memory import reserve
from nbbn.kernels.cpu.llvm.values import I8, I32, I64, here, tracing
from nbbn.runtime.threadpool import GET, LIMIT, OPENMP, PARALLEL_FOR, SET

_VOID, _PLACE, _NUMBERS = ir.VoidType(), I8.as_pointer(), I64.as_pointer()
_PLACES = _PLACE.as_pointer()
# Of some tasks that follow each other: the first one's number, which stands for an address; how many there are; how far
# numbers are apart; and what is handed on.
_SHARE = ir.FunctionType(_VOID, [_PLACES, _NUMBERS, _NUMBERS, _PLACE])
_RUN = ir.FunctionType(_VOID, [_SHARE.as_pointer(), *_SHARE.args, I64, I64, I32]).as_pointer()
_COUNT, _SET = ir.FunctionType(I32, []).as_pointer(), ir.FunctionType(_VOID, [I32]).as_pointer()


def emit_sharing(context, builder, pool, task, frame, tasks):
    """Code that has threads call `task`, a function of LLVM's, with all numbers up to `tasks` and with `frame`.

    As many as numba.set_num_threads() and OpenMP leave the calling thread, and nbbn itself. pool: the address of what
    runtime.threadpool.addresses() returns.
    """
    numbers = builder.inttoptr(pool, _NUMBERS)

    def entry(place):
        return builder.load(builder.gep(numbers, [I64(place)]))

    def threads_by(place):
        return builder.call(builder.inttoptr(entry(place), _COUNT), [])

    before = threads_by(GET)
    threads = _least(builder, _least(builder, before, threads_by(OPENMP)), builder.trunc(entry(LIMIT), I32))
    with tracing(context, builder):
        given = [_stored(value) for value in (ir.Constant(_PLACE, None), tasks, I64(1))]
    share, data = _share(context, builder.module, task), builder.bitcast(frame, _PLACE)
    builder.call(builder.inttoptr(entry(PARALLEL_FOR), _RUN), [share, *given, data, I64(0), I64(1), threads])
    with builder.if_then(builder.icmp_signed("!=", threads, before)):  # Numba has told all of them, also this one
        builder.call(builder.inttoptr(entry(SET), _SET), [before])


def _share(context, module, task):
    """LLVM's function that runs some tasks."""
    found = ir.Function(module, _SHARE, module.get_unique_name(f"{task.name}_share"))
    found.linkage = "internal"
    builder = ir.IRBuilder(found.append_basic_block("entry"))
    first, count, _, data = found.args
    first = builder.ptrtoint(builder.load(first), I64)
    frame = builder.bitcast(data, task.args[1].type)
    with tracing(context, builder), counted(first, builder.add(first, builder.load(count)), I64(1)) as i:
        builder.call(task, [i.value, frame])
    builder.ret_void()
    return found


def _least(builder, a, b):
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _stored(value):
    place = reserve(value.type)
    here().store(value, place)
    return place
