"""tf.compat.v1.keras.layers: the V1 layer, whose moving statistics change when its recorded updates are run."""

import contextlib
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from nbbn.arrays import Array
from nbbn.call.operands import as_input
from nbbn.core.options import Numbers
from nbbn.layer.layer import BatchNormalization as BatchNormalizationV2
from nbbn.runtime import StateLock
from nbbn.state.variables import PARTS, Variables


class Update:
    """One recorded update of moving statistics, by the batch of the call that recorded it.

    run(), or calling it, applies it once; running it again does nothing.
    """

    def __init__(self, name: str, inputs: Any, apply: Callable[[], None]) -> None:
        self.name = name
        self.done = False
        self._lock = StateLock()
        self._apply = apply
        self._inputs: Callable[[], Any] = lambda: None
        with contextlib.suppress(TypeError):  # a list has no weak references
            self._inputs = weakref.ref(inputs)

    def run(self) -> None:
        with self._lock:
            first, self.done = not self.done, True
        if first:
            self._apply()

    __call__ = run

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
        self._recording = StateLock()

    @property
    def updates(self) -> list[Update]:
        """The recorded updates that have not been run."""
        with self._recording:
            self._updates = [u for u in self._updates if not u.done]
            return list(self._updates)

    def get_updates_for(self, inputs: Any) -> list[Update]:
        """Those that calling the layer on `inputs` has recorded; none is independent of inputs, which None asks for."""
        return [u for u in self.updates if inputs is not None and u._inputs() is inputs]

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without recorded updates: those belong to this layer's variables."""
        return {**super().__getstate__(), "_updates": []}

    def _update(
        self, variables: Variables, new_state: Array, saved: Array, inputs: Any, numbers: Numbers | None
    ) -> None:
        """Record the updates. What they do with the batch's moments depends on the statistics when they are run."""
        if not self.trainable:
            return
        rank, dtype = variables.shapes.rank, self.options.dtype or as_input(inputs).dtype

        def keep(part: str) -> None:
            with variables.lock:
                state, _, _ = self._dispatcher.finish(
                    saved, variables.params, variables.state, rank=rank, dtype=dtype, numbers=numbers
                )
                variables.keep_part(state, part)

        for part in PARTS:
            self._add_update(Update(f"{self._update_prefix}/moving_{part}/update", inputs, partial(keep, part)))

    @property
    def _update_prefix(self) -> str:
        return self.name

    def _add_update(self, update: Update) -> None:
        with self._recording:
            self._updates.append(update)
