"""What each threshold is measured with: values that could take its place, and inputs of the class that it is about."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from benchmarks.cases import ITEM_SIZES, MODES, Case
from benchmarks.survey.points import log_uniform
from nbbn.engine.cpu.schedule import PARALLEL, Thresholds
from nbbn.kernels.cpu.lanes import LINE
from nbbn.runtime import last_level_cache, likely_layer

Range = tuple[float, float]

DTYPE = "float32"
READER = " + read"  # of a mode: behind the call, its whole result is read
READ_MODES = tuple(mode + READER for mode in MODES)
CROSSING = "parallel_elements"


@dataclass(frozen=True)
class Inputs:
    """A class of inputs; every range is spread evenly over its logarithm.

    elements: of the input; with `of_cache`, those that make input and output together so many last-level caches.
    channels, batch, run: rows have channels; planes have a batch, and either channels or elements of a run; what is
    left follows from `elements`. inner: a run has so many statistics in turn.
    whole_lines: whether runs, which are the channels of rows, are whole lines of the cache; None: as it comes.
    """

    elements: Range
    channels: tuple[int, int] | None = None
    batch: tuple[int, int] | None = None
    run: tuple[int, int] | None = None
    inner: tuple[int, int] | None = None
    of_cache: bool = False
    whole_lines: bool | None = None

    def draw(self, rng: np.random.Generator, at: float) -> Case:
        """at: where in the range of elements, from 0 to 1."""
        low, high = self.elements
        elements = low * (high / low) ** at
        if self.of_cache:
            elements *= last_level_cache() / (2 * ITEM_SIZES[DTYPE])
        if self.batch is None:
            assert self.channels is not None, "rows have channels"
            columns = self._run(log_uniform(rng, self.channels))
            return Case("", (max(2, round(elements / columns)), columns))
        batch = log_uniform(rng, self.batch)
        if self.run is None:
            assert self.channels is not None, "planes without a run have channels"
            channels = log_uniform(rng, self.channels)
            run = self._run(max(Thresholds().short_plane + 1, round(elements / (batch * channels))))
        else:
            run = self._run(log_uniform(rng, self.run))
            channels = max(2, round(elements / (batch * run)))
        if self.inner is not None:
            inner = log_uniform(rng, self.inner)
            return Case("", (batch, channels, max(2, round(run / inner)), inner), (1, 3))
        return Case("", (batch, channels, run), 1)

    def _run(self, length: int) -> int:
        line = LINE // ITEM_SIZES[DTYPE]
        if self.whole_lines:
            return -(-length // line) * line
        return length + (self.whole_lines is False and length % line == 0)


@dataclass(frozen=True)
class Subject:
    """How one threshold is measured.

    candidates: beside what it is now. inputs: in turn. shapes: how many are drawn; of the quick run a quarter.
    """

    candidates: tuple[float, ...]
    inputs: tuple[Inputs, ...]
    modes: tuple[str, ...] = MODES
    shapes: int = 8


def _powers(*exponents: int) -> tuple[float, ...]:
    return tuple(1 << n for n in exponents)


def _sizes(low: int, high: int) -> Range:
    return 1 << low, 1 << high


_SUMS = ("training", "backward")

SUBJECTS: Mapping[str, Subject] = {
    CROSSING: Subject(
        _powers(*range(13, 24)),
        (
            Inputs(_sizes(13, 23), channels=(4, 64), batch=(1, 8)),
            Inputs(_sizes(13, 23), channels=(8, 1024)),
        ),
        ("inference",),
        shapes=20,
    ),
    "tile_elements": Subject(_powers(14, 15, 17, 18), (Inputs(_sizes(19, 22), batch=(1, 32), run=(17, 2048)),), _SUMS),
    "tile_columns": Subject(_powers(11, 12, 13, 15), (Inputs(_sizes(20, 23), channels=(1500, 32768)),)),
    "repeated_columns": Subject(_powers(7, 8, 10), (Inputs(_sizes(17, 22), channels=(3, 256)),)),
    "written_columns": Subject(_powers(7, 8, 9), (Inputs(_sizes(17, 22), channels=(3, 256)),)),
    "expanded_rows": Subject((8, 16, 64, 128), (Inputs(_sizes(9, 15), channels=(3, 128)),)),
    "short_plane": Subject((8, 16, 32, 128), (Inputs(_sizes(15, 21), batch=(4, 128), run=(3, 128)),)),
    "short_batch": Subject((0.2, 0.4, 0.9, 1.4), (Inputs(_sizes(12, 20), batch=(4, 64), run=(3, 63)),), _SUMS),
    "short_block": Subject(
        (8, 16, 64, 128), (Inputs(_sizes(15, 20), batch=(2, 32), run=(12, 512), inner=(3, 32)),), _SUMS
    ),
    "chunk_elements": Subject(
        _powers(13, 14, 16, 17),
        (
            Inputs(_sizes(15, 20), channels=(1, 8), batch=(1, 32)),
            Inputs(_sizes(15, 20), channels=(8, 1024)),
        ),
        _SUMS,
    ),
    "write_elements": Subject(
        _powers(12, 13, 15, 16), (Inputs(_sizes(17, 22), channels=(8, 512), batch=(1, 32)),), ("inference",), shapes=12
    ),
    "streamed_share": Subject(
        (0.5, 0.75, 1.25, 1.5, 2.0, math.inf),
        (
            Inputs((0.5, 2.5), channels=(8, 256), batch=(1, 32), of_cache=True, whole_lines=True),
            Inputs((0.5, 2.5), channels=(16, 1024), of_cache=True, whole_lines=True),
        ),
        READ_MODES,
        shapes=10,
    ),
    "streamed_run": Subject(
        _powers(9, 11, 12, 13, 14),
        (Inputs((1.4, 2), batch=(1, 32), run=(128, 4096), of_cache=True, whole_lines=False),),
        ("inference", "backward"),
    ),
}


def present(name: str) -> float:
    """What the threshold is now, for the threading layer that is there."""
    value = getattr(Thresholds(), name)
    return PARALLEL[likely_layer()] if value is None else value


def draw(name: str, subject: Subject, shapes: int, seed: int) -> list[Case]:
    """The inputs of a threshold, from small to large. Those of others do not change them.

    Raises: ValueError for a negative seed.
    """
    rng, inputs = np.random.default_rng([seed, crc32(name.encode())]), subject.inputs
    cases = [inputs[i % len(inputs)].draw(rng, (i + rng.random()) / shapes) for i in range(shapes)]
    return cases
