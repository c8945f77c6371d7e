"""Compiled kernels as functions that a program of XLA calls: targets of its foreign function interface.

A handler is compiled, too: it reads the call frame, makes of its buffers what the kernel takes, and calls it, without
Python and its lock. It knows the kernel by a symbol, and XLA knows the handler by a name, both made of what they do, so
no address is in a program, nor in the cache of kernels.
"""

import ctypes
import hashlib
from functools import cache
from typing import Any, NamedTuple

import jax
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from nbbn.jax.frame import INT64, Buffer, Frame
from nbbn.jax.policy import FAILED, emit_choice, prepare
from nbbn.kernels.cpu.compiling import ARGUMENTS, WRITES, compiled, names_of
from nbbn.kernels.cpu.tasks import SIZES, Grid
from nbbn.kernels.cpu.views import Data
from nbbn.runtime import StateLock, code_hash, compile_kernel

NO_MEMORY = FAILED + "there is no memory for its sums"
STRIDED = ("weights", "a", "b")  # views that may repeat their values; the attribute "strides" says how
_GRID, _STRIDES = range(2)  # the attributes in the order of their names
_registering = StateLock()
_kept: list[Any] = []  # what compiled code refers to: as long as the process lives, a program may be run


class Target(NamedTuple):
    """What a program is told. inputs, outputs: the arrays, by the names of the kernel's arguments, in their order."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def target(variant: tuple[Any, ...], parallel: bool, apart: frozenset[str]) -> Target:
    """The target for a kernel, compiled and registered.

    Args:
        variant: what compiled() is asked for. parallel: whether threads are to share its tasks.
        apart: the arrays of two rows of which each is a buffer of its own.
    """
    with _registering:
        return _registered(variant, parallel, apart)


@cache  # a name can be registered once
def _registered(variant: tuple[Any, ...], parallel: bool, apart: frozenset[str]) -> Target:
    step = variant[0]
    kernel: Any = compiled(*variant)
    (overload,) = kernel.overloads.values()
    arguments = dict(zip(names_of(step), overload.signature.args, strict=True))
    arrays = (name for name in arguments if ARGUMENTS[name] not in ("flag", "grid", "int"))
    there = [name for name in arrays if arguments[name] != types.none]
    inputs = tuple(name for name in there if name not in WRITES[step])
    outputs = tuple(name for name in there if name in WRITES[step])
    code = code_hash(), code_hash(("nbbn.jax.frame", "nbbn.jax.handlers", "nbbn.jax.policy"))
    facts = variant[:-1], sorted(variant[-1]), parallel, sorted(apart), str(overload.signature), code
    name = f"nbbn_{step}_{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}"
    if parallel:
        prepare()
    # Where the native function begins, without the part that talks to Python.
    start = overload.library.get_pointer_to_function(overload.fndesc.llvm_func_name)
    binding.add_symbol(f"{name}_kernel", start)
    handler = _compile(name, arguments, inputs, outputs, apart, parallel)
    _kept.append((kernel, handler))
    entry = handler.overloads[types.intp,]
    address = entry.library.get_pointer_to_function(entry.fndesc.llvm_cfunc_wrapper_name)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(ctypes.c_void_p(address)), platform="cpu")
    return Target(name, inputs, outputs)


# -- the compiled handler ----------------------------------------------------------------------------------------------


def _compile(
    name: str,
    arguments: dict[str, types.Type],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    apart: frozenset[str],
    parallel: bool,
) -> Any:
    """The handler, a kernel that takes the address of a call frame, and returns that of an error, or 0."""
    kinds = tuple(arguments.values())

    @intrinsic
    def run(typingctx, frame):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return _emit(context, builder, Frame(builder, args[0]))

        return types.intp(types.intp), emit

    def _emit(context: Any, builder: Any, frame: Frame) -> Any:
        error = cgutils.alloca_once_value(builder, INT64(0))
        with builder.if_then(builder.not_(frame.answer_query())):
            values = _values(context, builder, frame, arguments, inputs, outputs, apart)
            kernel = cgutils.get_or_insert_function(
                builder.module, context.call_conv.get_function_type(types.none, kinds), f"{name}_kernel"
            )

            def call(pool: Any) -> None:
                given = [pool if name == "pool" else value for name, value in values.items()]
                status, _ = context.call_conv.call_function(builder, kernel, types.none, kinds, given)
                with builder.if_then(status.is_error):
                    builder.store(frame.error(NO_MEMORY), error)

            if parallel:
                emit_choice(
                    builder, _elements(builder, frame), call, lambda why: builder.store(frame.error(why), error)
                )
            else:
                call(INT64(0))
        return builder.load(error)

    def handler(frame):  # type: ignore[no-untyped-def]
        return run(frame)

    return compile_kernel(handler, f"{name}_handler", types.intp(types.intp), caller="c")


def _elements(builder: Any, frame: Frame) -> Any:
    """How many elements the grid counts."""
    grid, elements = frame.attribute(_GRID, len(Grid._fields)), INT64(1)
    for i in SIZES:
        elements = builder.mul(elements, grid[i])
    return elements


def _values(
    context: Any,
    builder: Any,
    frame: Frame,
    arguments: dict[str, types.Type],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    apart: frozenset[str],
) -> dict[str, Any]:
    """The arguments of the kernel, but for the pool, which is None."""
    buffers: dict[str, list[Buffer]] = {}
    for names, entry in ((inputs, frame.argument), (outputs, frame.result)):
        i = 0
        for name in names:
            count = 2 if name in apart else 1
            buffers[name] = [entry(i + k) for k in range(count)]
            i += count
    grid = frame.attribute(_GRID, len(Grid._fields)) if "grid" in arguments else []
    strides = frame.attribute(_STRIDES, 4 * len(STRIDED)) if any(n in buffers for n in STRIDED) else []

    def value(name: str, kind: types.Type) -> Any:
        if name == "pool":
            return None
        if kind == types.none:
            return context.get_dummy_value()
        if kind == types.boolean:
            return ir.Constant(ir.IntType(1), 1)
        if name == "grid":
            return context.make_tuple(builder, kind, grid)
        if isinstance(kind, Data):
            return buffers[name][0].data
        if name in STRIDED:
            first, sizes = 4 * STRIDED.index(name), [grid[i] for i in SIZES][: kind.ndim]
            return _array(context, builder, kind, buffers[name][0], sizes, strides[first : first + kind.ndim])
        return _small_array(context, builder, kind, buffers[name])

    return {name: value(name, kind) for name, kind in arguments.items()}


def _small_array(context: Any, builder: Any, kind: types.Array, buffers: list[Buffer]) -> Any:
    """An array that a buffer holds, or two of them a row each; the kernel finds its rows by their stride."""
    first, item = buffers[0], INT64(kind.dtype.bitwidth // 8)
    if len(buffers) == 2:
        start, other = (builder.ptrtoint(b.data, INT64) for b in buffers)
        return _array(context, builder, kind, first, [INT64(2), first.size(0)], [builder.sub(other, start), item])
    sizes, strides = [first.size(i) for i in range(kind.ndim)], [item]
    for size in sizes[:0:-1]:
        strides.insert(0, builder.mul(strides[0], size))
    return _array(context, builder, kind, first, sizes, strides)


def _array(context: Any, builder: Any, kind: types.Array, buffer: Buffer, sizes: list[Any], strides: list[Any]) -> Any:
    array = context.make_array(kind)(context, builder)
    data, item = builder.bitcast(buffer.data, array.data.type), INT64(kind.dtype.bitwidth // 8)
    populate_array(array, data=data, shape=sizes, strides=strides, itemsize=item, meminfo=None)
    return array._getvalue()
