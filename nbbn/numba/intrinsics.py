"""What functions in Python cannot say: kernels called by address, and arrays made of addresses and strides."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import numpy_support
from numba.np.arrayobj import populate_array

from nbbn.kernels.cpu.compiling import ARGUMENTS, names_of
from nbbn.kernels.cpu.tasks import SIZES
from nbbn.kernels.cpu.views import Data
from nbbn.numba.kernels import call, step_key, step_signature
from nbbn.numba.planning import PLAN, PLANNERS, ROW_OF

_INT = ir.IntType(64)
_ALONE = _INT(0)  # the pool of a caller's own thread


def planner(name: str) -> Any:
    """The function for compiled functions that calls one of PLANNERS."""
    kind = PLANNERS[name][1]

    @intrinsic
    def plan(typingctx, given):
        def emit(context, builder, signature, args):
            values = cgutils.unpack_tuple(builder, args[0])
            arguments = [context.cast(builder, v, k, to) for v, k, to in zip(values, given, kind.args, strict=True)]
            return call(context, builder, name, kind, arguments)

        return kind.return_type(given), emit

    return plan


def step(name: str, one_pass: bool) -> Any:
    """The function for compiled functions that runs a step: of a plan, the strides of the arrays, or None where all
    are dense, and the step's arguments behind the grid."""
    names = names_of(name)[2:]

    @intrinsic
    def run(typingctx, plan, placed, given):
        kinds = dict(zip(names, given, strict=True))
        data = [k for n, k in kinds.items() if ARGUMENTS[n] == "X" and isinstance(k, types.Array)]
        # Kernels for dense arrays and for others need not have the same bits: LLVM may contract in other places.
        choices = (True,) if all(k.layout == "C" for k in data) else (True, False)
        dtype, state = (str(numpy_support.as_dtype(k.dtype)) for k in (kinds["x"], kinds.get("state", kinds["x"])))
        absent = [n for n, k in kinds.items() if isinstance(k, types.NoneType)]

        def emit(context, builder, signature, args):
            _, is_dense, in_rows, grid = cgutils.unpack_tuple(builder, args[0])
            facts = cgutils.unpack_tuple(builder, grid)
            values = dict(zip(names, cgutils.unpack_tuple(builder, args[2]), strict=True))
            strides = (
                None if isinstance(placed, types.NoneType) else context.make_array(placed)(context, builder, args[1])
            )

            def argument(n, target):
                kind, value = kinds[n], values[n]
                if isinstance(target, Data):
                    data = context.make_array(kind)(context, builder, value).data
                    return builder.bitcast(data, context.get_value_type(target))
                if isinstance(kind, types.Array) and ARGUMENTS[n] in ("X", "S"):
                    return view(n, target)
                return cgutils.true_bit if target == types.boolean else value

            def view(n, target):
                given = context.make_array(kinds[n])(context, builder, values[n])
                found, size = (
                    context.make_array(target)(context, builder),
                    context.get_abi_sizeof(given.data.type.pointee),
                )
                row = [ir.Constant(_INT, ROW_OF[n] * len(SIZES) + i) for i in range(target.ndim)]
                populate_array(
                    found,
                    data=given.data,
                    shape=[facts[i] for i in SIZES[: target.ndim]],
                    strides=[builder.load(builder.gep(strides.data, [i])) for i in row],
                    itemsize=ir.Constant(_INT, size),
                    meminfo=None,
                )
                return found._getvalue()

            def run(schedule, contiguous):
                key = step_key(name, schedule, one_pass, dtype, state, contiguous, absent)
                kind = step_signature(key)
                arguments = [argument(n, target) for n, target in zip(names, kind.args[2:], strict=True)]
                call(context, builder, key, kind, [_ALONE, grid, *arguments])

            for contiguous in choices:
                fits = is_dense if contiguous else builder.not_(is_dense)
                with builder.if_then(fits), builder.if_else(in_rows) as (rows, planes):
                    with rows:
                        run("rows", contiguous)
                    with planes:
                        run("planes", contiguous)
            return context.get_dummy_value()

        return types.void(PLAN, placed, given), emit

    return run


@intrinsic
def beside(typingctx, first, second):
    """Two contiguous rows as one (2, C) array, with no copy: arrays.host.beside(). They must be kept alive."""
    result = types.Array(first.dtype, 2, "C")

    def emit(context, builder, signature, args):
        a, b = (context.make_array(k)(context, builder, v) for k, v in zip(signature.args, args, strict=True))
        found = context.make_array(result)(context, builder)
        apart = builder.sub(builder.ptrtoint(b.data, _INT), builder.ptrtoint(a.data, _INT))
        (size,) = cgutils.unpack_tuple(builder, a.shape, 1)
        shape, strides = [ir.Constant(_INT, 2), size], [apart, a.itemsize]
        populate_array(found, data=a.data, shape=shape, strides=strides, itemsize=a.itemsize, meminfo=None)
        return found._getvalue()

    return result(first, second), emit


@intrinsic
def with_strides(typingctx, memory, like, strides):
    """The elements of a new contiguous array in the shape of another one, and with these strides (its rank,)."""
    result = types.Array(like.dtype, like.ndim, "A")

    def emit(context, builder, signature, args):
        a, shaped, steps = (
            context.make_array(k)(context, builder, v) for k, v in zip(signature.args, args, strict=True)
        )
        found = context.make_array(result)(context, builder)
        places = [builder.gep(steps.data, [ir.Constant(_INT, i)]) for i in range(like.ndim)]
        populate_array(
            found,
            data=a.data,
            shape=cgutils.unpack_tuple(builder, shaped.shape, like.ndim),
            strides=[builder.load(p) for p in places],
            itemsize=a.itemsize,
            meminfo=a.meminfo,
        )
        context.nrt.incref(builder, signature.args[0], args[0])
        return found._getvalue()

    return result(memory, like, strides), emit


@intrinsic
def write_geometry(typingctx, arrays, sizes, strides):
    """Write the shape of the first of some arrays, or None, to sizes[1:], and their strides to strides[:, 1:]."""

    def emit(context, builder, signature, args):
        def store(array, index, value):
            builder.store(value, builder.gep(array.data, [index]))

        kinds = list(signature.args[1:])
        own_sizes, own_strides = (
            context.make_array(k)(context, builder, v) for k, v in zip(kinds, args[1:], strict=True)
        )
        for row, (kind, value) in enumerate(zip(arrays, cgutils.unpack_tuple(builder, args[0]), strict=True)):
            if not isinstance(kind, types.Array):
                continue
            found = context.make_array(kind)(context, builder, value)
            for i in range(kind.ndim):
                if row == 0:
                    store(own_sizes, ir.Constant(_INT, 1 + i), cgutils.unpack_tuple(builder, found.shape)[i])
                place = ir.Constant(_INT, row * (1 + kind.ndim) + 1 + i)
                store(own_strides, place, cgutils.unpack_tuple(builder, found.strides)[i])
        return context.get_dummy_value()

    return types.void(arrays, sizes, strides), emit


@intrinsic
def any_order(typingctx, array):
    """The same array as one whose order in memory only its strides tell."""
    result = array.copy(layout="A")

    def emit(context, builder, signature, args):
        context.nrt.incref(builder, array, args[0])
        return args[0]

    return result(array), emit


@intrinsic
def copy(typingctx, target, source):
    """Write the elements of one array to another one of its shape; an assignment would have broadcasting compiled."""

    def emit(context, builder, signature, args):
        to, of = (context.make_array(k)(context, builder, v) for k, v in zip(signature.args, args, strict=True))
        with cgutils.loop_nest(builder, cgutils.unpack_tuple(builder, to.shape), _INT) as index:
            places = [
                cgutils.get_item_pointer(context, builder, kind, array, index, wraparound=False, boundscheck=False)
                for kind, array in zip(signature.args, (to, of), strict=True)
            ]
            builder.store(builder.load(places[1]), places[0])
        return context.get_dummy_value()

    return types.void(target, source), emit


@intrinsic
def address(typingctx, array):
    """Of the first element."""

    def emit(context, builder, signature, args):
        return builder.ptrtoint(context.make_array(array)(context, builder, args[0]).data, _INT)

    return types.int64(array), emit
