"""The statistics of a whole data set in the place of moving averages."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from nbbn.arrays import Array, place_of
from nbbn.call.collector import attach, detach
from nbbn.core.options import Numbers, Options, boolean
from nbbn.engine.cpu.moments import merge_moments
from nbbn.engine.dispatcher import Dispatcher
from nbbn.kernels.channel import COUNT, MOMENT_ROWS
from nbbn.layer.layer import BatchNormalization, as_layers
from nbbn.runtime.progress import is_terminal
from nbbn.state.variables import COUNTS, Variables
from nbbn.sync.exchange import Exchange, Turns
from nbbn.sync.group import Group, check_group
from nbbn.sync.header import Header, checksum
from nbbn.sync.layer import SyncBatchNormalization

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
_UNSEEN = "no batch had values for {}: forward(batch) must call it with training=True"


class _Totals:
    """Collects what training calls would have updated. wanted: the layers that are measured.

    A total (4, 2 * C) has the moments of all values, and beside them, as the counts of further moments, how many calls
    had any. So whoever merges totals adds these up.
    """

    def __init__(self) -> None:
        self.wanted: Sequence[BatchNormalization] = ()
        self._found: dict[int, np.ndarray] = {}

    def wants(self, layer: BatchNormalization) -> bool:
        return layer in self.wanted

    def take(self, layer: BatchNormalization, saved: Array, x: Array, numbers: Numbers | None) -> None:
        if not self.wants(layer):
            return
        own, channels = place_of(saved).to_host(saved)[:MOMENT_ROWS], _channels(layer)
        if own.size == 0:  # virtual batches without a sample on any rank
            return
        moments = merge_moments(own.reshape(MOMENT_ROWS, -1, channels).swapaxes(0, 1))
        if layer.skip_nonfinite:
            moments[:, ~np.isfinite(moments).all(axis=0)] = 0
        calls = np.zeros_like(moments)
        calls[COUNT] = moments[COUNT] > 0
        total, before = np.concatenate([moments, calls], axis=1), self._found.get(id(layer))
        self._found[id(layer)] = total if before is None else merge_moments(np.stack([before, total]))

    def of(self, layer: BatchNormalization) -> np.ndarray:
        """Raises: ValueError if there is none, and nobody knows its size."""
        if layer._variables is None:
            raise ValueError(f"{_UNSEEN.format(layer.name)}; where there are no batches, build() it first")
        found = self._found.get(id(layer))
        return np.zeros((MOMENT_ROWS, 2 * _channels(layer))) if found is None else found


def _variables(layer: BatchNormalization) -> Variables:
    return layer._built_variables("population_statistics()")


def _channels(layer: BatchNormalization) -> int:
    return int(_variables(layer).params.shape[1])


@contextmanager
def _heard_by_all(exchange: Exchange | None) -> Iterator[None]:
    """An error of this rank is one of all: the others wait for a message either way."""
    try:
        yield
    except Exception as cause:
        if exchange is not None:
            exchange.gather(Header(), None, cause)
        raise


class _Population:
    """What population_statistics() does; each method is a part of it. The layers' calls are collected from now on."""

    def __init__(
        self,
        layers: Sequence[BatchNormalization],
        batches: Batches,
        forward: Callable[[Any], Any],
        exchange: Exchange | None,
    ) -> None:
        self._layers, self._batches, self._forward, self._exchange = layers, batches, forward, exchange
        self._totals = _Totals()
        self._before: list[tuple[BatchNormalization, Array]] = []  # states, to have them back
        attach(self._totals, layers)

    def run(self, passes: Sequence[Sequence[BatchNormalization]], bessel: bool) -> None:
        try:
            for layers in passes:
                self._totals.wanted = layers
                self._set(layers, self._all_totals(layers, (len(passes), bessel)), bessel)
        except BaseException:
            for layer, state in self._before:
                _keep(layer, state)
            raise
        finally:
            detach(self._layers)
            for layer in self._layers:
                layer._trainable = True
                layer.__dict__.pop("_FREEZES", None)

    def _all_totals(self, layers: Sequence[BatchNormalization], settings: Any) -> np.ndarray:
        """Of these layers side by side, (4, 2 * channels of all): what a pass over the data has, and of all ranks."""
        with _heard_by_all(self._exchange):
            own = self._own_totals(layers)
            options = [(o.axis, o.renorm, o.momentum is None, o.epsilon) for o in (x.options for x in layers)]
            sizes = [(_channels(layer), _variables(layer).dtype.name) for layer in layers]
            header = Header(channels=own.shape[1], groups=1, options=checksum(options, sizes, settings))
        return own if self._exchange is None else merge_moments(self._exchange.gather(header, own))

    def _own_totals(self, layers: Sequence[BatchNormalization]) -> np.ndarray:
        batches = self._batches
        if not isinstance(batches, Iterable):
            batches = batches()
            if not isinstance(batches, Iterable):
                raise TypeError(f"batches must be a callable that returns an iterable; it has returned {batches!r}")
        for batch in _with_progress(batches, ", ".join(layer.name for layer in layers)):
            self._forward(batch)
        return np.concatenate([self._totals.of(layer) for layer in layers], axis=1)

    def _set(self, layers: Sequence[BatchNormalization], totals: np.ndarray, bessel: bool) -> None:
        """Make them the layers' statistics, which are constants from now on."""
        ends = np.cumsum([2 * _channels(layer) for layer in layers])
        parts = np.split(totals, ends[:-1], axis=1)
        states = [_new_state(layer, part, bessel) for layer, part in zip(layers, parts, strict=True)]
        for layer, (old, new) in zip(layers, states, strict=True):
            self._before.append((layer, old))
            _keep(layer, new)
            layer._trainable, layer._FREEZES = False, True  # TensorFlow 1's do not freeze


def _new_state(layer: BatchNormalization, total: np.ndarray, bessel: bool) -> tuple[np.ndarray, np.ndarray]:
    """The old state and the new one, on the host: that of one step with momentum 0. A statistic without any value stays
    what it is. Raises: ValueError if that is so for all."""
    variables, channels = _variables(layer), _channels(layer)
    moments, calls = total[:, :channels], total[COUNT, channels:]
    if channels and not calls.any():
        raise ValueError(_UNSEEN.format(layer.name))
    old = np.array(variables.place.to_host(variables.state))
    params = variables.place.to_host(variables.params)
    averages = len(old) - sum(name in COUNTS for name in variables.rows)
    new, _, _ = Dispatcher(_copying(layer, bessel)).finish(
        moments, params, old[:averages], rank=variables.shapes.rank, dtype=variables.dtype
    )
    weight = calls if layer.options.momentum is None else 1  # with debias: that of averages without a beginning
    counts = np.where(calls > 0, weight, old[averages:])
    return old, np.concatenate([new, counts]).astype(old.dtype)


def _copying(layer: BatchNormalization, bessel: bool) -> Options:
    """The layer's options, but averages are those of the last batch. Raises: ValueError for renorm with bessel."""
    o = replace(layer.options, momentum=0.0, renorm_momentum=0.0, debias=False, bessel_correction=bessel)
    return replace(o, renorm_clipping=None)  # no average depends on clips, which may be callables


def _keep(layer: BatchNormalization, state: np.ndarray) -> None:
    variables = _variables(layer)
    with variables.lock:
        variables.keep(variables.place.from_host(state))


def _with_progress(batches: Iterable[Any], what: str) -> Iterator[Any]:
    """The batches, with a bar for whoever waits at a terminal, where tqdm is installed."""
    if is_terminal(sys.stderr):
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            batches = tqdm(batches, desc=what, unit=" batches", leave=False)
    return iter(batches)


def population_statistics(
    layers: BatchNormalization | Sequence[BatchNormalization],
    batches: Batches,
    forward: Callable[[Any], Any],
    *,
    sequential: bool = False,
    bessel_correction: bool = False,
    group: Group | None = None,
) -> None:
    """Set the moving statistics of layers to those of a whole data set: of all values together, exactly, not an average
    over batches ("Precise BN").

        nbbn.population_statistics([first, second], batches, lambda x: second(first(x, training=True), training=True))

    moving_mean and moving_variance become mean and variance of all values that the layer has got; with renorm
    renorm_mean is the mean, too, and moving_stddev and renorm_stddev are sqrt(variance + epsilon). With momentum=None
    seen_mean and seen_variance become the number of training calls: a later one counts as one more of them; with debias
    they become 1. The values of all virtual batches are one population. What a mask leaves out does not count. Nor,
    with skip_nonfinite, does a call whose mean or variance in a channel is NaN or infinite. Where nothing is left, a
    statistic stays as it was. gamma and beta do not change.

    In a network, what a layer gets depends on those before it. In one pass they normalize with the statistics of each
    batch, as in training; so the result depends on how large the batches are. With sequential=True there is one pass
    for each layer, in their order, in which those before it normalize with their new statistics, as they will in
    inference: the result does not depend on the batches, and is exact for the network that will run.

    Where somebody waits at a terminal, and tqdm is installed, there is a bar.

    Args:
        layers: one layer, or those of a network in the order of its calls; all trainable.
        batches: an iterable. With sequential=True and several layers it is read once for each, and so must be one that
            can be read again, or a callable that returns an iterable.
        forward: called with each batch. It calls the layers with training=True, masks and all.
        sequential: see above.
        bessel_correction: whether the variance is the unbiased one; whatever the layers do in training.
        group: of nbbn.sync, or any object like it: the data are those of all ranks. Each has the same layers, and as
            many batches as it likes; one without any has built layers. Layers that share statistics with a group of
            their own do so in each call already: this is None for them.
    Raises: TypeError, ValueError for arguments that are not possible, or a layer that gets no values; RuntimeError if a
        layer is in an accumulate() or population_statistics() already; with a group SyncError, on all ranks, in the
        place of all these; and what `batches` and `forward` raise. All layers are then as they were.
    """
    exchange = None
    if group is not None:
        check_group(group)
        exchange = Exchange(group, Turns())
    with _heard_by_all(exchange):
        found, one_by_one, bessel = _checked(layers, batches, forward, sequential, bessel_correction, group)
        population = _Population(found, batches, forward, exchange)
    population.run([[layer] for layer in found] if one_by_one else [found], bessel)


def _checked(
    layers: Any, batches: Any, forward: Any, sequential: Any, bessel_correction: Any, group: Group | None
) -> tuple[Sequence[BatchNormalization], bool, bool]:
    """The layers, whether each has a pass of its own, and bessel_correction. Raises: TypeError, ValueError."""
    found = list(dict.fromkeys(as_layers(layers)))
    if not found:
        raise ValueError("layers must be one layer or several; received none")
    if not (isinstance(batches, Iterable) or callable(batches)):
        raise TypeError(f"batches must be an iterable, or a callable that returns one; received {batches!r}")
    if not callable(forward):
        raise TypeError(f"forward must be a function of a batch; received {forward!r}")
    bessel = boolean("bessel_correction", bessel_correction)
    one_by_one = boolean("sequential", sequential) and len(found) > 1
    if one_by_one and isinstance(batches, Iterator):
        raise ValueError(
            "batches are read once for each layer with sequential=True: pass a callable that returns them, or what can "
            f"be read again; received {type(batches).__name__}"
        )
    for layer in found:
        _copying(layer, bessel)
        if not layer.trainable:
            raise ValueError(f"layers must be trainable, or their calls do not use the batch; {layer.name} is not")
        if group is not None and isinstance(layer, SyncBatchNormalization) and layer.group is not None:
            raise ValueError(
                f"group must be None for layers that have one, or {layer.name}.group set to None meanwhile"
            )
    return found, one_by_one, bessel
