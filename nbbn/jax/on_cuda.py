"""A step on a GPU of NVIDIA: the CUDA engine's, called by the program through XLA's foreign function interface.

The handler is Python's. It puts kernels into the stream of the call, which takes as long as it does for other
libraries' arrays, and returns before they run. A program knows it by a name made of all that the step depends on, so no
address is in a program.
"""

import atexit
import contextlib
import ctypes
import hashlib
import threading
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from nbbn.arrays.device import DeviceArray
from nbbn.core import rules
from nbbn.core.layout import Sizes, contiguous_strides
from nbbn.jax.crossing import FLOAT64, as_float64, as_pairs, crosses_as_pairs, together, together_across
from nbbn.jax.policy import FAILED
from nbbn.jax.python_frame import Frame, XlaError
from nbbn.jax.work import Arrays, Work
from nbbn.runtime import StateLock

_PLATFORM = "CUDA"
_LATER = 0.01  # seconds after which an interrupt comes once more, out of the handler, where Python can raise it
_registering = StateLock()
_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_handlers: dict[str, Any] = {}  # by the names of their targets: as long as the process lives, a program may be run


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
    written = jax.ffi.ffi_call(_target(work, reads, writes), tuple(results.values()))(*operands.values())
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


# -- handlers ----------------------------------------------------------------------------------------------------------


def _target(work: Work, reads: tuple[_Array, ...], writes: tuple[_Array, ...]) -> str:
    """The name of the target for a step on arrays of these shapes, registered."""
    options = replace(work.dispatcher.options, adjustment=None)  # which is among the arrays
    facts = work.name, work.lay, work.adjusted, options, work.dispatcher.force, reads, writes
    name = f"nbbn_cuda_{work.name}_{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}"
    with _registering:
        if name not in _handlers:
            handler = _Handler(_handler(lambda frame: _run_step(frame, work, reads, writes)))
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform=_PLATFORM)
            _handlers[name] = handler
    return name


def _handler(step: Callable[[Frame], None]) -> Callable[[int], int]:
    """What XLA calls with the address of a call frame. It returns that of an error, or 0: nothing is raised in XLA."""

    def handle(address: int) -> int:
        frame = Frame(address)
        try:
            if not frame.answer_query():
                _finish_at_exit()
                step(frame)
        except XlaError as error:
            return error.address
        except KeyboardInterrupt:
            threading.Timer(_LATER, interrupt_main).start()
            return frame.error(FAILED + "it was interrupted")
        except BaseException as error:
            return frame.error(f"{FAILED}{type(error).__name__}: {error}")
        return 0

    return handle


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

    def describe(self, memory: _Memory) -> tuple[int, Sizes, Sizes, np.dtype, int]:
        return memory.address, memory.shape, (), memory.dtype, memory.device

    def finish(self, device: int) -> None:
        """Nothing: XLA keeps the order of its stream."""


_program: Any = _Program()


@cache
def _finish_at_exit() -> None:
    """When the process ends JAX waits for its programs with Python's lock in its hands, which a handler needs. So they
    are waited for before: a GPU begins what it was given last when the others have been begun."""
    atexit.register(_finish)  # before JAX's own, which has been registered earlier


def _finish() -> None:
    for device in jax.local_devices(backend="cuda"):
        with contextlib.suppress(Exception):  # of a program that failed
            (jax.device_put(0, device) + 1).block_until_ready()
