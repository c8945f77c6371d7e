"""Cases drawn at random: what a list of cases could be tuned to, these cannot."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.cases import MODES, Case

READ = "inference + read"
SURVEY_MODES = ("inference", READ, "training", "backward")

FIRST, LAST, DENSE = LAYOUTS = ("channels first", "channels last", "dense")
LARGEST = 40_000_000  # bytes of one array
BATCHES, CHANNELS, SIDES = (1, 128), (3, 2048), (1, 112)
LENGTHS, FRAMES = (1, 112 * 112), (1, 16)  # of ranks 3 and 5
ROWS = (1, 65536)  # of dense inputs

FLOAT32, HALF, DOUBLE, FUSED = "float32", "16-bit", "float64", "relu / residual"
OTHER = "ranks 3 and 5"
OPTIONS = "axis=[1, 3], ghost batches"  # nbbn's plain layer takes the place of the peers, which lack them
GROUPS = (FLOAT32, HALF, DOUBLE, FUSED, OTHER, OPTIONS)

Change = Callable[[Case, np.random.Generator], Case | None]


def draw(count: int, seed: int) -> list[Case]:
    """The first `count` points of this seed. Each has numbers of its own, so a longer survey begins like a shorter.

    Raises: ValueError for a negative seed, and without a point.
    """
    if count < 1:
        raise ValueError(f"--points must be at least 1; received {count}")
    return [_point(i, np.random.default_rng([seed, i])) for i in range(count)]


def group(case: Case) -> str:
    """That of GROUPS in which the case is counted."""
    if not case.plain_batch_norm:
        return OPTIONS
    if case.fused:
        return FUSED
    if case.dtype != "float32":
        return DOUBLE if case.dtype == "float64" else HALF
    return FLOAT32 if len(case.shape) in (2, 4) else OTHER


def layout(case: Case) -> str:
    """That of LAYOUTS in which the case lies."""
    if len(case.shape) == 2:
        return DENSE
    return LAST if case.channels_last else FIRST


def plain(case: Case) -> Case:
    """The layer without options, for the same input."""
    return replace(case, axis=case.kept[0], options={})


def _with(**changes: Any) -> Change:
    return lambda case, rng: replace(case, **changes)


def _ghost(case: Case, rng: np.random.Generator) -> Case | None:
    """At least two virtual batches of at least two samples; None for a batch that has no such parts."""
    sizes = [n for n in range(2, case.shape[0] // 2 + 1) if case.shape[0] % n == 0]
    return replace(case, options={"virtual_batch_size": int(rng.choice(sizes))}) if sizes else None


@dataclass(frozen=True)
class Variant:
    """change: what is made of a drawn case; None if that case cannot have it."""

    change: Change = lambda case, rng: case
    rank: int = 4
    layouts: tuple[str, ...] = LAYOUTS


# One point of three has one of these, in turn; the others are plain float32 images and dense inputs.
VARIANTS = {
    "float16": Variant(_with(dtype="float16")),
    "relu": Variant(_with(fused="relu")),
    "rank 3": Variant(rank=3, layouts=(FIRST, LAST)),
    "float64": Variant(_with(dtype="float64")),
    "axis=[1, 3]": Variant(_with(axis=(1, 3)), layouts=(FIRST,)),
    "bfloat16": Variant(_with(dtype="bfloat16")),
    "residual": Variant(_with(fused="residual")),
    "rank 5": Variant(rank=5, layouts=(FIRST, LAST)),
    "ghost": Variant(_ghost),
}


def _point(index: int, rng: np.random.Generator) -> Case:
    turn, part = divmod(index, 3)
    if part < 2:
        name, variant, where = "plain", Variant(), LAYOUTS[(2 * turn + part) % len(LAYOUTS)]
    else:
        name, variant = list(VARIANTS.items())[turn % len(VARIANTS)]
        where = str(rng.choice(variant.layouts))
    while True:
        case = variant.change(_shape(rng, where, variant.rank), rng)
        if case is not None and case.bytes <= LARGEST and _values_per_statistic(case) >= 2:
            break
    readable = case.plain_batch_norm and case.dtype in ("float32", "float64")
    return replace(case, name=f"{index}: {name}, {where}", modes=SURVEY_MODES if readable else MODES)


def _shape(rng: np.random.Generator, where: str, rank: int) -> Case:
    if where == DENSE:
        return Case("", (log_uniform(rng, ROWS), log_uniform(rng, CHANNELS)))
    batch, channels, side = (log_uniform(rng, limits) for limits in (BATCHES, CHANNELS, SIDES))
    space = {3: (log_uniform(rng, LENGTHS),), 4: (side, side), 5: (log_uniform(rng, FRAMES), side, side)}[rank]
    if where == LAST:
        return Case("", (batch, *space, channels))
    return Case("", (batch, channels, *space), 1)


def log_uniform(rng: np.random.Generator, limits: tuple[int, int]) -> int:
    low, high = map(math.log, limits)
    return round(math.exp(rng.uniform(low, high)))


def _values_per_statistic(case: Case) -> int:
    batch = case.shape[0]
    return case.per_channel * int(case.options.get("virtual_batch_size", batch)) // batch
