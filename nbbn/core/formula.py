"""Batch normalization in the operations of an array library that differentiates them.

It is what the kernels compute, written so that autograd of PyTorch, or JAX, can go through it: for derivatives of a
gradient, and for transformations that a kernel cannot follow. Nothing here is fast.
"""

from collections.abc import Callable, Sequence
from typing import Any

from nbbn.core.layout import Sizes


def train(
    xp: Any,
    x: Any,
    gamma: Any,
    beta: Any,
    axis: Sizes,
    epsilon: float,
    *,
    members: Sequence[slice] = (slice(None),),
    weights: Any = None,
    corrections: tuple[Any, Any] | None = None,
    adjustment: tuple[Any, Any] | None = None,
    residual: Any = None,
    relu: bool = False,
    total: Callable[[Any], Any] = lambda own: own,
) -> Any:
    """The output of a training call, and its mean and biased variance.

    Args:
        xp: torch, jax.numpy or numpy.
        x: of the statistics' dtype; float16 and bfloat16 are the caller's to cast. gamma, beta: (C,), as many as
            combinations of the kept axes.
        axis: the kept axes, resolved and ascending. members: the samples of each virtual batch, as a Layout has them.
        weights: broadcast against x.
        corrections: r and d of renorm, (G, C) for G groups: constants.
        adjustment: a and b, which broadcast against x. residual: of x's shape.
        total: adds up a sum of this input and those of the others that share its statistics; it needs weights.
    Returns: y; mean and variance (G, C).
    """
    axes, shape = tuple(i for i in range(x.ndim) if i not in axis), statistics_shape(x, axis)
    parts, statistics = [], []
    for g, samples in enumerate(members):
        values = x[samples]
        w = None if weights is None else xp.broadcast_to(weights, tuple(x.shape))[samples]
        mean, variance = _moments(xp, values, w, axes, total)
        statistics.append((mean.reshape(-1), variance.reshape(-1)))
        z = (values - mean) / (variance + epsilon) ** 0.5
        if corrections is not None:
            r, d = (c[g].reshape(mean.shape) for c in corrections)
            z = z * r + d
        parts.append(z)
    z = _in_order(xp, parts, members, x.shape[0])
    if adjustment is not None:
        z = z * adjustment[0] + adjustment[1]
    y = _activate(xp, z * gamma.reshape(shape) + beta.reshape(shape), residual, relu)
    return y, xp.stack([mean for mean, _ in statistics]), xp.stack([variance for _, variance in statistics])


def statistics_shape(x: Any, axis: Sizes) -> tuple[int, ...]:
    """That of a statistic, to be broadcast against the input."""
    return tuple(n if i in axis else 1 for i, n in enumerate(x.shape))


def _moments(xp: Any, x: Any, w: Any, axes: tuple[int, ...], total: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Mean and biased variance; 0 where nothing counts. What has no weight may be NaN."""
    if w is None:
        mean = x.mean(axes, keepdims=True)
        return mean, ((x - mean) ** 2).mean(axes, keepdims=True)
    x = xp.where(w > 0, x, 0.0)
    counted = total(w.sum(axes, keepdims=True))
    share = w / xp.where(counted > 0, counted, 1.0)
    mean = total((x * share).sum(axes, keepdims=True))
    return mean, total(((x - mean) ** 2 * share).sum(axes, keepdims=True))


def _in_order(xp: Any, parts: list[Any], members: Sequence[slice], batch: int) -> Any:
    """The groups' samples in their order in the batch."""
    if len(parts) == 1:
        return parts[0]
    place = [0] * batch
    for i, n in enumerate(n for samples in members for n in range(batch)[samples]):
        place[n] = i
    return xp.concatenate(parts)[xp.asarray(place)]


def _activate(xp: Any, z: Any, residual: Any, relu: bool) -> Any:
    """0 where z is not positive; NaN stays NaN."""
    if residual is not None:
        z = z + residual
    return xp.where(z <= 0, 0.0 * z, z) if relu else z
