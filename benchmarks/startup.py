"""How long a new process needs for its first training call, with an empty and with a warm compile cache."""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import machine

SHAPES = {"small (32, 64)": (32, 64), "large (32, 64, 56, 56)": (32, 64, 56, 56)}
_PROGRAM = """
import time
start = time.perf_counter()
import numpy as np
import nbbn
nbbn.BatchNormalization(axis=1)(np.zeros({shape}, np.float32), training=True)
print(time.perf_counter() - start)
"""


def measure(repetitions: int, patience: float) -> dict[str, dict[str, list[float]]]:
    """Seconds from before `import nbbn` to after the call, per shape: {"cold": [...], "warm": [...]}.

    patience: seconds that each process may wait for a quiet CPU.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for name, shape in SHAPES.items():
        times = found[name] = {"cold": [], "warm": []}
        for _ in range(repetitions):
            with tempfile.TemporaryDirectory() as cache:
                for state in times:
                    machine.wait_until_quiet(patience)
                    times[state].append(_first_call(shape, cache))
    return found


def medians(times: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {name: {state: statistics.median(t) for state, t in states.items()} for name, states in times.items()}


def _first_call(shape: tuple[int, ...], cache: str) -> float:
    """Raises: subprocess.CalledProcessError, TimeoutExpired."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(shape=shape)],
        env={**os.environ, "NBBN_CACHE_DIR": cache},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return float(done.stdout)
