"""Who takes the moments of training calls in the place of an update of the moving statistics."""

from collections.abc import Sequence
from typing import Any, Protocol

from nbbn.arrays import Array
from nbbn.core.options import Numbers


class Collector(Protocol):
    def wants(self, layer: Any) -> bool:
        """Whether the moments of the next call of a layer count."""

    def take(self, layer: Any, saved: Array, x: Array, numbers: Numbers | None) -> None:
        """saved: of a training call on `x` that would have updated the moving statistics. It begins with the moments
        (4, groups * C) of the batch; these rows may be kept. numbers: as of Normalizer._update()."""


class Collected(Protocol):
    """What a collector needs of a layer."""

    name: str
    _collector: Collector | None


def attach(collector: Collector, layers: Sequence[Collected]) -> None:
    """Let training calls give their moments to the collector, until detach().

    Raises: RuntimeError if another one gets those of a layer.
    """
    busy = ", ".join(layer.name for layer in layers if layer._collector is not None)
    if busy:
        raise RuntimeError(f"the layers {busy} are in another accumulate() or population_statistics() already")
    for layer in layers:
        layer._collector = collector


def detach(layers: Sequence[Collected]) -> None:
    for layer in layers:
        layer._collector = None
