"""XLA's programs for the CPU that run the steps of a GPU, in Numba's simulator.

What stands in for the GPU is the call's stream, its device and the memory that XLA allocates there.
"""

import threading
from functools import partial
from typing import ClassVar

import numpy as np

from nbbn.engine.base import Force
from nbbn.engine.dispatcher import Dispatcher
from nbbn.jax import norm, on_cuda, primitive
from tests.helpers.on_gpu import FEW_THREADS

STREAM = 7


class Simulated(on_cuda.Frame):
    """A frame whose program runs on a GPU. Memory: what has been allocated, by address, and not given back."""

    memory: ClassVar[dict[int, np.ndarray]] = {}
    allocated = 0

    def device(self):
        return 0

    def stream(self):
        return STREAM

    def allocate(self, size):
        array = np.full(size + 16, 0xCC, np.uint8)
        address = -(-array.ctypes.data // 16) * 16
        self.memory[address] = array
        Simulated.allocated += 1
        return address

    def free(self, address, size):
        assert self.memory.pop(address).size == size + 16


def install(set_attribute):
    """From now on, for what has not been compiled yet."""
    run, one_at_a_time = on_cuda._run_step, threading.Lock()  # as the simulator has it

    def alone(*arguments):
        with one_at_a_time:
            run(*arguments)

    set_attribute(on_cuda, "_PLATFORM", "cpu")
    set_attribute(on_cuda, "Frame", Simulated)
    set_attribute(on_cuda, "_run_step", alone)
    set_attribute(primitive, "PLATFORMS", {"cpu": on_cuda.run})
    set_attribute(norm, "Dispatcher", partial(Dispatcher, force=Force(thresholds=FEW_THREADS)))
