"""Whether threads share the tasks of a program's step: who may use the thread pool is decided in Python.

Two things can come between. A signal's exception ends the function that is asked wherever it stands; so a
KeyboardInterrupt is put off until the step is done. And Python answers no more once the process ends, while JAX waits
for its programs then, with Python's lock in its hands; so from then on nobody is asked, and steps that would ask fail.
"""

import atexit
import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from time import sleep
from typing import Any

import jax
from llvmlite import binding, ir
from numba.core import cgutils

from nbbn.jax.frame import INT32, INT64
from nbbn.runtime import parallel_region, start_pool

FAILED = "nbbn: a step of batch normalization could not be run: "
NO_POOL, ENDS = FAILED + "its threads could not be started", FAILED + "the process ends"
_regions: dict[int, AbstractContextManager[int]] = {}  # of the parallel steps that run now, by thread
_has_steps = False  # that ask
_ASKING, _CLOSED = range(2)
_gate = (ctypes.c_int64 * 2)()  # how many steps may be asking Python now, or about to; whether none may begin to
NOTHING, _FAILED, _ALONE = 0, -1, 1  # answers in the place of the pool
_GATE = "nbbn_jax_gate"
_PYTHON = ("PyGILState_Ensure", "PyGILState_Release", "PyOS_InterruptOccurred", "PyErr_SetInterrupt")
_LOCKED, _UNLOCK, _TAKE_INTERRUPT, _GIVE_INTERRUPT = (f"nbbn_{name}" for name in _PYTHON)


def add_function(name: str, function: Any) -> None:
    """Let compiled code call a function of C's by a name."""
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    binding.add_symbol(name, address)


binding.add_symbol(_GATE, ctypes.addressof(_gate))
for _name in _PYTHON:
    add_function(f"nbbn_{_name}", getattr(ctypes.pythonapi, _name))


# -- what Python answers -----------------------------------------------------------------------------------------------


def prepare() -> None:
    """To be called before there is a step that asks."""
    global _has_steps
    _has_steps = True


@ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)  # type: ignore[untyped-decorator]
def _enter(elements: int, answer: int) -> None:
    """Write the pool that a step is given, or one of the answers. An exception cannot go on from here."""
    thread, place = threading.get_ident(), ctypes.c_int64.from_address(answer)
    try:
        region = parallel_region(elements) if _pool_serves_this_thread() else nullcontext(0)
        found = region.__enter__() or _ALONE
        # Nothing can come between these two. A region that never gets here is left when it is forgotten.
        _regions[thread] = region
        place.value = found
    except KeyboardInterrupt:
        return  # to be asked again
    except Exception:
        place.value = _FAILED


@ctypes.CFUNCTYPE(None, ctypes.c_int64)  # type: ignore[untyped-decorator]
def _leave(answer: int) -> None:
    """Write NOTHING once all is done; asked again until then."""
    with contextlib.suppress(KeyboardInterrupt):
        _leave_region()
        ctypes.c_int64.from_address(answer).value = NOTHING


_ENTER, _LEAVE = "nbbn_jax_enter", "nbbn_jax_leave"
add_function(_ENTER, _enter)
add_function(_LEAVE, _leave)


def _leave_region() -> None:
    region = _regions.get(threading.get_ident())
    if region is not None:
        region.__exit__(None, None, None)
        del _regions[threading.get_ident()]


def _pool_serves_this_thread() -> bool:
    """Whether a program may use the pool from here. workqueue aborts the process where two threads enter it, and one of
    XLA's runs beside Python's, which may be in a kernel of somebody else's."""
    return start_pool() != "workqueue" or threading.get_ident() == threading.main_thread().ident


# -- when it is asked --------------------------------------------------------------------------------------------------


def _close() -> None:
    """Wait for what somebody may still want, let no step ask any more, and wait for those that have."""
    if not _has_steps:  # maybe JAX has not even been started
        return
    for array in jax.live_arrays():
        with contextlib.suppress(Exception):  # of a program that failed
            array.block_until_ready()
    _gate[_CLOSED] = 1
    while _gate[_ASKING]:
        sleep(0.001)


def _forget_others() -> None:
    """In a forked child, which has no other threads: what they were about to do never ends there."""
    _gate[_ASKING] = 0
    if _has_steps:
        atexit.unregister(_close)


atexit.register(_close)  # before JAX's own, which has been registered earlier
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_others)


class Asking:
    """Code that asks Python, which writes its answer to a place; NOTHING is there until then."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        self._answer, self._late = (cgutils.alloca_once_value(builder, kind(0)) for kind in (INT64, INT32))

    def ask(self, what: str, *arguments: Any, until: Callable[[], Any]) -> None:
        """Call a function with these arguments and the place.

        until: whether it has been done. A signal that comes just then may end it early, but hardly three times.
        """
        builder, given = self._builder, (*arguments, self._builder.ptrtoint(self._answer, INT64))
        with builder.if_then(builder.not_(until())):
            _emit_uninterrupted(builder, what, given, self._late)
            for _ in range(2):
                with builder.if_then(builder.not_(until())):
                    builder.store(INT32(1), self._late)
                    _call(builder, what, ir.VoidType(), *given)

    def answer(self) -> Any:
        return self._builder.load(self._answer)

    def is_answer(self, *codes: int) -> Any:
        """Whether it is one of them."""
        same = [self._builder.icmp_signed("==", self.answer(), INT64(code)) for code in codes]
        return reduce(self._builder.or_, same)

    def give_interrupt(self) -> None:
        """Have Python raise the interrupt that has been put off."""
        with self._builder.if_then(self._builder.icmp_signed("!=", self._builder.load(self._late), INT32(0))):
            _call(self._builder, _GIVE_INTERRUPT, ir.VoidType())


def emit_asking(builder: Any, body: Callable[[Asking], None], fail: Callable[[str], None]) -> None:
    """Code that asks Python, but when the process ends.

    body: emits it. fail: emits that the step fails, and why.
    """
    asking = Asking(builder)
    gate = cgutils.add_global_variable(builder.module, ir.ArrayType(INT64, 2), _GATE)
    count, closed = (builder.gep(gate, [INT64(0), INT64(i)]) for i in (_ASKING, _CLOSED))
    builder.atomic_rmw("add", count, INT64(1), "seq_cst")
    is_closed = builder.icmp_signed("!=", builder.load_atomic(closed, "seq_cst", 8), INT64(0))
    with builder.if_else(is_closed) as (then, otherwise):
        with then:
            fail(ENDS)
        with otherwise:
            body(asking)
    builder.atomic_rmw("sub", count, INT64(1), "seq_cst")
    asking.give_interrupt()


def emit_choice(builder: Any, elements: Any, call: Callable[[Any], None], fail: Callable[[str], None]) -> None:
    """Code that calls a kernel with the pool that Python chooses.

    Args:
        elements: how many the step goes over.
        call: emits the call, given the pool. fail: emits that the step fails, and why.
    """

    def body(python: Asking) -> None:
        python.ask(_ENTER, elements, until=lambda: builder.not_(python.is_answer(NOTHING)))
        with builder.if_else(python.is_answer(_FAILED, NOTHING)) as (none, some):
            with none:
                fail(NO_POOL)
            with some:
                call(builder.select(python.is_answer(_ALONE), INT64(0), python.answer()))
                python.ask(_LEAVE, until=lambda: python.is_answer(NOTHING))

    emit_asking(builder, body, fail)


def _emit_uninterrupted(builder: Any, symbol: str, arguments: tuple[Any, ...], late: Any) -> None:
    """A call of a Python function, before which an interrupt that has come is taken away. late: where this is noted."""
    lock = _call(builder, _LOCKED, INT32)
    builder.store(builder.or_(builder.load(late), _call(builder, _TAKE_INTERRUPT, INT32)), late)
    _call(builder, symbol, ir.VoidType(), *arguments)
    _call(builder, _UNLOCK, ir.VoidType(), lock)


def _call(builder: Any, symbol: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, symbol), arguments)
