"""A step on a CPU: a compiled kernel, called by the program through XLA's foreign function interface (handlers.py).

Two rows are two buffers, of which the kernel finds the second one by a stride, and more are one.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nbbn.core.layout import contiguous_strides
from nbbn.engine.cpu.engine import CpuEngine
from nbbn.engine.cpu.moments import MERGE
from nbbn.engine.cpu.plan import Plan
from nbbn.jax.crossing import across, together, together_across
from nbbn.jax.handlers import STRIDED, target
from nbbn.jax.work import Arrays, Work, views_without_memory

_HOST = np.empty(0)  # an array of the place whose engine plans


def run(work: Work, given: Arrays, made: Arrays) -> dict[str, Any]:
    """What a step writes. given: what it reads. made: the shapes of what it writes."""
    arrays = {**given, **made}
    if work.name == "merge":
        return _call(MERGE, given, made)
    engine = work.dispatcher.engine(_HOST)
    assert isinstance(engine, CpuEngine)
    if work.lay is None:
        there = dict.fromkeys(arrays, True) | {"params": given["params"][0], "state": given["state"][0]}
        variant, _ = engine.middle(work.name, there, work.adjusted)
        return _call(variant, given, made)
    views = views_without_memory(arrays, given["x"].shape)
    numbers = {"state": np.empty(0, given["state"][0].dtype)} if "state" in given else {}
    plan: Plan = engine.plan(work.step({**views, **numbers}))
    return _call(plan.variant(), given, made, _attributes(plan, views), plan.schedule.parallel)


def _call(
    variant: tuple[Any, ...],
    given: Arrays,
    made: Arrays,
    attributes: Mapping[str, np.ndarray] | None = None,
    parallel: bool = False,
) -> dict[str, Any]:
    """What a compiled kernel writes. variant: what compiled() is asked for. parallel: whether threads share its
    tasks."""
    apart = frozenset(n for n, a in {**given, **made}.items() if isinstance(a, tuple) and len(a) == 2)
    found = target(variant, parallel, apart)
    operands = [b for n in found.inputs for b in (given[n] if n in apart else (together(given[n]),))]
    results = [
        shape
        for n in found.outputs
        for shape in ((across(n, row) for row in made[n]) if n in apart else (together_across(n, made[n]),))
    ]
    written: Iterator[Any] = iter(jax.ffi.ffi_call(found.name, results)(*operands, **(attributes or {})))

    def rows(name: str) -> Any:
        if name in apart:
            return next(written), next(written)
        return tuple(next(written)) if isinstance(made[name], tuple) else next(written)

    return {name: rows(name) for name in found.outputs}


def _attributes(plan: Plan, views: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the handler has to know of a plan: the grid, and how the views lie that may repeat their values."""
    attributes, shape = {"grid": np.array(plan.schedule.grid, np.int64)}, plan.schedule.shape
    if any(name in views for name in STRIDED):
        strides = np.zeros((len(STRIDED), 4), np.int64)
        for i, name in enumerate(STRIDED):
            if name in views:
                known = plan.strides[name]
                dense = contiguous_strides(shape, views[name].itemsize)
                strides[i, : len(shape)] = dense if known is None else known[: len(shape)]
        attributes["strides"] = strides.ravel()
    return attributes
