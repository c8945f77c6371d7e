"""The GPU behind the face of targets.py; imported only where there is one, or Numba's simulator of one."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numba import cuda
from numpy.typing import NDArray

from nbbn import Force
from nbbn.arrays import numba_cuda
from nbbn.arrays.device import DeviceArray, wrap
from nbbn.kernels.cuda.memory import VECTOR_BYTES, vector
from nbbn.kernels.cuda.target import SIMULATED
from tests.oracle.face import Target

Array = NDArray[Any]

if SIMULATED:
    # It waits for its threads in a loop, and each time keeps the interpreter to itself for that long: 5 ms.
    sys.setswitchinterval(1e-5)


ALLOCATION = 256  # bytes: what a GPU's allocations are multiples of


class DeviceMemory:
    """The memory of host arrays on the device: one copy, with its gaps, however many views of it there are."""

    def __init__(self) -> None:
        self._copies: dict[int, Any] = {}  # by the address of the host's memory

    def view(self, array: Array) -> DeviceArray:
        """The array on the device: same strides, same alignment, same neighbours."""
        everything = _memory_of(array)
        start = everything.ctypes.data
        if start not in self._copies:
            self._copies[start] = _to_device(everything)
        return wrap(_view(self._copies[start], array.ctypes.data - start, array), numba_cuda)

    def fetch(self, found: DeviceArray, out: Array | None = None) -> Array:
        """A result on the host. out: the host's array whose copy the device has written to, with what is around it."""
        if out is None:
            return to_host(found)
        everything = _memory_of(out)
        everything[...] = self._copies[everything.ctypes.data].copy_to_host()
        return out


def _to_device(memory: Array) -> Any:
    """A copy that lies as a GPU's allocator lays it. NumPy's lie at multiples of 16 bytes: how many elements an access
    may have, and so the order of the sums, would change with each copy in the simulator."""
    if not SIMULATED:
        return cuda.to_device(memory)
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    space = np.empty(memory.size + ALLOCATION, np.uint8)
    copy = space[-space.ctypes.data % ALLOCATION :][: memory.size]
    copy[:] = memory
    return FakeCUDAArray(copy)


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


class Cuda(Target):
    """nbbn/kernels/cuda. The schedule is what the view decides; sums are float64, whatever the device is fast at."""

    kind = "cuda"
    memory = DeviceMemory

    def force(
        self, schedule: str | None, parallel: bool | None, one_pass: bool | None, thresholds: Mapping[str, Any]
    ) -> Force:
        return Force(one_pass=one_pass, thresholds={"sums": "float64", **thresholds})

    def kernels(self) -> list[tuple[str, str, bool, bool]]:
        """Step, loops, whether it is one launch, and False: of all that has run."""
        return [
            (key[0], LOOPS[plan.schedule.rows, plan.schedule.swapped], plan.schedule.one_launch, False)
            for key, plan in self.engine.plans.items()
        ]

    def schedules(self) -> list[Any]:
        return [plan.schedule for plan in self.engine.plans.values()]


class CudaConversion:
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
    origins, targets = vector(source, read_width), vector(target, write_width)
    fetch, decode, words, word, write = origins.fetch, origins.decode, origins.words, origins.word, targets.write

    def convert(origin, address, count):
        raw, values = cuda.local.array(words, word), cuda.local.array(width, np.float32)
        found, given = cuda.local.array(read_width, np.float32), cuda.local.array(write_width, np.float32)
        i = cuda.grid(1)
        if i < count:
            for lane in range(0, width, read_width):
                fetch(origin + (i * width + lane) * size, raw, 0)
                decode(raw, 0, found)
                for k in range(read_width):
                    values[lane + k] = found[k]
            for lane in range(0, width, write_width):
                for k in range(write_width):
                    given[k] = values[lane + k]
                write(address + (i * width + lane) * target_size, given)

    return convert
