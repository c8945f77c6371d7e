"""The engine's steps as operations of a JAX program.

Shapes are known while a program is traced, so the copies that a step needs are a part of the program. Most steps are
operations that each platform runs by its own kernels (primitive.py). Those on parts of a batch call back into Python,
as all do where the foreign function interface is not wanted.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from nbbn.core import dtypes
from nbbn.core.layout import Layout
from nbbn.engine.base import Copied, canonical_view
from nbbn.engine.cpu.moments import merge_moments
from nbbn.engine.dispatcher import Dispatcher
from nbbn.jax.crossing import FLOAT64, call_back
from nbbn.jax.primitive import call
from nbbn.jax.work import Arrays, Shape, Work, is_view, views_without_memory
from nbbn.kernels.channel import GRADIENT_ROWS, MOMENT_ROWS, OUTPUT_ROWS, SAVED_ROWS
from nbbn.kernels.cpu.compiling import WRITES, names_of
from nbbn.runtime import PLAIN


class Steps:
    """The steps of one set of options. ffi: through the foreign function interface, where that can be.

    Every step takes its arrays by the names of the kernels' arguments (kernels/cpu/compiling.py), and returns those
    that it writes. What is None is not there.
    """

    def __init__(self, dispatcher: Dispatcher, ffi: bool) -> None:
        self.dispatcher, self._ffi = dispatcher, ffi and not PLAIN

    def run(self, name: str, lay: Layout, arrays: Arrays, wants_dz: bool = False) -> dict[str, Any]:
        """A step on arrays of the input's shape, `x` among them. Weights, a and b broadcast against it."""
        given = {n: arrays[n] for n in names_of(name) if arrays.get(n) is not None}
        made = self._made(name, lay, given, wants_dz)
        if self._ffi and not lay.parts:
            copied = canonical_view(lay, views_without_memory({**given, **made}, given["x"].shape)).copied
            if copied is not None:
                return self._run_on_copies(name, lay, copied, given, wants_dz)
            return call(Work(name, self.dispatcher, lay), given, made)

        def on_host(read: dict[str, Any], written: dict[str, Any]) -> None:
            self.dispatcher.engine(read["x"])._run(Work(name, self.dispatcher, lay).step(read | written))

        return call_back(on_host, given, made)

    def _run_on_copies(self, name: str, lay: Layout, copied: Copied, given: Arrays, wants_dz: bool) -> dict[str, Any]:
        """The same in an order of dimensions that has a canonical view."""
        shape, back = given["x"].shape, np.argsort(copied.order).tolist()

        def copy(array: Any) -> Any:
            return jnp.transpose(jnp.broadcast_to(array, shape).reshape(lay.sizes), copied.order)

        copies = {n: copy(a) if is_view(n) else a for n, a in given.items()}
        made = self.run(name, copied.lay, copies, wants_dz)
        return {n: jnp.transpose(a, back).reshape(shape) if is_view(n) else a for n, a in made.items()}

    def finish(self, arrays: Arrays, adjusted: bool, common: frozenset[Any] = frozenset()) -> dict[str, Any]:
        """The middle stage: of moments, params, state and hyper. common: the axes that share these moments."""
        (gamma, _), state, statistics = arrays["params"], arrays["state"], arrays["moments"].shape[1]
        made = {
            "new_state": tuple(map(_like, state)),
            "saved": Shape((SAVED_ROWS, statistics), FLOAT64),
            "coefficients": Shape((OUTPUT_ROWS[adjusted], statistics), gamma.dtype),
        }
        if self._ffi:
            return call(Work("finish", self.dispatcher, adjusted=adjusted), arrays, made, common)

        def on_host(read: dict[str, Any], written: dict[str, Any]) -> None:
            self.dispatcher.engine(read["moments"])._run_middle("finish", read | written, adjusted)

        return call_back(on_host, arrays, made, common)

    def merge(self, parts: Any) -> Any:
        """The moments of several inputs together; parts: (P, 4, S), as they cross."""
        made = {"moments": Shape((MOMENT_ROWS, parts.shape[2]), FLOAT64)}
        if self._ffi:
            return call(Work("merge", self.dispatcher), {"parts": parts}, made)["moments"]

        def on_host(read: dict[str, Any], written: dict[str, Any]) -> None:
            written["moments"][...] = merge_moments(read["parts"])

        return call_back(on_host, {"parts": parts}, made)["moments"]

    def _made(self, name: str, lay: Layout, given: Arrays, wants_dz: bool) -> dict[str, Any]:
        """The shapes of what a step writes."""
        x, statistics = _like(given["x"]), lay.statistics
        rows = {"moments": MOMENT_ROWS, "saved": SAVED_ROWS, "sums": GRADIENT_ROWS["a" in given]}
        found: dict[str, Any] = {n: Shape((r, statistics), FLOAT64) for n, r in rows.items()} | {"y": x, "dx": x}
        found["dparams"] = (Shape((lay.channels,), dtypes.statistic(np.dtype(x.dtype))),) * 2
        if wants_dz and self.dispatcher.options.activation is not None:
            found["dz"] = x
        if "state" in given:
            found["new_state"] = tuple(map(_like, given["state"]))
        return {n: found[n] for n in names_of(name) if n in WRITES[name] and n in found}


def _like(array: Any) -> Any:
    return Shape(array.shape, array.dtype)
