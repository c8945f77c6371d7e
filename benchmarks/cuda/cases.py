"""The named cases on a GPU, and the least that each must move through its memory."""

from collections.abc import Iterable
from dataclasses import replace

from benchmarks.cases import Case

BATCH = 256
STAGES = {1: (64, 112), 2: (256, 56), 3: (512, 28), 4: (1024, 14), 5: (2048, 7)}  # of ResNet-50: channels, side
# How many arrays of the input's size a mode moves, once each, and how many it reads once more for the statistics.
ONCE = {"inference": 2, "training": 2, "backward": 3}
AGAIN = {"inference": 0, "training": 1, "backward": 2}


def least_bytes(case: Case, mode: str, cache: int) -> int:
    """The fewest bytes that `mode` must move between memory and cores, given an L2 cache of `cache` bytes.

    The statistics of a training or backward step need x, or x and dy, before the first result can be written: they are
    read twice, unless all that a step touches stays in the cache.
    """
    again = 0 if ONCE[mode] * case.bytes <= cache else AGAIN[mode]
    return (ONCE[mode] + again) * case.bytes


def _images(name: str, batch: int, channels: int, side: int) -> Iterable[Case]:
    """The case channels first and channels last."""
    yield Case(f"{name}-nchw", (batch, channels, side, side), 1)
    yield Case(f"{name}-nhwc", (batch, side, side, channels), -1)


def _cases() -> Iterable[Case]:
    for i, (channels, side) in STAGES.items():
        for case in _images(f"resnet{i}", BATCH, channels, side):
            yield case
            # bfloat16 has the traffic of float16: a large, a middle and a small stage will show another difference.
            for dtype in ("float16", "bfloat16") if i in (1, 3, 5) else ("float16",):
                yield replace(case, name=f"{case.name}-{dtype}", dtype=dtype)
    for rows, columns in ((262144, 1024), (65536, 128), (8192, 4096), (1024, 1024), (32, 64)):
        yield Case(f"dense-{rows}x{columns}", (rows, columns))
    yield Case("dense-262144x1024-float16", (262144, 1024), dtype="float16")
    yield from _images("small", 32, 64, 28)
    yield from _images("tiny", 8, 32, 8)
    yield from _images("few", 16, 3, 512)


CASES = {case.name: case for case in _cases()}
