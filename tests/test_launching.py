"""What a call asks of CUDA's driver, with a driver that only writes it down."""

import ctypes
import os
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (extra: cuda)", allow_module_level=True)
if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("Numba's simulator has no driver", allow_module_level=True)

from nbbn.arrays import moving
from nbbn.arrays.device import DeviceArray
from nbbn.engine.cuda import launching as repeated
from nbbn.kernels.cuda.blocks import Variant
from nbbn.kernels.cuda.steps import MEMORY, signature
from nbbn.kernels.cuda.tasks import Grid
from nbbn.streams import driver as driver_module
from nbbn.streams import launching
from tests.helpers.concurrency import in_threads

PRIMARY, OTHER, NONE = 100, 200, 0


class Code(int):
    name = "CUDA_ERROR_INVALID_CONTEXT"


class Driver:
    """A thread's current context, and what was done in which one."""

    def __init__(self, current):
        self.current, self.done, self.launched, self.meanwhile = current, [], [], lambda: None

    def cuCtxGetCurrent(self):
        return Code(0), self.current

    def cuCtxSetCurrent(self, context):
        self.current = context
        return (Code(0),)

    def cuDeviceGet(self, ordinal):
        return Code(0), ordinal

    def cuDevicePrimaryCtxRetain(self, device):
        return Code(0), PRIMARY + device

    def cuMemsetD8Async(self, address, value, size, stream):
        if self.current == NONE:
            return (Code(201),)
        self.done.append((self.current, address, value, size, stream))
        return (Code(0),)

    CUfunction = int

    def cuLaunchKernel(self, function, *given):
        *sizes, stream, places, extra = given
        self.meanwhile()
        self.launched.append((function, sizes, stream, read(places, self.types)))
        assert extra == 0
        return (Code(0 if self.current else 201),)


def read(places, types):
    """The arguments as the driver reads them: from a list of the places of each, as much as the kernel's type has."""
    found = (ctypes.c_void_p * len(types)).from_address(places)
    return [kind.from_address(place).value for kind, place in zip(types, found, strict=True)]


VARIANT = Variant(np.dtype(np.float32), rows=True, width=4, sums=np.dtype(np.float32), threads=256)
GRID = Grid(*range(11, 11 + len(Grid._fields)))
ARGUMENTS = 3 * 5 + 4 + len(GRID) + len(MEMORY) + 1  # of inference, and then epsilon
_CTYPES = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float, "float64": ctypes.c_double}


def flat(kinds):
    """Types of arguments, without tuples around them."""
    return [t for kind in kinds for t in (flat(kind) if hasattr(kind, "__iter__") else [_CTYPES[str(kind)]])]


TYPES = flat(signature("infer", VARIANT).args)
STRIDES = {"x": (1, 2, -3, 4), "y": (5, 6, 7, 8)}  # -3: of 32 bits as of 64
KERNEL = 4711


def new_launch():
    return repeated.Launch("infer", VARIANT, 0, 9, (32, 8), STRIDES, (1, 2, 3, 4), GRID, 64, 0.5)


def expected(x, y, memory):
    return [x, 1, 2, -3, 4, 0, 0, 0, 0, 0, y, 5, 6, 7, 8, 1, 2, 3, 4, *GRID, *memory, 64, 0.5]


@pytest.fixture
def driver(monkeypatch):
    def install(current):
        found = Driver(current)

        def function(kernel, device):
            found.kernel, found.types = kernel.name, flat(kernel.signature.args)
            return KERNEL

        for module in (driver_module, launching):
            monkeypatch.setattr(module, "driver", lambda: found)
        for module in (launching, repeated):
            monkeypatch.setattr(module, "function", function)
        driver_module._primary.cache_clear()
        return found

    yield install
    driver_module._primary.cache_clear()


@pytest.mark.parametrize(
    ("before", "after"),
    [(PRIMARY, PRIMARY), (OTHER, OTHER), (NONE, PRIMARY)],
    ids=["the primary one", "another one", "none"],
)
def test_the_primary_context_is_current(driver, before, after):
    """In a thread of whatever past; who had a context of his own has it again."""
    found = driver(before)
    with driver_module.primary_context(0):
        launching.clear(4096, 64, 7)
    assert found.done == [(PRIMARY, 4096, 0, 64, 7)]
    assert found.current == after


def test_of_the_device_that_is_asked_for(driver):
    found = driver(PRIMARY)
    with driver_module.primary_context(1):
        launching.clear(4096, 64, 7)
    assert found.done[0][0] == PRIMARY + 1
    assert found.current == PRIMARY


def test_an_error_inside_leaves_the_context_as_it_was(driver):
    found = driver(OTHER)
    with pytest.raises(ValueError, match="inside"), driver_module.primary_context(0):
        raise ValueError("inside")
    assert found.current == OTHER


def test_errors_of_the_driver_are_raised(driver):
    driver(NONE)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_CONTEXT"):
        launching.clear(4096, 64, 7)


# -- launches ----------------------------------------------------------------------------------------------------------


def test_the_arguments_are_those_of_the_kernel(driver):
    """As many, of the same types, and each in its place."""
    found, launch = driver(PRIMARY), new_launch()
    memory = range(2**40, 2**40 + len(MEMORY))
    for x, y in ((2**47, 2**46), (2**45, 2**44)):
        launch.run(7, {"x": x, "y": y, "residual": 5}, memory)
        assert found.launched.pop() == (KERNEL, [9, 1, 1, 32, 8, 1, 0], 7, expected(x, y, memory))
    assert len(TYPES) == ARGUMENTS + 1
    assert set(TYPES) == {ctypes.c_int32, ctypes.c_int64, ctypes.c_float}


def test_epsilon_has_the_dtype_of_the_statistics(driver):
    found, wide = driver(PRIMARY), replace(VARIANT, dtype=np.dtype(np.float64), width=2)
    launch = repeated.Launch("infer", wide, 0, 9, (32, 8), STRIDES, (1, 2, 3, 4), GRID, 64, 1e-3)
    launch.run(7, {"x": 1, "y": 2}, [0] * len(MEMORY))
    assert found.types[-1] is ctypes.c_double
    assert found.launched[-1][3][-1] == 1e-3


def test_whoever_launches_meanwhile_has_arguments_of_his_own(driver):
    """The driver reads them while other threads run: here another one launches before it has read the first one's."""
    found, launch, memory = driver(PRIMARY), new_launch(), [0] * len(MEMORY)

    def other():
        found.meanwhile = lambda: None
        in_threads([lambda: launch.run(8, {"x": 30, "y": 40}, memory)])

    found.meanwhile = other
    launch.run(7, {"x": 10, "y": 20}, memory)
    assert [done[2:] for done in found.launched] == [(8, expected(30, 40, memory)), (7, expected(10, 20, memory))]
    launch.run(9, {"x": 50, "y": 60}, memory)
    assert found.launched[-1][3] == expected(50, 60, memory)


def test_a_launch_that_fails_says_so(driver):
    driver(NONE)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_CONTEXT"):
        new_launch().run(7, {"x": 10, "y": 20}, [0] * len(MEMORY))


# -- launches of other kernels -----------------------------------------------------------------------------------------


class Library:
    def __init__(self):
        self.done = []

    def stream(self, device):
        return 77

    def finish(self, device):
        self.done.append(device)


def array(address, shape, strides, dtype):
    return DeviceArray(None, Library(), address, shape, strides, np.dtype(dtype), 0)


MASK = array(2**41, (2, 3, 5), (60, 20, 2), bool)
WEIGHTS = array(2**42, (2, 3, 5), (60, 20, 4), np.float32)
SMALL, LENGTHS = array(2**43, (8,), (8,), np.float64), array(2**44, (2,), (16,), np.int64)
NUMBERS = np.array([0.5, -0.0, np.inf, 1e-300, 1, 2, 3, 4])
OTHERS = {
    "copy": (lambda: moving.copy(MASK, WEIGHTS), WEIGHTS, [2**41, 20, 2, 2**42, 20, 4, 6, 5, 30]),
    "add": (lambda: moving.add(SMALL, SMALL), SMALL, [2**43, 2**43, 8]),
    "first_steps": (lambda: moving.first_steps(LENGTHS, WEIGHTS), WEIGHTS, [2**44, 16, 2**42, 3, 30]),
    "numbers": (lambda: moving.numbers(NUMBERS, SMALL), SMALL, [*NUMBERS.view(np.int64), 2**43, 8]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels_get_their_arguments(driver, name):
    """In the stream that the library uses now, in the device's primary context, and without Numba."""
    found, (call, target, expected) = driver(OTHER), OTHERS[name]
    call()
    assert found.launched == [(KERNEL, [1, 1, 1, 128, 1, 1, 0], 77, expected)]
    assert found.kernel == name
    assert found.current == OTHER
    assert target.library.done.pop() == 0
