"""The named cases on a GPU, and the least that each must move through its memory."""

import math
from collections.abc import Iterable
from dataclasses import replace

from benchmarks.cases import ITEM_SIZES, STAGES, Case, both_layouts

BATCH = 256


def least_bytes(case: Case, mode: str, cache: int) -> int:
    """As Case.least_bytes, for a GPU with an L2 cache of `cache` bytes: it works on all channels at once."""
    return case.least_bytes(mode, cache, by_channel=False)


def launches(case: Case, mode: str) -> int:
    """Of kernels, which nbbn makes for a dense array that is aligned."""
    from nbbn.engine.cuda.schedule import Thresholds, choose

    if mode == "inference":
        return 1
    (axis,) = case.kept
    outer, inner = math.prod(case.shape[:axis]), math.prod(case.shape[axis + 1 :])
    view = (1, 1, outer, case.channels) if inner == 1 else (outer, case.channels, inner, 1)
    return 1 if choose(view, 1, 1, ITEM_SIZES[case.dtype], [], Thresholds()).one_launch else 2


def _cases() -> Iterable[Case]:
    for i, (channels, side) in STAGES.items():
        for case in both_layouts(f"resnet{i}", BATCH, channels, side, side):
            yield case
            # bfloat16 has the traffic of float16: a large, a middle and a small stage will show another difference.
            for dtype in ("float16", "bfloat16") if i in (1, 3, 5) else ("float16",):
                yield replace(case, name=f"{case.name}-{dtype}", dtype=dtype)
    for rows, columns in ((262144, 1024), (65536, 128), (8192, 4096), (1024, 1024), (32, 64)):
        yield Case(f"dense-{rows}x{columns}", (rows, columns))
    yield Case("dense-262144x1024-float16", (262144, 1024), dtype="float16")
    yield from both_layouts("small", 32, 64, 28, 28)
    yield from both_layouts("tiny", 8, 32, 8, 8)
    yield from both_layouts("few", 16, 3, 512, 512)


CASES = {case.name: case for case in _cases()}
