"""Which threads of Numba's pool run the tasks of a step."""

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils

from nbbn.kernels.cpu.lanes import per_task
from nbbn.kernels.cpu.llvm.values import DOUBLE, I32, here
from nbbn.runtime import parallel_region

MASK = ir.FunctionType(I32, [])


def _call(symbol):
    """A number that a function of Numba's pool returns, as a float64."""
    builder = here()
    return builder.sitofp(builder.call(cgutils.get_or_insert_function(builder.module, MASK, symbol), []), DOUBLE)


@per_task
def _note(task, found):
    """Add the thread's number, counted from 1, at its task's place; twice would be seen."""
    builder = here()
    place = builder.gep(found.data, [task.value])
    number = builder.fadd(_call("get_thread_id"), ir.Constant(DOUBLE, 1))
    builder.store(builder.fadd(builder.load(place), number), place)


@numba.njit
def _note_all(pool, tasks, found):
    _note(pool, tasks, found)


def threads_of(tasks):
    """By task, the number of the thread that has run it: 1 is the caller."""
    found = np.zeros(tasks)
    with parallel_region() as pool:
        _note_all(pool, tasks, found)
    return found.astype(int).tolist()
