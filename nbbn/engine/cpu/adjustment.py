"""The gradients of an adjustment, by NumPy."""

from typing import Any

import numpy as np

from nbbn.core import rules
from nbbn.core.layout import Sizes
from nbbn.engine.base import Batch
from nbbn.kernels import channel


def gradients(batch: Batch, dz: np.ndarray, saved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See Engine.adjustment_gradients()."""
    (lay, x, operands, _), dz64 = batch, dz.astype(np.float64)
    x64, per_channel = x.astype(np.float64), [n if kept else 1 for n, kept in zip(lay.sizes, lay.kept, strict=True)]
    mean, rstd, r, d, gamma = (
        saved[row].reshape(per_channel)
        for row in (channel.BATCH_MEAN, channel.RSTD, channel.R, channel.D, channel.USED_GAMMA)
    )
    if operands.weights is not None:
        known = (operands.weights > 0) | np.isfinite(x64)
        x64, dz64 = (np.where(known, *pair) for pair in ((x64, mean), (dz64, 0.0)))
    z = rules.normalize(x64, mean, *rules.output_terms(mean, mean, rstd, r, d, gamma))
    a: Any = operands.a
    b: Any = operands.b
    return _sum_to(dz64 * z, a.shape, a.dtype), _sum_to(dz64 * gamma, b.shape, b.dtype)


def _sum_to(array: np.ndarray, shape: Sizes, dtype: np.dtype) -> np.ndarray:
    """The gradient of broadcasting: `array` summed to `shape`; an array, also where that is ()."""
    extra = array.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(i + extra for i, s in enumerate(shape) if s == 1)
    total = np.asarray(array.sum(axis=axes, dtype=np.float64), dtype)
    return total.reshape(shape)
