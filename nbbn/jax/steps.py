"""The engine's steps as operations of a JAX program.

Shapes are known while a program is traced, so the plan of a step is made then, by the engine itself. Most steps become
a call of a compiled kernel through XLA's foreign function interface (handlers.py). Those that need copies, or run on
parts of a batch, call back into Python, as all do where that interface is not wanted.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from nbbn.core import dtypes
from nbbn.core.layout import Layout, Sizes, contiguous_strides
from nbbn.engine.base import Step
from nbbn.engine.cpu.engine import CpuEngine
from nbbn.engine.cpu.moments import MERGE, merge_moments
from nbbn.engine.cpu.plan import Plan
from nbbn.engine.dispatcher import Dispatcher
from nbbn.jax.crossing import FLOAT64, Arrays, Shape, call, call_back
from nbbn.jax.handlers import STRIDED
from nbbn.kernels.channel import GRADIENT_ROWS, MOMENT_ROWS, OUTPUT_ROWS, SAVED_ROWS
from nbbn.kernels.cpu.steps import ARGUMENTS, WRITES, names_of
from nbbn.runtime import PLAIN


class Steps:
    """The steps of one set of options. ffi: through the foreign function interface, where that can be.

    Every step takes its arrays by the names of the kernels' arguments (kernels/cpu/steps.py), and returns those that it
    writes. What is None is not there.
    """

    def __init__(self, dispatcher: Dispatcher, ffi: bool) -> None:
        self.dispatcher, self._ffi = dispatcher, ffi and not PLAIN
        self._engine = CpuEngine(dispatcher.options, dispatcher.force)

    def run(self, name: str, lay: Layout, arrays: Arrays, wants_dz: bool = False) -> dict[str, Any]:
        """A step on arrays of the input's shape, `x` among them. Weights, a and b broadcast against it."""
        given = {n: arrays[n] for n in names_of(name) if arrays.get(n) is not None}
        made = self._made(name, lay, given, wants_dz)
        views = ["x", *(n for n in names_of(name) if ARGUMENTS[n] in ("X", "S") and n != "x")]
        if self._ffi and not lay.parts:
            fakes = {n: _fake(a, given["x"].shape) for n, a in {**given, **made}.items() if n in views}
            numbers = {"state": np.empty(0, given["state"][0].dtype)} if "state" in given else {}
            plan: Plan = self._engine.plan(Step(name, lay, {n: fakes.get(n) for n in views}, numbers))
            if plan.copied is None and plan.contiguous:
                return call(plan.variant(), given, made, _attributes(plan, fakes), plan.schedule.parallel)

        def on_host(read: dict[str, Any], written: dict[str, Any]) -> None:
            both = read | written
            numbers = {n: a for n, a in both.items() if n not in views}
            self._engine._run(Step(name, lay, {n: both.get(n) for n in views}, numbers))

        return call_back(on_host, given, made)

    def finish(self, arrays: Arrays, adjusted: bool, common: frozenset[Any] = frozenset()) -> dict[str, Any]:
        """The middle stage: of moments, params, state and hyper. common: the axes that share these moments."""
        (gamma, _), state, statistics = arrays["params"], arrays["state"], arrays["moments"].shape[1]
        made = {
            "new_state": tuple(map(_like, state)),
            "saved": Shape((SAVED_ROWS, statistics), FLOAT64),
            "coefficients": Shape((OUTPUT_ROWS[adjusted], statistics), gamma.dtype),
        }
        if self._ffi:
            there = dict.fromkeys((*arrays, *made), True) | {"params": gamma, "state": state[0]}
            variant, _ = self._engine.middle("finish", there, adjusted)
            return call(variant, arrays, made, {}, common=common)

        def on_host(read: dict[str, Any], written: dict[str, Any]) -> None:
            self._engine._run_middle("finish", read | written, adjusted)

        return call_back(on_host, arrays, made, common)

    def merge(self, parts: Any) -> Any:
        """The moments of several inputs together; parts: (P, 4, S), as they cross."""
        made = {"moments": Shape((MOMENT_ROWS, parts.shape[2]), FLOAT64)}
        if self._ffi:
            return call(MERGE, {"parts": parts}, made, {})["moments"]

        def on_host(read: dict[str, Any], written: dict[str, Any]) -> None:
            written["moments"][...] = merge_moments(read["parts"])

        return call_back(on_host, {"parts": parts}, made)["moments"]

    def _made(self, name: str, lay: Layout, given: Arrays, wants_dz: bool) -> dict[str, Any]:
        """The shapes of what a step writes."""
        x, statistics = _like(given["x"]), lay.statistics
        rows = {"moments": MOMENT_ROWS, "saved": SAVED_ROWS, "sums": GRADIENT_ROWS["a" in given]}
        found: dict[str, Any] = {n: Shape((r, statistics), FLOAT64) for n, r in rows.items()} | {"y": x, "dx": x}
        found["dparams"] = (Shape((lay.channels,), dtypes.statistic(np.dtype(x.dtype))),) * 2
        if wants_dz and self._engine.relu:
            found["dz"] = x
        if "state" in given:
            found["new_state"] = tuple(map(_like, given["state"]))
        return {n: found[n] for n in names_of(name) if n in WRITES[name] and n in found}


def _like(array: Any) -> Any:
    return Shape(array.shape, array.dtype)


def _fake(array: Any, shape: Sizes) -> np.ndarray:
    """An array for a plan to look at, without memory: dense, or one that repeats its values to get this shape."""
    dtype = np.dtype(array.dtype)
    own = as_strided(np.empty(1, dtype), array.shape, contiguous_strides(array.shape, dtype.itemsize))
    return own if array.shape == shape else np.broadcast_to(own, shape)


def _attributes(plan: Plan, fakes: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the handler has to know of a plan: the grid, and how the views lie that may repeat their values."""
    attributes, shape = {"grid": np.array(plan.schedule.grid, np.int64)}, plan.schedule.shape
    if any(name in fakes for name in STRIDED):
        strides = np.zeros((len(STRIDED), 4), np.int64)
        for i, name in enumerate(STRIDED):
            if name in fakes:
                known = plan.strides[name]
                dense = contiguous_strides(shape, fakes[name].itemsize)
                strides[i, : len(shape)] = dense if known is None else known[: len(shape)]
        attributes["strides"] = strides.ravel()
    return attributes
