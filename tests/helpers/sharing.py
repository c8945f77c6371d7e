"""Which threads of Numba's pool run the tasks of a step."""

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils

from nbbn.kernels.cpu.lanes import per_task
from nbbn.kernels.cpu.llvm.values import DOUBLE, I32, here
from nbbn.runtime import parallel_region, start_pool

RUN = 1000  # more than there are threads


@per_task
def _note(task, found):
    """Add RUN and the number of the thread at the task's place."""
    builder = here()
    kind = ir.FunctionType(I32, [])
    thread = builder.call(cgutils.get_or_insert_function(builder.module, kind, "get_thread_id"), [])
    number = builder.sitofp(builder.add(thread, I32(RUN)), DOUBLE)
    place = builder.gep(found.data, [task.value])
    builder.store(builder.fadd(builder.load(place), number), place)


@numba.njit
def _note_all(pool, tasks, found):
    _note(pool, tasks, found)


def threads_of(tasks):
    """By task, the number of the thread that has run it. Every task is run once."""
    start_pool()
    numba.get_num_threads()  # raises an error where there is no threading layer
    found = np.zeros(tasks)
    with parallel_region() as pool:
        assert pool, "it is free"
        _note_all(pool, tasks, found)
    assert np.all(found // RUN == 1), found
    return (found.astype(int) % RUN).tolist()
