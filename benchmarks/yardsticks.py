"""What copying the same bytes takes: by NumPy, in one thread, and as nbbn's kernels write their results."""

from functools import lru_cache, partial
from typing import Any

import numba
import numpy as np

from benchmarks.problem import Problem
from benchmarks.timing import Call
from nbbn.kernels.cpu.lanes import BLOCK, fence, load, minimum, part, traced, write_run

COPYTO = "yardstick/copyto"
# Past the caches and through them: the faster one depends on the size.
COPIES = {"yardstick/streamed": True, "yardstick/buffered": False}
NAMES = (COPYTO, *COPIES)
PARALLEL_BYTES = 1 << 19  # as the kernels: below, a parallel loop costs more than it saves
TASK = 64 * BLOCK


@traced
def copy_task(task, source, target, streamed):  # type: ignore[no-untyped-def]  # they are what Numba has
    """Copy at most TASK elements as the kernels write their results: the fastest that a kernel can be."""
    begin = task * TASK
    end = minimum(source.size, begin + TASK)
    run, copy = part(source, (), begin, end), part(target, (), begin, end)
    write_run([copy], lambda i, n: [load(run, i, n)], streamed, [])
    fence()


def prepare(problem: Problem) -> dict[str, Call]:
    """Copies of one array of the input's size to another.

    Raises: RuntimeError if one does not copy.
    """
    source = problem.x.reshape(-1).view(np.uint8)
    target = np.empty_like(source)
    found: dict[str, Call] = {COPYTO: lambda: np.copyto(target, source)}
    words, copied = source.view(np.float32), target.view(np.float32)
    parallel = source.nbytes >= PARALLEL_BYTES
    for name, streamed in COPIES.items():
        found[name] = partial(_compiled(parallel), words, copied, streamed)
        target[...] = 0
        found[name]()
        if not np.array_equal(source, target):
            raise RuntimeError(f"{name} does not copy")
    return found


@lru_cache
def _compiled(parallel: bool) -> Any:
    """copy(source, target, streamed) of flat float32 arrays."""

    def copy(source, target, streamed):  # type: ignore[no-untyped-def]  # Numba infers them
        for task in numba.prange(-(-source.size // TASK)):
            copy_task(task, source, target, streamed)

    return numba.njit("void(float32[::1], float32[::1], int64)", nogil=True, parallel=parallel)(copy)


def limit(times: dict[str, float], least_bytes: int, array_bytes: int) -> tuple[float, str]:
    """The time that moving `least_bytes` takes at the speed of the fastest copy, and which copy that is.

    times: seconds for each yardstick, which moves 2 * array_bytes.
    """
    fastest = min(times, key=lambda name: times[name])
    return times[fastest] * least_bytes / (2 * array_bytes), fastest
