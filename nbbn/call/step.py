"""A training call in two halves, between which the statistics of all that share them are merged."""

from typing import Any

import numpy as np

from nbbn.arrays import Array, beside, giver, place_of
from nbbn.call.gradients import Gradients, Pullback, Record
from nbbn.call.preparation import prepare
from nbbn.core.options import boolean
from nbbn.engine.cpu.moments import add_sums, merge_moments
from nbbn.kernels.channel import MOMENT_ROWS

Host = np.ndarray


class TrainingStep:
    """What `start()` of a layer returns: a training call that waits for the statistics of others.

    `message` has the moments of this input: count, mean, m2 and sum of squared weights, (4 * groups * C,) float64, on
    the host. Whoever has the messages of all that take part, one in each row, in the same order everywhere, calls
    `finish(gathered)`. The gradient goes the same way: `pull(dy)` returns a message, with the sums of this input, and
    `pulled(gathered)` goes on with those of all.

    Nothing of the layer changes before `finish()`, which updates its moving statistics.
    """

    shared: tuple[Any, int] | None = None  # as in Record

    def __init__(
        self, layer: Any, inputs: Any, mask: Any, update: Any, out: Any, residual: Any, keep: bool = True
    ) -> None:
        self._layer, self._inputs, self._out = layer, inputs, out
        self.builds = layer._variables is None  # whether it is the first that the layer gets
        self.updates = boolean("update_statistics", update)
        self.prepared = prepare(layer, inputs, True, mask, out, residual, keep)
        operands = self.prepared.operands
        self.reduced: Array = layer._dispatcher.reduce(self.prepared.x, operands.weights, lengths=operands.lengths)
        self.record: Record | None = None
        self._pullback: Pullback | None = None

    @property
    def moments(self) -> Host:
        """(4, groups * C)."""
        return place_of(self.reduced).to_host(self.reduced)

    @property
    def message(self) -> Host:
        return self.moments.ravel()

    def finish(self, gathered: Any) -> Any:
        """The output.

        Args:
            gathered: (parts, 4 * groups * C) float64, the messages of all, this one's among them, in the order in which
                they are merged. An empty input takes any number of groups.
        Raises: TypeError, ValueError if that is something else; RuntimeError if the step is finished. The layer is then
            as it was.
        """
        return self.complete(merge_moments(self._parts(gathered, MOMENT_ROWS)))

    def complete(self, moments: Array) -> Any:
        """The output, of the moments (4, groups * C) of all, on the host or where the input is."""
        if self.record is not None:
            raise RuntimeError("this step is finished: it is one training call")
        layer, (x, target, operands, dtype, numbers, variables) = self._layer, self.prepared
        place, dispatcher = place_of(x), layer._dispatcher
        with variables.lock:
            new_state, saved, coefficients = dispatcher.finish(
                beside(moments, x),
                variables.params,
                variables.state,
                rank=x.ndim,
                dtype=x.dtype,
                adjusted=operands.adjusted,
                numbers=numbers,
            )
            y = dispatcher.apply(x, coefficients, operands, out=target)
            if self.updates and layer._collector is None:
                layer._update(variables, new_state, saved, self._inputs, numbers)
            elif self.updates:
                layer._collector.take(layer, saved, x, numbers)
        give = giver(self._inputs)
        self.record = Record(x, saved, True, operands, dtype, variables, shared=self.shared, give=give)
        if self._out is not None:
            return self._out
        return place.give(y) if give is None else give(y)

    def pull(self, dy: Any, out: Any = None) -> Host:
        """The message of the gradient: the sums of this input, (2 * groups * C,) float64, with an adjustment (4 * …).

        Args:
            dy: the gradient of the output. out: where pulled() writes the gradient of the input.
        Raises: TypeError, ValueError as a pullback; RuntimeError before finish().
        """
        if self.record is None:
            raise RuntimeError("pull() needs finish() first")
        self._pullback = Pullback(self._layer._dispatcher, self.record, dy, out)
        return self._pullback.sums.ravel()

    def pulled(self, gathered: Any) -> Gradients:
        """The gradients. Those of gamma and beta are of this input alone, as an optimizer expects that adds them up.

        Args:
            gathered: the messages of all, as for finish().
        Raises: TypeError, ValueError if that is something else; RuntimeError before pull().
        """
        if self._pullback is None:
            raise RuntimeError("pulled() needs pull(dy) first")
        sums = add_sums(self._parts(gathered, self._pullback.reduced.shape[0]))
        return self._pullback.finish(sums, self._layer.scale, self._layer.center)

    def _parts(self, gathered: Any, rows: int) -> Host:
        """(parts, rows, S) of messages. Raises: TypeError, ValueError for what is none."""
        found = np.asarray(gathered)
        if found.dtype != np.float64:
            raise TypeError(f"gathered must have dtype float64; received {found.dtype.name}")
        channels, own = self.prepared.variables.params.shape[1], rows * self.reduced.shape[1]
        unknown = own == 0 and channels > 0  # of an empty virtual batch
        fits = found.ndim == 2 and len(found) > 0 and (unknown or found.shape[1] == own)
        if not fits or found.shape[1] % (rows * max(channels, 1)):
            size = f"a multiple of {rows * channels}" if unknown else own
            raise ValueError(f"gathered must have shape (parts, {size}), a message in each row; received {found.shape}")
        return found.reshape(len(found), rows, -1)
