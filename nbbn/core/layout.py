"""(shape, axis, virtual batch) -> the canonical view [R0, K0, R1, K1]; integers only, no arrays.

R dimensions are reduced, K dimensions are kept: one statistic per index of K0 x K1, its values along R0 x R1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Sizes = tuple[int, ...]


def resolve_axis(axis: Sequence[int], rank: int, argument: str = "axis") -> Sizes:
    """The kept axes as ascending non-negative numbers.

    Raises: ValueError if one is out of range or occurs twice.
    """
    for a in axis:
        if not -rank <= a < rank:
            limits = f"between {-rank} and {rank - 1} for an input of rank {rank}"
            raise ValueError(f"{argument} must be {limits}; received {a}")
    resolved = sorted(a % rank for a in axis)
    if len(set(resolved)) != len(resolved):
        received = f"{list(axis)} for an input of rank {rank}"
        raise ValueError(f"{argument} must not name a dimension twice; received {received}")
    return tuple(resolved)


@dataclass(frozen=True, eq=False)  # layout() makes each once; plans are looked up by it
class Layout:
    """How the dimensions of one input are reduced or kept.

    sizes, kept: of the dimensions after a virtual batch has split the first one into [V, G].
    groups, channels: the statistics, in this order, are a (groups, channels) array; groups is 1 without virtual batch.
    """

    sizes: Sizes
    kept: tuple[bool, ...]
    groups: int
    channels: int

    @property
    def statistics(self) -> int:
        return self.groups * self.channels

    def split(self, strides: Sizes) -> Sizes:
        """The strides of an array of the input's shape, for `sizes`."""
        return strides if len(strides) == len(self.sizes) else (strides[0] * self.sizes[1], *strides)


@lru_cache(maxsize=1024)
def layout(shape: Sizes, axis: Sizes, virtual_batch_size: int | None = None) -> Layout:
    """The Layout of an input. `axis` is resolved; `virtual_batch_size` divides shape[0], which is not in `axis`.

    Sample n belongs to group n mod G, so the first dimension splits into [virtual_batch_size, G] with G kept.
    """
    kept = tuple(i in axis for i in range(len(shape)))
    channels = math.prod(shape[i] for i in axis)
    if virtual_batch_size is None:
        return Layout(shape, kept, 1, channels)
    groups = shape[0] // virtual_batch_size
    return Layout((virtual_batch_size, groups, *shape[1:]), (False, True, *kept[1:]), groups, channels)


_SLOTS = (False, True, False, True)  # kept? of R0, K0, R1, K1


def collapse(sizes: Sizes, kept: tuple[bool, ...], strides: Sequence[Sizes]) -> tuple[Sizes, list[Sizes]] | None:
    """The canonical shape and, for each array, the strides that view it so; None where no view can.

    The dimensions are taken in the memory order of the first array (a statistic does not care in which order its
    values come, so the NHWC memory of an NCHW array is read as it lies), dimensions of size 1 are dropped, neighbours
    of one kind are merged where every array allows it, and what is left is placed from the right. The kept
    dimensions must stay in their order, which is that of the parameters.
    """
    first = strides[0]
    order = sorted((i for i, s in enumerate(sizes) if s != 1), key=lambda i: -abs(first[i]))
    kept_order = [i for i in order if kept[i]]
    if kept_order != sorted(kept_order):
        return None
    runs: list[tuple[bool, int, list[int]]] = []
    for i in order:
        inner = [s[i] for s in strides]
        if runs:
            kind, size, outer = runs[-1]
            if kind == kept[i] and all(o == n * sizes[i] for o, n in zip(outer, inner, strict=True)):
                runs[-1] = (kind, size * sizes[i], inner)
                continue
        runs.append((kept[i], sizes[i], inner))
    return _place(runs, len(strides))


def _place(runs: list[tuple[bool, int, list[int]]], arrays: int) -> tuple[Sizes, list[Sizes]] | None:
    shape, placed = [1] * 4, [[0] * 4 for _ in range(arrays)]
    slot = 3
    for kind, size, inner in reversed(runs):
        while slot >= 0 and _SLOTS[slot] != kind:
            slot -= 1
        if slot < 0:
            return None
        shape[slot] = size
        for target, stride in zip(placed, inner, strict=True):
            target[slot] = stride
        slot -= 1
    return tuple(shape), [tuple(p) for p in placed]


def contiguous_strides(sizes: Sizes, itemsize: int = 1) -> Sizes:
    """Strides of a C-contiguous array."""
    strides, step = [], itemsize
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def copy_order(sizes: Sizes, kept: tuple[bool, ...]) -> Sizes:
    """The order of dimensions for a copy that has a canonical view: as they are, or, for five or more alternating runs,
    reduced before kept."""
    if collapse(sizes, kept, [contiguous_strides(sizes)]) is not None:
        return tuple(range(len(sizes)))
    return tuple(sorted(range(len(sizes)), key=lambda i: kept[i]))
