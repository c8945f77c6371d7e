"""tf.compat.v1.keras.layers: the V1 layer, whose moving statistics change when its recorded updates are run."""

import contextlib
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from nbbn import rules
from nbbn.kernels.cpu import channel
from nbbn.layers import BatchNormalization as BatchNormalizationV2
from nbbn.layers import Residuals
from nbbn.variables import Array, Variables


class Update:
    """One recorded update of moving statistics, by the batch of the call that recorded it.

    run(), or calling it, applies it once; running it again does nothing.
    """

    def __init__(self, name: str, inputs: Any, apply: Callable[[], None]) -> None:
        self.name = name
        self.done = False
        self._apply = apply
        self._inputs: Callable[[], Any] = lambda: None
        with contextlib.suppress(TypeError):  # a list has no weak references
            self._inputs = weakref.ref(inputs)

    def run(self) -> None:
        if not self.done:
            self.done = True
            self._apply()

    __call__ = run

    def belongs_to(self, inputs: Any) -> bool:
        return inputs is not None and self._inputs() is inputs

    def __repr__(self) -> str:
        return f"<Update {self.name}{', done' if self.done else ''}>"


class BatchNormalization(BatchNormalizationV2):
    """nbbn.BatchNormalization with the behaviour of TensorFlow 1.

    A training call records two updates, of the mean and of the variance, in `updates`; they take effect when they
    are run. A layer that is not trainable normalizes with the batch in training and records none. fused=True is used
    where it is possible and has no effect elsewhere.
    """

    _STRICT_FUSED = False
    _FREEZES = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._updates: list[Update] = []

    @property
    def updates(self) -> list[Update]:
        """The recorded updates that have not been run."""
        self._updates = [u for u in self._updates if not u.done]
        return list(self._updates)

    def get_updates_for(self, inputs: Any) -> list[Update]:
        """Those that calling the layer on `inputs` has recorded; none is independent of inputs, which None asks for."""
        return [u for u in self.updates if u.belongs_to(inputs)]

    def _hyper(self, x: Array) -> Array:
        """With a momentum of 0 the new state of a training step is the batch's own statistics, ready to be recorded."""
        hyper = super()._hyper(x)
        hyper[[channel.MOMENTUM, channel.RENORM_MOMENTUM]] = 0
        return hyper

    def _forward(
        self, inputs: Any, training: bool | None, mask: Any, update: bool, out: Array | None
    ) -> tuple[Array, Residuals]:
        y, residuals = super()._forward(inputs, training, mask, False, out)
        if residuals.new_state is not None and residuals.saved is not None and update and self.trainable and y.size:
            counted = residuals.saved[channel.COUNT].reshape(-1, residuals.params.shape[1]).any(axis=0)
            self._record(inputs, residuals.new_state, counted)
        return y, residuals

    def _record(self, inputs: Any, batch: Array, counted: Array) -> None:
        variables = self._built_variables("recording an update")
        for name, update in (("moving_mean", self._update_mean), ("moving_variance", self._update_variance)):
            self._add_update(Update(f"{self.name}/{name}/update", inputs, partial(update, variables, batch, counted)))

    def _add_update(self, update: Update) -> None:
        self._updates.append(update)

    def _update_mean(self, variables: Variables, batch: Array, counted: Array) -> None:
        with variables.lock:
            state = variables.state.copy()
            self._average(variables, state, batch, counted, channel.MEAN, channel.RENORM_MEAN)
            variables.state = state

    def _update_variance(self, variables: Variables, batch: Array, counted: Array) -> None:
        with variables.lock:
            state = variables.state.copy()
            if self.renorm:
                self._average(variables, state, batch, counted, channel.STDDEV, channel.RENORM_STDDEV)
                sigma = state[channel.STDDEV].astype(np.float64)
                state[channel.VARIANCE] = np.maximum(sigma * sigma - self.epsilon, 0)
            else:
                self._average(variables, state, batch, counted, channel.VARIANCE)
            variables.state = state
            variables.training_calls += 1

    def _average(
        self,
        variables: Variables,
        state: Array,
        batch: Array,
        counted: Array,
        moving: int,
        renorm: int | None = None,
    ) -> None:
        """Blend the batch's statistics into the rows `moving` and, with renorm, `renorm` of `state`."""
        calls = variables.training_calls
        momentum = calls / (calls + 1) if self.momentum is None else self.momentum
        for row, weight in ((moving, momentum), (renorm, self.renorm_momentum)):
            if row is not None and row < len(state):
                old, new = (rows[row, counted].astype(np.float64) for rows in (state, batch))
                state[row, counted] = rules.moving_average(old, new, weight)
