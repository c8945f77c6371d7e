"""What all exchanges share: the choice of a layer by its name, a layer from variables by name, and the way back."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from nbbn.core.layout import Sizes, resolve_axis
from nbbn.layer.layer import BatchNormalization
from nbbn.state.shapes import Shapes
from nbbn.state.variables import COUNTS


def choose(names: Iterable[str], name: str | None, where: str) -> str:
    """`name`, or the only one there is. Raises: ValueError if there is no such name, or several and none is given."""
    known = sorted(names)
    if name is None and len(known) == 1:
        return known[0]
    if name is not None and name in known:
        return name
    raise ValueError(f"name must be that of a layer in {where}, {known}; received {name!r}")


def make_layer(arrays: Mapping[str, np.ndarray], options: Mapping[str, Any], ndim: int | None) -> BatchNormalization:
    """A built layer with these variables, whose names are nbbn's, in any shape with the right number of values.

    A gamma or beta that is not there is none; statistics of renorm that are not there begin at the moving ones, counts
    at 0. Debiased averages are taken to be complete: their weight begins at 1.

    Raises: ValueError if `ndim` is needed and not given, or if the arrays do not fit the options.
    """
    has = {"center": "beta" in arrays, "scale": "gamma" in arrays, "renorm": "renorm_mean" in arrays}
    layer = BatchNormalization(**{**has, **options})
    build(layer, arrays["moving_mean"], ndim)
    variables = layer._built_variables("make_layer()")
    shape = variables.shapes.params
    seen = np.full(shape, 0.0 if layer.momentum is None else 1.0)
    start = _start_of_renorm(arrays, layer.epsilon) | dict.fromkeys(COUNTS, seen)
    taken = {n: a for n, a in {**start, **arrays}.items() if n in variables.names or n not in start}
    layer.set_state({n: a.reshape(shape) if a.size == math.prod(shape) else a for n, a in taken.items()})
    return layer


def build(layer: BatchNormalization, statistic: np.ndarray, ndim: int | None) -> None:
    """Build a layer for inputs that such a statistic is of. Raises: ValueError if `ndim` is needed and not given."""
    if not layer.built:
        wide = statistic.dtype == np.float64
        layer.build(_input_shape(layer, statistic.shape, ndim), np.float64 if wide else np.float32)


def _start_of_renorm(arrays: Mapping[str, np.ndarray], epsilon: float) -> dict[str, np.ndarray]:
    """What the statistics of renorm are after long training with equal momenta; in between they are close to it."""
    sigma = np.sqrt(arrays["moving_variance"].astype(np.float64) + epsilon)
    return {"moving_stddev": sigma, "renorm_mean": arrays["moving_mean"], "renorm_stddev": sigma}


def _input_shape(layer: BatchNormalization, shape: Sizes, ndim: int | None) -> list[int | None]:
    """The shape of inputs, whose feature dimensions alone are known, from that of a statistic: the feature dimensions
    only, in their order, or the inputs' rank with 1 elsewhere, with one more 1 for virtual batches."""
    count = len(layer.options.resolved_axis())
    virtual = layer.virtual_batch_size is not None
    compact = len(shape) == count
    if compact and ndim is None:
        raise ValueError(f"ndim, the rank of the inputs, must be given: variables of shape {shape} do not tell it")
    rank = len(shape) - virtual if ndim is None else ndim
    axes = sorted(resolve_axis(layer.options.resolved_axis(), rank))
    if compact:
        sizes = list(shape)
    elif len(shape) in (rank, rank + virtual):
        sizes = [shape[a + len(shape) - rank] for a in axes]
    else:
        raise ValueError(f"ndim must fit the variables, which have the shape {shape}; received {ndim}")
    return [dict(zip(axes, sizes, strict=True)).get(i) for i in range(rank)]


def shapes_of(layer: Any, what: str) -> Shapes:
    """Raises: TypeError if it is no layer of nbbn; ValueError if it is not built."""
    if not isinstance(layer, BatchNormalization):
        raise TypeError(f"layer must be a BatchNormalization of nbbn; received {type(layer).__name__}")
    return layer._built_variables(what).shapes


def compact(layer: BatchNormalization, what: str) -> dict[str, np.ndarray]:
    """The layer's state, in shapes of the feature dimensions alone."""
    features = shapes_of(layer, what).features
    return {n: a.reshape([features[i] for i in sorted(features)]) for n, a in layer.get_state().items()}


def along_axes(layer: BatchNormalization, what: str) -> Sizes:
    """The shape in which a statistic broadcasts against inputs: their rank, with 1 in every reduced dimension."""
    shapes = shapes_of(layer, what)
    return tuple(shapes.features.get(i, 1) for i in range(shapes.rank))


def batches_seen(layer: BatchNormalization) -> int:
    """How many batches the averages are of, for libraries that have one number for it; 0 where nobody counts.

    Raises: ValueError if the channels differ, as they do after masks that left one out.
    """
    if layer.momentum is not None:
        return 0
    state = layer.get_state()
    found = {int(n) for name in COUNTS for n in np.ravel(state[name])}
    if len(found) > 1:
        raise ValueError(f"all channels must have seen the same number of batches; received {sorted(found)}")
    return max(found, default=0)
