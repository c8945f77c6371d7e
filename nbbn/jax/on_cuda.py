"""A step on a GPU of NVIDIA: the CUDA engine's, called by the program through XLA's foreign function interface.

Python puts the kernels into the stream of the call, which takes as long as it does for other libraries' arrays, and
returns before they run. A program knows a step by a number made of all that it depends on, so no address is in a
program.
"""

import contextlib
import ctypes
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nbbn.arrays.device import DeviceArray
from nbbn.core import rules
from nbbn.core.layout import Sizes, contiguous_strides
from nbbn.jax.crossing import FLOAT64, as_float64, as_pairs, crosses_as_pairs, together, together_across
from nbbn.jax.frame import INT64
from nbbn.jax.frame import Frame as CompiledFrame
from nbbn.jax.policy import FAILED, NOTHING, Asking, add_function, emit_asking, prepare
from nbbn.jax.python_frame import Frame, XlaError
from nbbn.jax.work import Arrays, Work
from nbbn.runtime import StateLock, code_hash, compile_kernel

_PLATFORM = "CUDA"
_STEP, _DONE = "nbbn_jax_cuda_step", 1
_INTERRUPTED = FAILED + "it was interrupted"
_registering = StateLock()
_steps: dict[int, Any] = {}  # by the numbers that programs know: as long as the process lives, one may be run


class _Array(NamedTuple):
    """What a handler knows of an array before it is called."""

    name: str
    shape: Sizes
    strides: Sizes
    dtype: np.dtype

    def there(self, address: int, device: int) -> DeviceArray:
        return DeviceArray(None, _program, address, self.shape, self.strides, self.dtype, device)


def run(work: Work, given: Arrays, made: Arrays) -> dict[str, Any]:
    """What a step writes. given: what it reads. made: the shapes of what it writes."""
    if work.name == "merge":
        return {"moments": _merge(given["parts"])}
    operands = {name: together(a) for name, a in given.items()}
    results = {name: together_across(name, a) for name, a in made.items()}
    reads, writes = (tuple(_known(n, a) for n, a in arrays.items()) for arrays in (operands, results))
    name, number = _target(work, reads, writes)
    call = jax.ffi.ffi_call(name, tuple(results.values()))
    written = call(*operands.values(), step=np.array([number], np.int64))
    return {n: tuple(a) if isinstance(made[n], tuple) else a for n, a in zip(results, written, strict=True)}


def _known(name: str, array: Any) -> _Array:
    """Of an array of the program, as the engine has it."""
    shape, dtype = (array.shape[:-1], FLOAT64) if crosses_as_pairs(name) else (array.shape, np.dtype(array.dtype))
    return _Array(name, shape, contiguous_strides(shape, dtype.itemsize), dtype)


def _merge(parts: Any) -> Any:
    """The moments of several inputs together, in their order. parts: (P, 4, S), as they cross."""
    with jax.enable_x64(True):
        first, *others = as_float64(parts)
        for other in others:
            both = rules.combine_some(*first, *other)
            rows = zip(first, other, both, strict=True)
            first = jnp.stack([jnp.where(other[0] == 0, a, jnp.where(first[0] == 0, b, ab)) for a, b, ab in rows])
        return as_pairs(first)


# -- what XLA calls ----------------------------------------------------------------------------------------------------


def _target(work: Work, reads: tuple[_Array, ...], writes: tuple[_Array, ...]) -> tuple[str, int]:
    """The name of the target for a step, registered, and the number of a step on arrays of these shapes."""
    options = replace(work.dispatcher.options, adjustment=None)  # which is among the arrays
    facts = work.name, work.lay, work.adjusted, options, work.dispatcher.force, reads, writes
    number = int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:8], "little", signed=True)
    with _registering:
        _steps.setdefault(number, (work, reads, writes))
        return _registered(work.name), number


@cache  # a name can be registered once
def _registered(step: str) -> str:
    name, (entry,) = f"nbbn_cuda_{step}", _handler().overloads.values()
    address = entry.library.get_pointer_to_function(entry.fndesc.llvm_cfunc_wrapper_name)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(ctypes.c_void_p(address)), platform=_PLATFORM)
    return name


@cache
def _handler() -> Any:
    """The compiled handler of all steps, a kernel that takes the address of a call frame, and returns that of an error,
    or 0. It has Python run the step, as the pool is asked for on a CPU (policy.py)."""
    prepare()

    @intrinsic
    def run(typingctx, frame):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return _emit(builder, args[0])

        return types.intp(types.intp), emit

    def handler(frame):  # type: ignore[no-untyped-def]
        return run(frame)

    code = code_hash(("nbbn.jax.frame", "nbbn.jax.on_cuda", "nbbn.jax.policy"))
    return compile_kernel(handler, f"nbbn_cuda_handler_{code}", types.intp(types.intp), caller="c")


def _emit(builder: Any, address: Any) -> Any:
    frame, error = CompiledFrame(builder, address), cgutils.alloca_once_value(builder, INT64(0))

    def fail(why: str) -> None:
        builder.store(frame.error(why), error)

    def body(python: Asking) -> None:
        python.ask(_STEP, address, *frame.attribute(0, 1), until=lambda: builder.not_(python.is_answer(NOTHING)))
        with builder.if_then(python.is_answer(NOTHING)):
            fail(_INTERRUPTED)
        with builder.if_then(builder.not_(python.is_answer(NOTHING, _DONE))):
            builder.store(python.answer(), error)

    with builder.if_then(builder.not_(frame.answer_query())):
        emit_asking(builder, body, fail)
    return builder.load(error)


@ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)  # type: ignore[untyped-decorator]
def _answer(address: int, number: int, answer: int) -> None:
    """Run a step, and write _DONE or the address of an error. An exception cannot go on from here."""
    frame, place = Frame(address), ctypes.c_int64.from_address(answer)
    try:
        if number not in _steps:
            raise LookupError("the program has been lowered in another process, and not in this one")
        _run_step(frame, *_steps[number])
        place.value = _DONE
    except KeyboardInterrupt:
        return  # to be asked again: a step changes nothing that it reads
    except XlaError as error:
        place.value = error.address
    except BaseException as error:
        place.value = frame.error(f"{FAILED}{type(error).__name__}: {error}")


add_function(_STEP, _answer)


# -- a step ------------------------------------------------------------------------------------------------------------


def _run_step(frame: Frame, work: Work, reads: tuple[_Array, ...], writes: tuple[_Array, ...]) -> None:
    device, places = frame.device(), [*frame.arguments(), *frame.results()]
    arrays = {a.name: a.there(place, device) for a, place in zip((*reads, *writes), places, strict=True)}
    engine = work.dispatcher.engine(next(iter(arrays.values())))
    with _program.call(frame):
        if work.lay is None:
            engine._run_middle(work.name, arrays, work.adjusted)
        else:
            engine._run(work.step(arrays))


class _Memory(NamedTuple):
    """What the engine needs beside the arrays of a call."""

    address: int
    shape: Sizes
    dtype: np.dtype
    device: int


class _Program:
    """What an engine asks the library of its arrays (arrays/device.py), answered by the call that this thread is in."""

    def __init__(self) -> None:
        self._now = threading.local()

    @contextlib.contextmanager
    def call(self, frame: Frame) -> Iterator[None]:
        """What has been allocated goes back to XLA at the end, which gives it to what comes later in the stream."""
        self._now.frame, self._now.stream, self._now.memory = frame, frame.stream(), []
        try:
            yield
        finally:
            for address, size in self._now.memory:
                frame.free(address, size)

    def stream(self, device: int) -> int:
        found: int = self._now.stream
        return found

    def empty(self, shape: Sizes, dtype: np.dtype, device: int) -> _Memory:
        size = int(np.prod(shape)) * dtype.itemsize
        address = self._now.frame.allocate(size)
        self._now.memory.append((address, size))
        return _Memory(address, shape, dtype, device)

    def address(self, memory: _Memory) -> int:
        return memory.address

    def describe(self, memory: _Memory) -> tuple[int, Sizes, Sizes, np.dtype, int]:
        return memory.address, memory.shape, (), memory.dtype, memory.device

    def finish(self, device: int) -> None:
        """Nothing: XLA keeps the order of its stream."""


_program: Any = _Program()
