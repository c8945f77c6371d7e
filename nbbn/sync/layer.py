"""The layer whose batch is those of all ranks of a group together."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from nbbn.arrays import Array
from nbbn.call.gradients import Gradients, Pullback, Record
from nbbn.call.step import TrainingStep
from nbbn.engine.dispatcher import Dispatcher
from nbbn.layer.layer import BatchNormalization
from nbbn.sync.exchange import Exchange, Lost
from nbbn.sync.group import Group, check_group
from nbbn.sync.header import AGAIN, BACKWARD, LATER, NEVER, NOW, Header, input_header, training_header

Half = TypeVar("Half")


class SyncBatchNormalization(BatchNormalization):
    """BatchNormalization with the statistics of all ranks of a group: of processes, or of threads.

    A training call is one of all ranks, and so is each pullback: every rank makes as many calls of a layer, in the same
    order. All get the same moving statistics, to the bit, if they had the same before. Every value counts the same, on
    whatever rank it is. A rank without data takes part with an empty batch, `layer(x[:0], training=True)`. Inference,
    and a layer that is not trainable, do without the others.

    The gradient of the input is that of the sum of all ranks' losses; the gradients of gamma and beta are of this
    rank's own batch, to be added up over the ranks, as optimizers do with those of all other weights.

    In a virtual batch, group g of all ranks is one group: all have as many groups, which makes it one layer of
    `virtual_batch_size` times the number of ranks. An adjustment is called on each rank for its own input.

    Args:
        group: what nbbn.sync.mpi(), .torch() or .threads() returns, or any object like it, see nbbn.sync.Group. Layers
            of a group are made in the same order on all ranks. None: this process alone. May be set as an attribute. A
            copy of a layer, by pickle or deepcopy, has lost its group: a training call raises SyncError until it is
            set. Configs and files have none: from_config() and load() take it as an argument, or make a plain layer.
        fused: False or None, as in Keras: the moving variance is the biased one unless bessel_correction is True.
        synchronized: Keras's, of which this is the layer: True or None.
        All other arguments are those of BatchNormalization.

    Raises: ValueError for fused=True, synchronized=False; in a training call or a pullback SyncError, on all ranks, if
        one of them gets bad input, if they do not make the same call (another number of channels, dtype, epsilon,
        momentum, …), or if one does not come. The layers are then as they were, and, unless ranks are lost, the next
        call works.
    """

    _AUTO_NAME = "sync_batch_normalization"
    _SYNCHRONIZED = True

    def __init__(self, *args: Any, group: Group | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.options.fused:
            raise ValueError("fused must be False or None: no fused kernel synchronizes; received True")
        self._dispatcher = Dispatcher(replace(self.options, fused=False))
        self._exchange: Exchange | Lost | None = None
        self.group = group

    @property
    def _in_halves(self) -> bool:
        return self._exchange is not None

    @property
    def _left_out(self) -> list[str]:
        return [*super()._left_out, *(["group"] if self._exchange is not None else [])]

    @property
    def group(self) -> Group | None:
        """Whose statistics are shared; None: nobody's."""
        return None if self._exchange is None else self._exchange.group

    @group.setter
    def group(self, group: Group | None) -> None:
        if group is None:
            self._exchange = None
            return
        check_group(group)
        self._exchange = Exchange(group)

    def _forward(
        self, inputs: Any, training: bool | None, mask: Any, update: bool, out: Any, residual: Any, keep: bool
    ) -> tuple[Any, Record | None]:
        exchange, step, batch, cause = self._exchange, None, None, None
        if exchange is not None:
            batch, cause = _first_half(lambda: self._uses_batch(training))
        if exchange is None or batch is False:
            return super()._forward(inputs, training, mask, update, out, residual, keep)
        with exchange.lock:
            unbuilt = self._variables is None
            if batch:
                step, cause = _first_half(lambda: TrainingStep(self, inputs, mask, update, out, residual, keep))
            steps, own = ([], None) if step is None else ([step], step.reduced)
            moments = self._all_moments(exchange, steps, own, cause, unbuilt)
            assert step is not None  # or the line above has raised
            y = step.complete(moments)
            exchange.calls += 1  # a rank that cannot complete is left behind, and all will be told so
            return y, step.record

    def _gradients(self, record: Record, dy: Any, out: Any) -> Gradients:
        if record.shared is None:
            return super()._gradients(record, dy, out)
        pullback, cause = _first_half(lambda: Pullback(self._dispatcher, record, dy, out))
        sums = self._all_sums(record, None if pullback is None else pullback.reduced, cause)
        assert pullback is not None  # as above
        return pullback.finish(sums, self.scale, self.center)

    def _shared_moments(
        self, steps: Sequence[TrainingStep], own: Array | None, cause: Exception | None = None
    ) -> Array | None:
        exchange = self._exchange
        if exchange is None:
            return own
        with exchange.lock:
            moments = self._all_moments(exchange, steps, own, cause, any(step.builds for step in steps))
            exchange.calls += 1
            return moments

    def _shared_sums(self, record: Record, own: Array | None, cause: Exception | None = None) -> Array | None:
        return own if record.shared is None else self._all_sums(record, own, cause)

    def _all_moments(
        self,
        exchange: Exchange | Lost,
        steps: Sequence[TrainingStep],
        own: Array | None,
        cause: Exception | None,
        unbuilt: bool,
    ) -> Array:
        """Those of all ranks. steps: one call. own: None where this rank cannot take part, because of `cause`. unbuilt:
        whether the layer was, before these steps. The lock is held."""
        call, header = exchange.calls + 1, Header()
        for step in steps:
            step.shared = exchange, call
        try:
            if own is not None:
                header = self._header(steps[0])
            return self._dispatcher.merge_moments(exchange.gather(header._replace(call=call), own, cause))
        except BaseException:
            if unbuilt:  # the steps have built it for inputs that need not be like those of the next call
                self._variables = None
            raise

    def _all_sums(self, record: Record, own: Array | None, cause: Exception | None = None) -> Array:
        """The sums of the gradient, likewise, of those who shared the statistics: the layer may have left them."""
        assert record.shared is not None
        exchange, call = record.shared
        with exchange.lock:
            header = input_header(self._dispatcher, record.x)._replace(stage=BACKWARD, call=call)
            return self._dispatcher.add_sums(exchange.gather(header, own, cause))

    def _update_of(self, step: TrainingStep) -> int:
        """Whether, and when, a call updates the moving statistics."""
        if not step.updates:
            return NEVER
        if self._collector is None:
            return NOW
        return LATER if self._collector.wants(self) else AGAIN

    def _header(self, step: TrainingStep) -> Header:
        x, _, operands, _, numbers, variables = step.prepared
        update = self._update_of(step)
        return training_header(self._dispatcher, x, numbers, operands.adjusted, variables.state, update)


def _first_half(start: Callable[[], Half]) -> tuple[Half | None, Exception | None]:
    """What a rank does by itself, or why it cannot: the others wait for a message either way."""
    try:
        return start(), None
    except Exception as cause:
        return None, cause
