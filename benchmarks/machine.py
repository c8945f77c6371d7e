"""What a run's numbers belong to: the machine and the versions."""

import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import nbbn
from nbbn import info
from nbbn.runtime import last_level_cache, thread_limit
from nbbn.runtime.machine import cache_sizes

PACKAGES = ("numpy", "numba", "llvmlite", "ml_dtypes", "onnx", "jaxlib", "tbb")
QUIET = 0.05  # share of the CPU time that other processes may use while something is timed


class Others:
    """The share of the machine's CPU time that other processes have used since this was made."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: busy cores, summed; this process; the clock. None where there is no /proc."""
        try:
            with open("/proc/stat", encoding="ascii") as file:
                user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
        except (OSError, ValueError):
            return None
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, time.process_time(), time.monotonic()

    def share(self) -> float | None:
        now = self._now()
        if self._start is None or now is None:
            return None
        busy, own, passed = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, (busy - own) / (passed * (os.cpu_count() or 1)))


def wait_until_quiet(patience: float) -> float:
    """Return when other processes leave the CPU alone, after `patience` seconds at the latest. Returns those waited."""
    start = time.monotonic()
    while time.monotonic() - start < patience:
        others = Others()
        time.sleep(0.5)
        share = others.share()
        if share is None or share <= QUIET:
            break
    return time.monotonic() - start


def describe(peers: Mapping[str, str]) -> dict[str, Any]:
    """JSON-serializable facts. `peers`: the versions of those that take part."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": info.cpu(),
        "cpu_features": info.cpu_features(),
        "cores": os.cpu_count(),
        "threads": thread_limit(),
        "threading_layer": info.threading_layer(),
        "caches": {f"L{level}": size for level, size in sorted(cache_sizes().items())},
        "last_level_cache": last_level_cache(),
        "memory": _memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "nbbn": nbbn.__version__,
        "commit": _commit(),
        "versions": {**versions(PACKAGES), **peers},
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _memory() -> int | None:
    """Bytes; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _commit() -> str | None:
    """The commit that is measured, with "-dirty" for a changed tree; None outside a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
