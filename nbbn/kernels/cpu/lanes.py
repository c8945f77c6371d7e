"""Sixteen elements at a time: what the loops over elements are made of.

A `traced` function is Python that runs while a kernel is compiled, on vectors, arrays and numbers that stand for
LLVM's (llvm/): what it does with them is the code. So the source says in which order a sum is made and how a run
ends, whatever the vectorizer makes of loops; the rules of one element are those of sixteen; and Numba has nothing to
infer, which is most of the time that it takes to compile. LLVM splits the vectors where registers are narrower. Without
a compiler the same functions run as they are, on NumPy's arrays (plain.py).

Elements are float32 or float64 between load() and store(). Numba cannot type 16-bit floats on the CPU: arrays of uint16
carry float16 and arrays of int16 carry bfloat16 (nbbn.core.dtypes.carrier). Where an argument `n` is None, all sixteen
are meant; otherwise the first n, fewer than that, and the others are 0. None stands for what is not there: nothing is
done with it.
"""

import inspect
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
from numba import types

from nbbn.core import rules
from nbbn.kernels.cpu import llvm, plain
from nbbn.runtime import PLAIN, intrinsic

BLOCK, HALF, LANES, LINE = llvm.BLOCK, llvm.HALF, llvm.LANES, llvm.LINE

_made: Any = plain if PLAIN else llvm
again, each, over, over_columns, when = _made.again, _made.each, _made.over, _made.over_columns, _made.when
load, store, number, part, local, fence = _made.load, _made.store, _made.number, _made.part, _made.local, _made.fence
add_halves, load_half, write_run, write_total = _made.add_halves, _made.load_half, _made.write_run, _made.write_total
either, first, is_any, minimum, to_border = _made.either, _made.first, _made.is_any, _made.minimum, _made.to_border
splat, whole, wide = _made.splat, _made.whole, _made.wide


def traced(function: Callable[..., None]) -> Any:
    """A function without a result that kernels may call."""

    def emit(context: Any, builder: Any, kinds: Any, values: Any) -> None:
        with llvm.tracing(context, builder):
            function(*map(llvm.symbol, kinds, values))

    return _for_kernels(function, list(inspect.signature(function).parameters), emit)


def per_task(function: Callable[..., None]) -> Any:
    """A traced function of a task's number and more, for all tasks of a step.

    Kernels call it with `pool` and `tasks` in the place of that number: so many are run one after the other, or where
    `pool` is not 0, by the threads that it stands for (llvm/sharing.py).
    """

    def in_python(pool: Any, tasks: Any, *given: Any) -> None:
        for task in range(tasks):
            function(task, *given)

    def emit(context: Any, builder: Any, kinds: Any, values: Any) -> None:
        llvm.emit_tasks(context, builder, function, kinds[2:], values)

    return _for_kernels(in_python, ["pool", "tasks", *list(inspect.signature(function).parameters)[1:]], emit)


def _for_kernels(in_python: Callable[..., None], names: list[str], emit: Callable[..., None]) -> Any:
    """What kernels may call: `in_python` without a compiler, and else the code that `emit` makes of the arguments."""

    def answer(typingctx: Any, *kinds: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            emit(context, builder, signature.args, values)
            return context.get_dummy_value()

        return types.void(*(types.int64 if isinstance(k, types.Integer) else k for k in kinds)), code

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("typingctx", *names)]
    answer.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return intrinsic(plain=in_python)(answer)


def _for_vectors() -> SimpleNamespace:
    """The rules of one number, for vectors: with what chooses between values, and Python's names that they use."""
    if PLAIN:
        math: Any = np
        names = {"type": lambda x: lambda value: np.full_like(x, value)}
    else:
        math = SimpleNamespace(sqrt=llvm.Value.sqrt)
        math.isfinite, math.isinf = (lambda x: x - x == 0), (lambda x: abs(x) == float("inf"))
        names = {"type": lambda x: x.like}
    return rules_of({**names, "math": math, "drop": _made.drop, "choose": _made.choose})


def rules_of(names: dict[str, Any]) -> SimpleNamespace:
    """The rules of one number for what stands for numbers: with these in the place of what they use by name, `math`,
    `type`, `drop` and `choose`."""
    found = {**vars(rules), **names}
    for name, rule in vars(rules).items():
        if isinstance(rule, FunctionType) and name not in ("drop", "choose"):
            found[name] = FunctionType(rule.__code__, found, name)
    return SimpleNamespace(**found)


vector_rules = _for_vectors()
