"""The gradients of an adjustment: sums of a term of each element, to the shape of what was broadcast against them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from nbbn.arrays import moving
from nbbn.arrays.device import DeviceArray, wrap
from nbbn.core.layout import Sizes, contiguous_strides, merged
from nbbn.engine.base import Batch
from nbbn.engine.cuda.schedule import Thresholds, power_of_two
from nbbn.kernels.cuda.broadcast import Cut, sums

_FLOAT64 = np.dtype(np.float64)
_MOST_BLOCKS = 1 << 16


class _Terms(NamedTuple):
    """What kernels read, see kernels/cuda/broadcast.py: the addresses of four arrays, and their dimensions, those with
    sums of their own and those along which there is one. saved_row: bytes. rows: whether neighbours in memory belong to
    different sums."""

    arrays: Sizes
    kept: tuple[Sizes, tuple[Sizes, ...]]
    reduced: tuple[Sizes, tuple[Sizes, ...]]
    saved_row: int
    rows: bool


def gradients(
    batch: Batch, dz: DeviceArray, saved: DeviceArray, thresholds: Thresholds
) -> tuple[DeviceArray, DeviceArray]:
    """See Engine.adjustment_gradients()."""
    (_, x, operands, _), found = batch, []
    weights = None if operands.weights is None else operands.weights.dtype
    pair: tuple[Any, Any] = operands.a, operands.b
    for name, operand in zip(("scale", "bias"), pair, strict=True):
        out = wrap(x.library.empty(operand.shape, operand.dtype, x.device), x.library)
        cut = _cut(terms := _terms(batch, dz, saved, operand), thresholds)
        if cut.chunks == 1:
            _launch(name, x.dtype, weights, terms, cut, out, thresholds)
        else:
            partial = wrap(x.library.empty((cut.chunks, cut.outputs), _FLOAT64, x.device), x.library)
            _launch(name, x.dtype, weights, terms, cut, partial, thresholds)
            _add_up(partial, out, thresholds)
        found.append(out)
    return found[0], found[1]


def _terms(batch: Batch, dz: DeviceArray, saved: DeviceArray, operand: DeviceArray) -> _Terms:
    lay, x, weights = batch.lay, batch.x, batch.operands.weights
    of_channels = contiguous_strides(tuple(n if kept else 1 for n, kept in zip(lay.sizes, lay.kept, strict=True)), 8)
    of_saved = tuple(s if kept else 0 for s, kept in zip(of_channels, lay.kept, strict=True))
    strides = x.strides, dz.strides, (0,) * x.ndim if weights is None else weights.strides, of_saved
    shape = (1,) * (x.ndim - operand.ndim) + operand.shape
    in_memory = sorted(range(x.ndim), key=lambda i: -abs(x.strides[i]))
    inner = [i for i in in_memory if x.shape[i] > 1][-1:] or [0]

    def dimensions(chosen: Sequence[int]) -> tuple[Sizes, tuple[Sizes, ...]]:
        sizes, found = merged(tuple(x.shape[i] for i in chosen), [tuple(s[i] for i in chosen) for s in strides])
        return sizes, tuple(found)

    kept, reduced = [i for i in range(x.ndim) if shape[i] != 1], [i for i in in_memory if shape[i] == 1]
    addresses = x.address, dz.address, 0 if weights is None else weights.address
    return _Terms(
        (*addresses, saved.address), dimensions(kept), dimensions(reduced), saved.strides[0], shape[inner[0]] != 1
    )


def _add_up(partial: DeviceArray, out: DeviceArray, thresholds: Thresholds) -> None:
    chunks, outputs = (((n,), ((s,),) * 4) for n, s in zip(partial.shape, partial.strides, strict=True))
    terms = _Terms((partial.address,) * 4, outputs, chunks, 0, rows=True)
    _launch("value", _FLOAT64, None, terms, _cut(terms, replace(thresholds, blocks=1)), out, thresholds)


def _launch(
    name: str,
    dtype: np.dtype,
    weights: np.dtype | None,
    terms: _Terms,
    cut: Cut,
    out: DeviceArray,
    thresholds: Thresholds,
) -> None:
    ranks = len(terms.kept[0]), len(terms.reduced[0])
    kernel = sums(name, dtype, weights, out.dtype, terms.rows, thresholds.threads, ranks)
    arguments = terms.arrays, *terms.kept, *terms.reduced, terms.saved_row, cut, out.address
    moving.start(kernel, out, min(cut.tiles * cut.chunks, _MOST_BLOCKS), thresholds.threads, *arguments)


def _cut(terms: _Terms, thresholds: Thresholds) -> Cut:
    """As many threads for a sum as it has values for, and as many blocks as there are to be."""
    t, outputs, values = thresholds, math.prod(terms.kept[0]), math.prod(terms.reduced[0])
    beside = min(t.columns, power_of_two(outputs)) if terms.rows else 1
    lanes = min(t.threads // beside, power_of_two(-(-values // t.vectors)))
    tiles = -(-outputs * lanes // t.threads)
    chunks = max(1, min(t.blocks // tiles, t.max_chunks, values // (lanes * t.vectors)))
    chunk = -(-values // chunks)
    return Cut(outputs, values, chunk, -(-values // chunk), t.threads // lanes, lanes, tiles)
