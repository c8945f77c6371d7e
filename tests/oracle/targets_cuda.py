"""The GPU behind the face of targets.py; imported only where there is one, or Numba's simulator of one."""

import sys
from typing import Any

import numpy as np
import pytest
from numba import cuda
from numpy.typing import NDArray

from nbbn import Options
from nbbn.adapters import numba_cuda
from nbbn.gpu.arrays import DeviceArray, wrap
from nbbn.gpu.dispatcher import DeviceDispatcher
from nbbn.kernels.cuda.memory import VECTOR_BYTES, vector
from nbbn.kernels.cuda.target import SIMULATED

Array = NDArray[Any]

if SIMULATED:
    # It waits for its threads in a loop, and each time keeps the interpreter to itself for that long: 5 ms.
    sys.setswitchinterval(1e-5)


class DeviceMemory:
    """The memory of host arrays on the device: one copy, with its gaps, however many views of it there are."""

    def __init__(self) -> None:
        self._copies: dict[int, Any] = {}  # by the address of the host's memory

    def view(self, array: Array) -> DeviceArray:
        """The array on the device: same strides, same alignment, same neighbours."""
        everything = _memory_of(array)
        start = everything.ctypes.data
        if start not in self._copies:
            self._copies[start] = cuda.to_device(everything)
        return wrap(_view(self._copies[start], array.ctypes.data - start, array), numba_cuda)

    def place(self, value: Any) -> Any:
        """The same for None, and for pairs."""
        if isinstance(value, tuple):
            return tuple(map(self.view, value))
        return None if value is None else self.view(value)

    def fetch(self, array: Array) -> Array:
        """What the device has written to the array and around it, in the host's memory."""
        everything = _memory_of(array)
        everything[...] = self._copies[everything.ctypes.data].copy_to_host()
        return array


def _memory_of(array: Array) -> Array:
    """All bytes of the array that owns the memory."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    assert array.flags.c_contiguous
    return array.reshape(-1).view(np.uint8)


def _view(memory: Any, start: int, like: Array) -> Any:
    if SIMULATED:
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        return FakeCUDAArray(np.ndarray(like.shape, like.dtype, memory._ary, start, like.strides))
    from numba.cuda.cudadrv.devicearray import DeviceNDArray

    return DeviceNDArray(like.shape, like.strides, like.dtype, gpu_data=memory.gpu_data.view(start))


# By rows and swapped of a schedule.
LOOPS = {
    (False, False): "planes",
    (False, True): "short planes",
    (True, False): "rows",
    (True, True): "swapped rows",
}


def to_host(array: DeviceArray) -> Array:
    return array.library.to_host(array.owner)


def _placed(memory: DeviceMemory, operands: dict[str, Any]) -> dict[str, Any]:
    return {name: memory.place(value) for name, value in operands.items()}


def _output(memory: DeviceMemory, operands: dict[str, Any], found: DeviceArray) -> Array:
    """What a step returns: the caller's own array if there is one."""
    out = operands.get("out")
    return to_host(found) if out is None else memory.fetch(out)


class Cuda:
    """nbbn/kernels/cuda."""

    def __init__(
        self,
        options: dict[str, Any],
        schedule: str | None = None,  # the view decides
        parallel: bool | None = None,
        one_pass: bool | None = None,
        sums: str = "float64",  # whatever the device is fast at
    ) -> None:
        self.dispatcher = DeviceDispatcher(Options(**options), one_pass, sums)

    def train(self, x: Array, params: Array, state: Array, **operands: Any) -> tuple[Array, Array, Array]:
        memory, hyper = DeviceMemory(), self.dispatcher.hyper(x.ndim, x.dtype)
        arrays = map(memory.view, (x, params, state))
        y, new_state, saved = self.dispatcher.train(*arrays, hyper, **_placed(memory, operands))
        return _output(memory, operands, y), to_host(new_state), to_host(saved)

    def infer(self, x: Array, params: Array, state: Array, **operands: Any) -> Array:
        memory = DeviceMemory()
        y = self.dispatcher.infer(*map(memory.view, (x, params, state)), **_placed(memory, operands))
        return _output(memory, operands, y)

    def backward(
        self, dy: Array, x: Array, params: Array, saved: Array, training: bool = True, **operands: Any
    ) -> tuple[Array, Array, Array | None]:
        memory = DeviceMemory()
        dx, dparams, dz = self.dispatcher.backward(
            *map(memory.view, (dy, x, params, saved)), training=training, activated=True, **_placed(memory, operands)
        )
        return _output(memory, operands, dx), to_host(dparams), to_host(dz)

    def frozen_backward(
        self, dy: Array, x: Array, params: Array, state: Array, **operands: Any
    ) -> tuple[Array, Array, Array | None]:
        saved = to_host(self.dispatcher.saved_of(DeviceMemory().view(state)))
        return self.backward(dy, x, params, saved, training=False, **operands)

    def kernels(self) -> list[tuple[str, str, bool, bool]]:
        """Step, loops, whether it is one launch, and False: of all that has run."""
        return [
            (key[0][0], LOOPS[plan.schedule.rows, plan.schedule.swapped], plan.schedule.one_launch, False)
            for key, plan in self.dispatcher._device_plans.items()
        ]

    def schedules(self) -> list[Any]:
        return [plan.schedule for plan in self.dispatcher._device_plans.values()]

    def moments(self, x: Array, weights: Array | None = None) -> Array:
        memory = DeviceMemory()
        return to_host(self.dispatcher.moments(memory.view(x), memory.place(weights)))[:3]


class CudaScalars:
    """How kernels read and write the elements of one 16-bit dtype: alone, and several in one access."""

    def __init__(self, dtype: Any) -> None:
        if SIMULATED:
            pytest.skip("in the simulator NumPy converts, not the instructions of a GPU")
        self.dtype = np.dtype(dtype)

    def read(self, stored: Array) -> Array:
        """float32 values of (n,) elements."""
        return self._in_every_width(stored, np.dtype(np.float32))

    def write(self, values: Array) -> Array:
        """(n,) elements for float32 values."""
        return self._in_every_width(values, self.dtype)

    def _in_every_width(self, source: Array, dtype: np.dtype[Any]) -> Array:
        found = [self._convert(source, dtype, width) for width in (1, 2, 4, 8)]
        for other in found[1:]:
            np.testing.assert_array_equal(other.view(np.uint8), found[0].view(np.uint8))
        return found[0]

    def _convert(self, source: Array, dtype: np.dtype[Any], width: int) -> Array:
        count = -(-source.size // width)
        padded = np.zeros(count * width, source.dtype)
        padded[: source.size] = source
        origin, target = (wrap(cuda.to_device(a), numba_cuda) for a in (padded, np.zeros(count * width, dtype)))
        kernel = cuda.jit(conversion(source.dtype, dtype, width))
        kernel[-(-count // 128), 128](origin.address, target.address, count)
        return to_host(target)[: source.size]


def conversion(source: np.dtype[Any], target: np.dtype[Any], width: int) -> Any:
    """A kernel that copies `count` times `width` elements from one address to another, in another dtype."""
    size, read_width = source.itemsize, min(width, VECTOR_BYTES // source.itemsize)
    target_size, write_width = target.itemsize, min(width, VECTOR_BYTES // target.itemsize)
    read, write = vector(source, read_width).read, vector(target, write_width).write

    def convert(origin, address, count):
        values = cuda.local.array(width, np.float32)
        i = cuda.grid(1)
        if i < count:
            for lane in range(0, width, read_width):
                read(origin + (i * width + lane) * size, values, lane)
            for lane in range(0, width, write_width):
                write(address + (i * width + lane) * target_size, values, lane)

    return convert
