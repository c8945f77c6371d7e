"""(shape, axis, virtual batch) -> the canonical view [R0, K0, R1, K1]; integers only, no arrays.

R dimensions are reduced, K dimensions are kept: one statistic per index of K0 x K1, its values along R0 x R1. R0 may be
several slices, one after the other, each with statistics of its own: so contiguous groups of samples lie in memory,
before the channels of images.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

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


class Cut(NamedTuple):
    """Groups of one size in a virtual batch.

    start: the first sample of the first group. samples: of each group. sample_step, group_step: how far apart a group's
    samples are, and the first samples of groups.
    """

    start: int
    samples: int
    groups: int
    sample_step: int
    group_step: int


@dataclass(frozen=True, eq=False)  # layout() makes each once; plans are looked up by it
class Layout:
    """How the dimensions of one input are reduced or kept.

    sizes, kept: of the dimensions after a virtual batch has split the first one into [V, G], or [G, V] where groups are
    contiguous. groups, channels: the statistics, in this order, are a (groups, channels) array; groups is 1 without
    virtual batch. cuts: of a virtual batch. parts: where no one split says which samples are a group's, sizes and kept
    are those of the input, and these are its parts, the groups in their order.
    """

    sizes: Sizes
    kept: tuple[bool, ...]
    groups: int
    channels: int
    cuts: tuple[Cut, ...] = ()
    parts: tuple["Part", ...] = ()

    @property
    def statistics(self) -> int:
        return self.groups * self.channels

    def split(self, strides: Sizes) -> Sizes:
        """The strides of an array of the input's shape, for `sizes`."""
        return strides if len(strides) == len(self.sizes) else (strides[0] * self.sizes[1], *strides)

    def members(self) -> list[slice]:
        """The samples of each group."""
        firsts = [(c.start + g * c.group_step, c) for c in self.cuts for g in range(c.groups)]
        return [slice(f, f + (c.samples - 1) * c.sample_step + 1, c.sample_step) for f, c in firsts] or [slice(None)]


class Part(NamedTuple):
    """Some groups of an input. lay: of a view of these samples alone, in which the `steps` (in samples) are the strides
    of what stands in the place of the first dimension. start: the first sample. group: the first group."""

    lay: Layout
    start: int
    steps: Sizes
    group: int

    def split(self, strides: Sizes) -> Sizes:
        """The strides of the view of an array of the input's shape."""
        return *(strides[0] * n for n in self.steps), *strides[1:]


def cut(samples: int, size: int, ragged: str = "error", contiguous: bool = False) -> tuple[Cut, ...]:
    """How a batch is cut into groups of `size` samples, or, where that is not possible, as `ragged` says: "last" makes
    the last group a smaller one, "spread" makes as many groups, whose sizes differ by one at most."""
    whole, rest = divmod(samples, size)
    found = [(size, whole)]  # how many samples a group has, and how many such groups there are
    if rest and ragged == "spread":
        less, more = divmod(samples, whole + 1)
        found = [(less + 1, more), (less, whole + 1 - more)]
    cuts, start, first, apart = [], 0, 0, sum(groups for _, groups in found)
    for n, groups in found:
        cuts.append(Cut(start, n, groups, 1, n) if contiguous else Cut(first, n, groups, apart, 1))
        start, first = start + n * groups, first + groups
    if rest and ragged == "last":
        cuts.append(Cut(start, rest, 1, 1, rest))
    return tuple(c for c in cuts if c.groups) or tuple(cuts)  # an empty batch has no groups


@lru_cache(maxsize=1024)
def layout(
    shape: Sizes, axis: Sizes, virtual_batch_size: int | None = None, ragged: str = "error", contiguous: bool = False
) -> Layout:
    """The Layout of an input. `axis` is resolved; with `virtual_batch_size` shape[0] is not in it.

    Sample n belongs to group n mod G, so the first dimension splits into [virtual_batch_size, G] with G kept; where
    groups are contiguous, into [G, virtual_batch_size].
    """
    kept = tuple(i in axis for i in range(len(shape)))
    channels = math.prod(shape[i] for i in axis)
    if virtual_batch_size is None:
        return Layout(shape, kept, 1, channels)
    return _grouped(shape, kept, channels, cut(shape[0], virtual_batch_size, ragged, contiguous), contiguous)


def _grouped(sizes: Sizes, kept: tuple[bool, ...], channels: int, cuts: tuple[Cut, ...], contiguous: bool) -> Layout:
    groups, parts, first = sum(c.groups for c in cuts), [], 0
    for c in cuts:
        split = (c.groups, c.samples, *sizes[1:]) if contiguous else (c.samples, c.groups, *sizes[1:])
        steps = (c.group_step, c.sample_step) if contiguous else (c.sample_step, c.group_step)
        kinds = (contiguous, not contiguous, *kept[1:])
        parts.append(Part(Layout(split, kinds, c.groups, channels, (c,)), c.start, steps, first))
        first += c.groups
    return parts[0].lay if len(parts) == 1 else Layout(sizes, kept, groups, channels, cuts, tuple(parts))


@lru_cache(maxsize=1024)
def copied_parts(lay: Layout) -> tuple[Sizes, Layout]:
    """The order of dimensions for a copy of which each part has a canonical view, and the copy's Layout."""

    def copied(order: Sizes) -> Layout:
        sizes, kept = tuple(lay.sizes[i] for i in order), tuple(lay.kept[i] for i in order)
        return _grouped(sizes, kept, lay.channels, lay.cuts, contiguous=lay.cuts[0].sample_step == 1)

    def have_views(made: Layout) -> bool:
        strides = contiguous_strides(made.sizes)
        return all(collapse(p.lay.sizes, p.lay.kept, [p.split(strides)]) is not None for p in made.parts)

    return next((order, made) for order in _copy_orders(lay.kept, 1) if have_views(made := copied(order)))


def steps_dimension(kept: tuple[bool, ...]) -> int:
    """The dimension that counts the steps of sequences: the first one after the batch that is no feature axis.

    Raises: ValueError where there is none, or where the batch is a feature axis.
    """
    if kept[0] or False not in kept[1:]:
        features = [i for i, is_kept in enumerate(kept) if is_kept]
        raise ValueError(
            "lengths need an input with samples in dimension 0 and another dimension, of steps, that are no feature "
            f"axes; received one of rank {len(kept)} with the feature axes {features}"
        )
    return kept.index(False, 1)


@lru_cache(maxsize=1024)
def sequences_view(sizes: Sizes, kept: tuple[bool, ...], strides: Sizes) -> tuple[Sizes, Sizes] | None:
    """The canonical shape and strides in which R0 counts samples and R1 begins with their steps; None where no view
    has the steps of a sample together."""
    found = collapse(sizes[1:], kept[1:], [strides[1:]])
    if found is None:
        return None
    (r0, k0, r1, k1), (inner,), _ = found
    steps = steps_dimension(kept)
    if r0 != 1 or (sizes[steps] > 1 and inner[2] * (r1 // sizes[steps]) != strides[steps]):
        return None
    return (sizes[0], k0, r1, k1), (strides[0], *inner[1:])


_SLOTS = (False, True, False, True)  # kept? of R0, K0, R1, K1


class View(NamedTuple):
    """A canonical view. sizes: R0, K0, R1, K1. strides: of each array. slices: how many R0 consists of."""

    sizes: Sizes
    strides: list[Sizes]
    slices: int


def collapse(sizes: Sizes, kept: tuple[bool, ...], strides: Sequence[Sizes]) -> View | None:
    """The canonical view of some arrays; None where there is none.

    The dimensions are taken in the memory order of the first array (a statistic does not care in which order its
    values come, so the NHWC memory of an NCHW array is read as it lies), dimensions of size 1 are dropped, neighbours
    of one kind are merged where every array allows it, and what is left is placed from the right. The kept
    dimensions must stay in their order, which is that of the parameters. One that is left in front of R0 cuts it into
    slices, where every array goes on from each of them to the next.
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


def _place(runs: list[tuple[bool, int, list[int]]], arrays: int) -> View | None:
    shape, placed = [1] * 4, [[0] * 4 for _ in range(arrays)]
    slot, slices = 3, 1
    for kind, size, inner in reversed(runs):
        while slot >= 0 and _SLOTS[slot] != kind:
            slot -= 1
        if slot < 0:
            follow = all(stride == p[0] * shape[0] for p, stride in zip(placed, inner, strict=True))
            if not (kind and slices == 1 and follow):
                return None
            slices, shape[0] = size, size * shape[0]
            continue
        shape[slot] = size
        for target, stride in zip(placed, inner, strict=True):
            target[slot] = stride
        slot -= 1
    return View(tuple(shape), [tuple(p) for p in placed], slices)


def merged(sizes: Sizes, strides: Sequence[Sizes]) -> tuple[Sizes, list[Sizes]]:
    """The dimensions of some arrays without those of size 1, neighbours merged where every array allows it; one at
    least. Returns: their sizes, and the strides of each array."""
    found: list[tuple[int, list[int]]] = []
    for i, size in enumerate(sizes):
        if size == 1:
            continue
        inner = [s[i] for s in strides]
        if found and all(o == n * size for o, n in zip(found[-1][1], inner, strict=True)):
            size *= found.pop()[0]
        found.append((size, inner))
    found = found or [(1, [0] * len(strides))]
    return tuple(n for n, _ in found), list(zip(*(inner for _, inner in found), strict=True))


def contiguous_strides(sizes: Sizes, itemsize: int = 1) -> Sizes:
    """Strides of a C-contiguous array."""
    strides, step = [], itemsize
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def is_contiguous(sizes: Sizes, strides: Sizes, itemsize: int) -> bool:
    """Whether an array is C-contiguous, as NumPy says it."""
    dense = contiguous_strides(sizes, itemsize)
    return all(a == b for a, b, size in zip(strides, dense, sizes, strict=True) if size != 1)


def order_in_memory(sizes: Sizes, strides: Sizes, itemsize: int) -> tuple[list[int], list[int]]:
    """The dimensions of an array in the order in which numpy.empty_like has them in memory, from those that are
    furthest apart, and where each of them is there."""
    order = list(reversed(range(len(sizes))))
    if not is_contiguous(sizes[::-1], strides[::-1], itemsize):
        order.sort(key=lambda i: (-abs(strides[i]), i))
    return order, sorted(order, key=order.__getitem__)


def strides_of_results(sizes: Sizes, strides: Sizes, itemsize: int) -> Sizes:
    """The strides of numpy.empty_like for an array."""
    if is_contiguous(sizes, strides, itemsize):
        return contiguous_strides(sizes, itemsize)
    order, back = order_in_memory(sizes, strides, itemsize)
    dense = contiguous_strides(tuple(sizes[i] for i in order), itemsize)
    return tuple(dense[i] for i in back)


def copy_order(sizes: Sizes, kept: tuple[bool, ...]) -> Sizes:
    """The order of dimensions for a copy that has a canonical view."""

    def has_view(order: Sizes) -> bool:
        ordered = tuple(sizes[i] for i in order)
        return collapse(ordered, tuple(kept[i] for i in order), [contiguous_strides(ordered)]) is not None

    return next(order for order in _copy_orders(kept, 0) if has_view(order))


def _copy_orders(kept: tuple[bool, ...], first: int) -> Iterator[Sizes]:
    """Orders of dimensions: as they are, then with more and more of those in front, from the first-th on, in the order
    reduced before kept. What stays behind them is copied as it lies, in runs that are as long as can be."""
    rank = len(kept)
    for end in range(first, rank + 1):
        sorted_ones = sorted(range(first, end), key=lambda i: kept[i])
        yield (*range(first), *sorted_ones, *range(end, rank))
