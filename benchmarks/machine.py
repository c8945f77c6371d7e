"""What a run's numbers belong to: the machine and the versions."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import nbbn
from nbbn import info
from nbbn.runtime import last_level_cache, thread_limit
from nbbn.runtime.machine import cache_sizes

PACKAGES = ("numpy", "numba", "llvmlite", "ml_dtypes", "onnx", "jaxlib", "tbb")
T = TypeVar("T")
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


def is_disturbed(result: Mapping[str, Any]) -> bool:
    """Whether other processes used the CPU while this was measured; `others` is their share, None if unknown."""
    return (result["others"] or 0) > QUIET


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


def in_quiet(measure: Callable[[], T], patience: float) -> tuple[T, float | None]:
    """What `measure` returns, and the share of the CPU that other processes used meanwhile.

    While `patience` seconds last, it waits for them and measures again what they have disturbed.
    """
    while True:
        start, others = time.monotonic(), Others()
        found, share = measure(), others.share()
        patience -= time.monotonic() - start
        if share is None or share <= QUIET or patience <= 0:
            return found, share
        patience -= wait_until_quiet(patience)


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
