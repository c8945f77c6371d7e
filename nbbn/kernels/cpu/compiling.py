"""The steps compiled: what their arguments are, and for which types."""

import inspect
from functools import lru_cache
from typing import Any

import numba
from numba import types

from nbbn.kernels.cpu.steps import COMMON, RANKS, Step, steps
from nbbn.kernels.cpu.tasks import Grid
from nbbn.kernels.cpu.views import Borrowed, Data, Numbers
from nbbn.runtime import PLAIN, code_hash, compile_kernel, run_by_python

code_hash()  # all that it covers is imported now

# What an argument of a step is, by its name. X is an array of the input's dtype, S one of the statistics' dtype, both
# canonical views of the schedule's rank, or X the memory of a dense one (views.py); s is an array of the statistics'
# dtype, t one of the state's own, d one of float64, i one of int64, with their rank. A flag is True or None. Views may
# be None, too. An int is a number of int64. In each step the order of the arguments is that of its Python function:
# the pool, then what is the same in every call like it, so that a plan can bind it (engine/cpu/plan.py).
ARGUMENTS = {
    **dict.fromkeys(("x", "dy", "residual", "y", "dx", "dz"), "X"),
    **dict.fromkeys(("weights", "a", "b"), "S"),
    **dict.fromkeys(("params", "coefficients", "dparams"), "s2"),
    **dict.fromkeys(("state", "new_state"), "t2"),
    **dict.fromkeys(("moments", "saved", "sums"), "d2"),
    "parts": "d3",
    "hyper": "d1",
    "ends": "i1",
    "pool": "int",
    **dict.fromkeys(("relu", "renorm", "debias", "skip", "adjusted"), "flag"),
    "grid": "grid",
}
# What each step writes; everything else may be read-only memory.
WRITES = {
    "reduce": {"moments"},
    "reduce_sequences": {"moments"},
    "freeze": {"saved"},
    "merge": {"moments"},
    "finish": {"new_state", "saved", "coefficients"},
    "apply": {"y"},
    "reduce_gradient": {"sums", "dparams"},
    "apply_gradient": {"dx", "dz"},
    "train": {"y", "new_state", "saved"},
    "infer": {"y"},
    "backward": {"dx", "dz", "dparams"},
    "frozen_backward": {"dx", "dparams"},
}


@lru_cache(maxsize=16)
def names_of(step: str) -> tuple[str, ...]:
    """The arguments of a step, in their order."""
    function = COMMON.get(step) or steps("planes", False)[step]
    return tuple(inspect.signature(function).parameters)


@lru_cache(maxsize=1024)
def compiled(
    step: str,
    schedule: str,
    one_pass: bool,
    dtype: Any,
    statistic: Any,
    state: Any,
    contiguous: bool,
    absent: frozenset[str],
) -> Step:
    """A step compiled for one combination of types. `absent`: the names of the arguments that are None."""
    if step in COMMON:
        function, name = COMMON[step], step
    else:
        function, passes = steps(schedule, one_pass)[step], "one_pass" if one_pass else "two_passes"
        name = f"{schedule}_{step}_{passes}"
    if PLAIN:
        return run_by_python(function)
    kinds = signature(step, schedule, dtype, statistic, state, contiguous, absent)
    return compile_kernel(function, name, kinds)


def signature(
    step: str, schedule: str, dtype: Any, statistic: Any, state: Any, contiguous: bool, absent: frozenset[str]
) -> Any:
    """The types of a step's arguments, see compiled()."""
    rank = RANKS[schedule]
    scalar = {"X": numba.from_dtype(dtype), "S": numba.from_dtype(statistic), "d": types.float64, "i": types.int64}
    scalar |= {"s": scalar["S"], "t": numba.from_dtype(state)}

    def argument(name: str) -> types.Type:
        kind = ARGUMENTS[name]
        if name in absent:
            return types.none
        if kind == "flag":
            return types.boolean
        if kind == "int":
            return types.int64
        if kind == "grid":
            return Numbers(types.int64, len(Grid._fields))
        if kind == "X" and contiguous:
            return Data(scalar["X"])
        view = kind in ("X", "S")
        layout = "A" if view else "C"
        return Borrowed(scalar[kind[0]], rank if view else int(kind[1]), layout, readonly=name not in WRITES[step])

    return types.void(*[argument(name) for name in names_of(step)])
