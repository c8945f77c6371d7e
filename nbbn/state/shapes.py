"""What the first input of a layer fixes, and what later ones must agree with."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbbn.core import dtypes
from nbbn.core.layout import Sizes
from nbbn.core.options import Options


@dataclass(frozen=True)
class Shapes:
    """What build() fixed: the input's rank and feature dimensions, and the parameters' shape and dtype."""

    rank: int
    features: Mapping[int, int]
    params: Sizes
    dtype: np.dtype


def as_shape(input_shape: Any) -> tuple[int | None, ...]:
    """A shape that a user has passed; None stands for an unknown dimension.

    Raises: TypeError for what is no sequence of integers and None, ValueError for a negative one.
    """
    try:
        shape = tuple(None if n is None else operator.index(n) for n in input_shape)
    except TypeError:
        raise TypeError(f"input_shape must be a shape, as (None, 8); received {input_shape!r}") from None
    if any(n is not None and n < 0 for n in shape):
        raise ValueError(f"input_shape must have no negative dimension (None is an unknown one); received {shape}")
    return shape


def derive_shapes(options: Options, shape: tuple[int | None, ...], dtype: np.dtype) -> Shapes:
    """The shapes for inputs of this shape and dtype; None stands for an unknown dimension.

    Raises: ValueError if an axis is out of range, occurs twice, or its dimension is unknown.
    """
    if not shape:
        raise ValueError(f"inputs must have at least one dimension; received shape {shape}")
    axis = options.kept_axes(len(shape))
    unknown = [a for a in axis if shape[a] is None]
    if unknown:
        raise ValueError(f"the dimension of axis {unknown[0]} must be known to build the layer; received shape {shape}")
    options.check_fused(len(shape), dtype)
    features = {a: int(shape[a]) for a in axis}  # type: ignore[arg-type]
    virtual = options.virtual_batch_size is not None
    if len(axis) == 1 and not virtual:
        params: Sizes = (features[axis[0]],)
    else:
        params = tuple(features.get(i, 1) for i in range(len(shape)))
        params = (params[0], 1, *params[1:]) if virtual else params
    return Shapes(len(shape), features, params, dtypes.statistic(dtype))


def check_input(options: Options, known: Shapes | None, shape: Sizes, dtype: np.dtype) -> Shapes:
    """The shapes for an input, which are those known if there are any. Raises: ValueError if they do not agree."""
    if known is None:
        return derive_shapes(options, shape, dtype)
    if len(shape) != known.rank or any(shape[a] != size for a, size in known.features.items()):
        expected = ", ".join(str(known.features.get(i, "any")) for i in range(known.rank))
        raise ValueError(f"inputs must have the shape ({expected}) that the layer was built for; received {shape}")
    options.check_fused(len(shape), dtype)
    return known
