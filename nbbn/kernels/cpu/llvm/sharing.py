"""How the threads of Numba's pool share the tasks of a step, without a parallel loop for Numba to compile.

A kernel calls the function by which Numba runs such loops. It starts no thread: its pool has to run.
"""

from llvmlite import ir

from nbbn.kernels.cpu.llvm.control import counted
from nbbn.kernels.cpu.llvm.memory import reserve
from nbbn.kernels.cpu.llvm.values import I8, I32, I64, here, tracing
from nbbn.runtime.threadpool import GET, LIMIT, OPENMP, PARALLEL_FOR, SET

_VOID, _PLACE, _NUMBERS = ir.VoidType(), I8.as_pointer(), I64.as_pointer()
# What Numba calls for some shares that follow each other. It passes the address of their first element in each array,
# how many there are, how far elements are apart, and what it has been given. There is one array here, which begins at 0
# with elements 1 apart: so the address is the number of the share.
_SHARES = ir.FunctionType(_VOID, [_PLACE.as_pointer(), _NUMBERS, _NUMBERS, _PLACE])
_RUN = ir.FunctionType(_VOID, [_SHARES.as_pointer(), *_SHARES.args, I64, I64, I32]).as_pointer()
_COUNT, _SET = ir.FunctionType(I32, []).as_pointer(), ir.FunctionType(_VOID, [I32]).as_pointer()


def emit_sharing(context, builder, pool, task, frame, tasks):
    """Code that has threads call `task`, a function of LLVM's, with all numbers up to `tasks` and with `frame`.

    As many as numba.set_num_threads() and OpenMP leave the calling thread, and nbbn itself; each has one share, as
    workqueue would leave all that remains of a division to one. pool: the address of what
    runtime.threadpool.addresses() returns.
    """
    numbers = builder.inttoptr(pool, _NUMBERS)

    def entry(place):
        return builder.load(builder.gep(numbers, [I64(place)]))

    def threads_by(place):
        return builder.sext(builder.call(builder.inttoptr(entry(place), _COUNT), []), I64)

    before = threads_by(GET)
    threads = before
    for most in (threads_by(OPENMP), entry(LIMIT), tasks):
        threads = builder.select(builder.icmp_signed("<", most, threads), most, threads)
    threads = builder.select(builder.icmp_signed("<", threads, I64(1)), I64(1), threads)
    with tracing(context, builder):
        array, sizes, steps = (_stored(value) for value in (ir.Constant(_PLACE, None), threads, I64(1)))
        data = _stored(frame, tasks, threads)
    run, given = builder.inttoptr(entry(PARALLEL_FOR), _RUN), builder.bitcast(data, _PLACE)
    function = _run_shares(context, builder.module, task, data.type)
    builder.call(run, [function, array, sizes, steps, given, I64(0), I64(1), builder.trunc(threads, I32)])
    with builder.if_then(builder.icmp_signed("!=", threads, before)):  # Numba has told all of them, also this one
        builder.call(builder.inttoptr(entry(SET), _SET), [builder.trunc(before, I32)])


def _run_shares(context, module, task, data):
    """LLVM's function that runs the tasks of some shares."""
    found = ir.Function(module, _SHARES, module.get_unique_name(f"{task.name}_shares"))
    found.linkage = "internal"
    builder = ir.IRBuilder(found.append_basic_block("entry"))
    first, count, _, given = found.args
    given = builder.bitcast(given, data)
    frame, tasks, shares = (builder.load(builder.gep(given, [I32(0), I32(i)])) for i in range(3))
    first = builder.ptrtoint(builder.load(first), I64)
    begin, end = (
        builder.sdiv(builder.mul(share, tasks), shares) for share in (first, builder.add(first, builder.load(count)))
    )
    with tracing(context, builder), counted(begin, end, I64(1)) as i:
        builder.call(task, [i.value, frame])
    builder.ret_void()
    return found


def _stored(*values):
    """A place on the stack with a value, or several."""
    kinds = [v.type for v in values]
    place = reserve(ir.LiteralStructType(kinds) if len(kinds) > 1 else kinds[0])
    for i, value in enumerate(values):
        here().store(value, here().gep(place, [I32(0), I32(i)]) if len(kinds) > 1 else place)
    return place
