"""What a call asks of CUDA's driver, with a driver that only writes it down."""

import os
from importlib.util import find_spec

import pytest

if find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (extra: cuda)", allow_module_level=True)
if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("Numba's simulator has no driver", allow_module_level=True)

from nbbn.engine.cuda import driver as driver_module
from nbbn.engine.cuda import launching

PRIMARY, OTHER, NONE = 100, 200, 0


class Code(int):
    name = "CUDA_ERROR_INVALID_CONTEXT"


class Driver:
    """A thread's current context, and what was done in which one."""

    def __init__(self, current):
        self.current, self.done = current, []

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


@pytest.fixture
def driver(monkeypatch):
    def install(current):
        found = Driver(current)
        for module in (driver_module, launching):
            monkeypatch.setattr(module, "driver", lambda: found)
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
