"""The face of a machine that runs the stages: the Dispatcher on NumPy arrays, with every choice made by hand."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nbbn import Dispatcher, Force, Options
from nbbn.engine.base import Engine, Operands

Array = NDArray[Any]


class HostMemory:
    """Where a target's arrays lie during a call: those of the CPU where they are."""

    def view(self, array: Array) -> Any:
        """The array for the Dispatcher: same strides, same alignment, same neighbours."""
        return array

    def fetch(self, found: Any, out: Array | None = None) -> Array:
        """A result on the host. out: the array of the host that it was to be written to."""
        return found


class Exchange(Protocol):
    """What stands between the stages: other parts of a batch. Both methods get and return float64 Arrays."""

    def merge(self, moments: Any) -> Any:
        """The moments of all that take part, from those of this input."""

    def add(self, sums: Any) -> Any:
        """The sums of the gradient of all that take part."""


class Target:
    """The Dispatcher with every choice made by hand.

    thresholds: those of the engine that differ from its own. exchange: runs training stage by stage.
    """

    kind: str
    memory: type[Any] = HostMemory

    def __init__(
        self,
        options: dict[str, Any],
        schedule: str | None = None,
        parallel: bool | None = None,
        one_pass: bool | None = None,
        thresholds: Mapping[str, Any] | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        force = self.force(schedule, parallel, one_pass, thresholds or {})
        self.dispatcher = Dispatcher(Options(**options), force)
        self.exchange = exchange

    def force(
        self, schedule: str | None, parallel: bool | None, one_pass: bool | None, thresholds: Mapping[str, Any]
    ) -> Force:
        """These choices, as far as the target has them."""
        return Force(schedule, parallel, one_pass, thresholds)

    @property
    def engine(self) -> Engine:
        return self.dispatcher.engine(self.memory().view(np.zeros(1)))

    def train(
        self,
        x: Array,
        params: Array,
        state: Array,
        out: Array | None = None,
        in_place: bool = False,
        **operands: Any,
    ) -> tuple[Array, Array, Array]:
        """y, the new state and saved; operands are residual, weights and adjustment (a pair)."""
        memory = self.memory()
        beside, target = _operands(memory, **operands), _view(memory, out)
        x, params, given = map(memory.view, (x, params, state))
        if self.exchange is None:
            y, new_state, saved = self.dispatcher.train(x, params, given, beside, out=target, in_place=in_place)
        else:
            moments = self.exchange.merge(self.dispatcher.reduce(x, beside.weights))
            like = {"rank": x.ndim, "dtype": x.dtype, "adjusted": beside.adjusted}
            new_state, saved, coefficients = self.dispatcher.finish(moments, params, given, **like)
            y = self.dispatcher.apply(x, coefficients, beside, out=target)
        return memory.fetch(y, out), memory.fetch(new_state, state if in_place else None), memory.fetch(saved)

    def infer(
        self, x: Array, params: Array, state: Array, residual: Array | None = None, out: Array | None = None
    ) -> Array:
        """y."""
        memory = self.memory()
        options = {"residual": _view(memory, residual), "out": _view(memory, out)}
        return memory.fetch(self.dispatcher.infer(*map(memory.view, (x, params, state)), **options), out)

    def backward(
        self, dy: Array, x: Array, saved: Array, out: Array | None = None, training: bool = True, **operands: Any
    ) -> tuple[Array, Array, Array]:
        """dx, the gradients of gamma and beta as one (2, C) array, and what the activation lets through of dy."""
        memory = self.memory()
        beside, target = _operands(memory, **operands), {"out": _view(memory, out), "wants_dz": True}
        dy, x, saved = map(memory.view, (dy, x, saved))
        if self.exchange is None or not training:
            dx, dparams, dz = self.dispatcher.backward(dy, x, saved, beside, training=training, **target)
        else:
            sums, dparams = self.dispatcher.reduce_gradient(dy, x, saved, beside)
            dx, dz = self.dispatcher.apply_gradient(dy, x, saved, self.exchange.add(sums), beside, **target)
        return memory.fetch(dx, out), memory.fetch(dparams), memory.fetch(dz)

    def freeze(self, params: Array, state: Array) -> Array:
        """saved, for the gradient of inference."""
        memory = self.memory()
        return memory.fetch(self.dispatcher.freeze(*map(memory.view, (params, state))))

    def reduce(self, x: Array, weights: Array | None = None, training: bool = True) -> Array:
        """Count, mean and m2, (3, G * C)."""
        memory = self.memory()
        return memory.fetch(self.dispatcher.reduce(memory.view(x), _view(memory, weights), training=training))

    def finish(self, moments: Array, params: Array, state: Array, like: Array) -> tuple[Array, Array, Array]:
        """The new state, saved and the coefficients of the output. like: the input that the moments are of."""
        memory = self.memory()
        arrays = map(memory.view, (moments, params, state))
        new_state, saved, coefficients = self.dispatcher.finish(*arrays, rank=like.ndim, dtype=like.dtype)
        return memory.fetch(new_state), memory.fetch(saved), memory.fetch(coefficients)


def _view(memory: Any, array: Array | None) -> Any:
    return None if array is None else memory.view(array)


def _operands(
    memory: Any,
    residual: Array | None = None,
    weights: Array | None = None,
    adjustment: tuple[Array, Array] | None = None,
) -> Operands:
    return Operands(*[_view(memory, array) for array in (residual, weights, *(adjustment or (None, None)))])
