"""The launcher, by which the threads of Numba's pool run the tasks of any step: the only place with a prange.

With a parallel loop in each step Numba would compile its body four times over, for the loop's own function and for what
leads to it, and each step twice, for one thread and for several.
"""

from typing import Any

from llvmlite import ir
from numba import prange, types

from nbbn.runtime import intrinsic


def _in_python(function: Any, task: Any, frame: Any) -> None:
    raise NotImplementedError("without a compiler there is one thread")


@intrinsic(plain=_in_python)
def _run(typingctx, function, task, frame):
    def emit(context, builder, signature, values):
        address, *given = values
        kind = ir.FunctionType(ir.VoidType(), [v.type for v in given])
        builder.call(builder.inttoptr(address, kind.as_pointer()), given)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


def launch(function: Any, frame: Any, tasks: Any) -> None:
    """Call the function at an address with the number of each task, and with `frame`."""
    for task in prange(tasks):
        _run(function, task, frame)
