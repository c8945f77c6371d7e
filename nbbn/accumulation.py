"""Several training calls that count as one batch."""

from collections.abc import Hashable, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from nbbn.arrays import Array, place_of
from nbbn.call.collector import attach, detach
from nbbn.call.gradients import Gradients
from nbbn.call.step import Host, TrainingStep
from nbbn.core.options import Numbers
from nbbn.engine.cpu.moments import add_sums, merge_moments
from nbbn.kernels.channel import MOMENT_ROWS
from nbbn.layer.layer import BatchNormalization, as_layers

_Taken = tuple[Array, int, np.dtype, Numbers | None]  # saved of a call, rank and dtype of its input, its numbers


class MicroBatch:
    """One of several inputs that are normalized with the statistics of all of them; see Accumulation.start()."""

    def __init__(self, batch: "Accumulation", step: TrainingStep) -> None:
        self._batch, self._step, self._has_pulled = batch, step, False

    def finish(self) -> Any:
        """The output.

        Raises: RuntimeError if it was asked for before, or if no output is possible after an error; with a group
            SyncError as a call of the layer. All micro-batches have to start again then.
        """
        if self._step not in self._batch._started:
            raise RuntimeError("finish() is not possible after an error: all micro-batches have to start() again")
        moments = self._batch._moments()
        self._step.updates = self._batch._started[0] is self._step  # they have the same moments: one stands for all
        return self._step.complete(moments)

    def pull(self, dy: Any, out: Any = None) -> None:
        """Take the gradient of the output. out: where pulled() writes the gradient of the input.

        Raises: TypeError, ValueError as a pullback, with a group SyncError; RuntimeError before finish(), or if there
            was a pull() before.
        """
        if self._has_pulled:
            raise RuntimeError("pull() of a micro-batch is called once: its sums are among those of all")
        record = self._step.record
        try:
            sums = self._step.pull(dy, out)
        except Exception as cause:
            if record is not None:
                self._batch._layers[0]._shared_sums(record, None, cause)  # raises where others wait for a message
            raise
        self._batch._sums.append(sums)
        self._has_pulled = True

    def pulled(self) -> Gradients:
        """The gradients; those of gamma and beta are of this input alone, to be added up over all.

        Raises: RuntimeError unless all inputs have had their pull().
        """
        missing = len(self._batch._started) - len(self._batch._sums)
        if missing:
            raise RuntimeError(f"pulled() needs pull(dy) of all micro-batches first; {missing} are missing")
        return self._step.pulled(self._batch._all_sums())


class Accumulation:
    """What accumulate() returns."""

    def __init__(self, layers: Sequence[BatchNormalization]) -> None:
        self._layers, self._has_begun = layers, False
        self._token: Hashable = None
        self._seen: set[tuple[BatchNormalization, Hashable]] = set()
        self._taken: dict[BatchNormalization, list[_Taken]] = {layer: [] for layer in layers}
        self._started: list[TrainingStep] = []
        self._started_tokens: set[Hashable] = set()
        self._sums: list[Host] = []
        self._merged: Host | None = None
        self._total: Host | None = None

    def __enter__(self) -> Self:
        if self._has_begun:
            raise RuntimeError("accumulate() is for one batch: call it again for the next one")
        attach(self, self._layers)
        self._has_begun = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: TracebackType | None) -> None:
        detach(self._layers)
        if kind is None:
            for layer, taken in self._taken.items():
                if taken:
                    self._update(layer, taken)

    def micro_batch(self, token: Hashable) -> None:
        """Say which micro-batch the next calls are of. A second call of a layer for the same one does not count: so a
        forward pass may be repeated, as activation checkpointing does, before the next token.

        Args:
            token: a number, a text, or another hashable object; None counts every call.
        Raises: TypeError for what is not hashable.
        """
        if not isinstance(token, Hashable):
            raise TypeError(f"token must be hashable, as a number is; received {token!r}")
        self._token = token

    def start(
        self, inputs: Any, mask: Any = None, out: Any = None, residual: Any = None, lengths: Any = None
    ) -> MicroBatch:
        """Take one of the inputs that are to be normalized with the statistics of all of them.

        When all have started, `finish()` of each returns its output. Their gradients need the sums of all, too:
        `pull(dy)` of each, and then `pulled()` of each. With a group, each rank starts one at least: a rank without
        data an empty one, `start(x[:0])`.

        Raises: TypeError, ValueError as a call of the layer, with a group SyncError, on all ranks; ValueError for
            several layers, or virtual batches, which have statistics of their own; RuntimeError when one has finished,
            or for a micro-batch that has started.
        """
        if len(self._layers) != 1 or self._layers[0].virtual_batch_size is not None:
            raise ValueError("start() is for one layer without virtual batches: others are called as usual")
        if self._merged is not None:
            raise RuntimeError("start() of all micro-batches comes before the first finish()")
        try:
            if self._token is not None and self._token in self._started_tokens:
                raise RuntimeError(f"start() of micro-batch {self._token!r} was called before: it would count twice")
            step = self._layers[0].start(inputs, mask, True, out, residual, lengths)
        except Exception as cause:
            self._share(None, cause)  # raises where others wait for a message
            raise
        self._started.append(step)
        self._started_tokens.add(self._token)
        return MicroBatch(self, step)

    def _moments(self) -> Host:
        """Of all inputs that have started, and of those of other ranks."""
        if self._merged is None:
            self._merged = self._share(merge_moments(np.stack([step.moments for step in self._started])))
        assert self._merged is not None  # as their own are
        return self._merged

    def _share(self, own: Host | None, cause: Exception | None = None) -> Host | None:
        try:
            return self._layers[0]._shared_moments(self._started, own, cause)
        except BaseException:  # the layer may be unbuilt again: none of these can go on
            self._started, self._started_tokens = [], set()
            raise

    def _all_sums(self) -> Host:
        """Those of the gradient, likewise, as one message."""
        if self._total is None:
            record = self._started[0].record
            assert record is not None  # pull() has seen to it
            own = add_sums(np.stack(self._sums)).reshape(-1, self._started[0].moments.shape[1])
            total = self._layers[0]._shared_sums(record, own)
            assert total is not None  # as its own are
            self._total = total.reshape(1, -1)
        return self._total

    def wants(self, layer: BatchNormalization) -> bool:
        return self._token is None or (layer, self._token) not in self._seen

    def take(self, layer: BatchNormalization, saved: Array, x: Array, numbers: Numbers | None) -> None:
        if self.wants(layer):
            self._seen.add((layer, self._token))
            self._taken[layer].append((saved, x.ndim, x.dtype, numbers))

    def _update(self, layer: BatchNormalization, taken: Sequence[_Taken]) -> None:
        """One update of the moving statistics, of all that was taken, with the numbers of the first call."""
        _, rank, dtype, numbers = taken[0]
        parts = [place_of(saved).to_host(saved)[:MOMENT_ROWS] for saved, _, _, _ in taken]
        virtual = layer.virtual_batch_size is not None
        moments = np.concatenate(parts, axis=1) if virtual else merge_moments(np.stack(parts))
        variables = layer._built_variables("accumulate()")
        with variables.lock:
            there = variables.place.send(moments)
            new_state, saved, _ = layer._dispatcher.finish(
                there, variables.params, variables.state, rank=rank, dtype=dtype, numbers=numbers
            )
            gone = np.empty((0,) * rank, dtype)  # what all inputs are
            layer._update(variables, new_state, saved, gone, numbers)


def accumulate(layers: BatchNormalization | Sequence[BatchNormalization]) -> Accumulation:
    """Let several training calls count as one batch: gradient accumulation with the batch size that is meant.

        with nbbn.accumulate(layers) as batch:
            for i, (x, dy) in enumerate(micro_batches):
                batch.micro_batch(i)
                y, pullback = layer.vjp(x, training=True)
                ...

    Each call is normalized with its own statistics. The moving statistics stay as they are until the end, and then have
    one update with the statistics of all values together: as of one call, with one step of the momentum, not one for
    each. After an exception there is no update.

    With `batch.start(x)` in the place of a call, one layer's outputs and gradients are those of the whole batch, too:

        with nbbn.accumulate(layer) as batch:
            parts = [batch.start(x) for x in inputs]
            outputs = [part.finish() for part in parts]
            for part, dy in zip(parts, gradients_of_outputs):
                part.pull(dy)
            gradients = [part.pulled() for part in parts]

    Args:
        layers: one layer, or those of a network. Virtual batches are what they are in each call, and all of them make
            the update.
    Raises: TypeError for what is no layer; RuntimeError at the beginning if a layer is in another accumulate(), or if
        this one has been used.
    """
    return Accumulation(list(dict.fromkeys(as_layers(layers))))
