"""Compiled kernels for functions that are compiled by somebody else: called by address, found when they are needed.

A call site keeps the address of its kernel. At the first call it asks for it, by a text that says which kernel is
meant, so that a function which Numba has kept on disk finds it in another process, too. The kernels are the very ones
of the Dispatcher, compiled once for all functions and kept in nbbn's own cache.
"""

import ctypes
import threading
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from nbbn.core import dtypes
from nbbn.kernels.cpu.compiling import compiled, signature
from nbbn.numba.planning import PLANNERS
from nbbn.runtime import code_hash, compile_kernel

_BYTES = ir.IntType(8).as_pointer()
_SYMBOL = "nbbn_address_of_kernel"
_PLANS = f"{code_hash(('nbbn.engine.cpu.schedule', 'nbbn.numba.planning'))}"
_STAMP = f"{code_hash()} {_PLANS}"  # of the code that is called
_found: dict[str, Any] = {}  # what has an address must stay


def step_key(step: str, schedule: str, one_pass: bool, dtype: str, state: str, contiguous: bool, absent: Any) -> str:
    """The text for the kernel of a step."""
    return f"{step} {schedule} {one_pass:d} {dtype} {state} {contiguous:d} {','.join(sorted(absent))}"


def step_signature(key: str) -> Any:
    step, schedule, _, *kinds = _parsed(key)
    return signature(step, schedule, *kinds)


def _parsed(key: str) -> tuple[Any, ...]:
    step, schedule, one_pass, dtype, state, contiguous, absent = key.split(" ")
    own, names = np.dtype(dtype), frozenset(absent.split(",")) if absent else frozenset()
    return step, schedule, one_pass == "1", own, dtypes.statistic(own), np.dtype(state), contiguous == "1", names


def _kernel(key: str) -> Any:
    if key in PLANNERS:
        function, kind = PLANNERS[key]
        return compile_kernel(function, f"{key}_{_PLANS[:16]}", kind, caller="numba")
    step, schedule, one_pass, *kinds = _parsed(key)
    return compiled(step, schedule, one_pass, *kinds)


def _address(text: str) -> int:
    key, _, stamp = text.partition("\n")
    if stamp != _STAMP:  # a function that another version of nbbn was compiled into
        return 0
    if key not in _found:
        _found[key] = _kernel(key)
    (overload,) = _found[key].overloads.values()
    return int(overload.library.get_pointer_to_function(overload.fndesc.llvm_func_name))


@ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_char_p)
def _answer(text: bytes) -> int:
    """The address, or 0. It is called by compiled code, which has no place for an exception."""
    found = [0]

    def find() -> None:
        try:
            found[0] = _address(text.decode())
        except Exception:
            return

    try:
        # The caller may be a thread of a pool, whose stack is too small for a compiler.
        thread = threading.Thread(target=find)
        thread.start()
        thread.join()
    except RuntimeError:  # the interpreter is shutting down
        pass
    return found[0]


binding.add_symbol(_SYMBOL, ctypes.cast(_answer, ctypes.c_void_p).value)


def call(context: Any, builder: Any, key: str, kind: Any, arguments: Any) -> Any:
    """Emit a call of a kernel. kind: its signature. Returns: the result."""
    module = builder.module
    cell = cgutils.add_global_variable(module, _BYTES, module.get_unique_name("nbbn_kernel"))
    cell.initializer, cell.linkage = ir.Constant(_BYTES, None), "internal"

    def address() -> Any:
        return builder.load_atomic(cell, "monotonic", 8)

    def is_missing() -> Any:
        return cgutils.is_null(builder, address())

    with builder.if_then(is_missing(), likely=False):
        ask = cgutils.get_or_insert_function(module, ir.FunctionType(_BYTES, [_BYTES]), _SYMBOL)
        found = builder.call(ask, [context.insert_const_string(module, f"{key}\n{_STAMP}")])
        builder.store_atomic(found, cell, "monotonic", 8)
    with builder.if_then(is_missing(), likely=False):
        message = (
            "nbbn has no kernel for this call: either it cannot be compiled here, or the function that calls it is in "
            "Numba's cache since another version of nbbn, and its cache (__pycache__) must be deleted"
        )
        context.call_conv.return_user_exc(builder, RuntimeError, (message,))
    pointer = context.call_conv.get_function_type(kind.return_type, kind.args).as_pointer()
    status, result = context.call_conv.call_function(
        builder, builder.bitcast(address(), pointer), kind.return_type, kind.args, arguments
    )
    with cgutils.if_unlikely(builder, status.is_error):
        context.call_conv.return_status_propagate(builder, status)
    return context.get_dummy_value() if kind.return_type == types.void else result
