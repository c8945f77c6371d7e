"""What the system tells about the processor: what its caches hold, and how much of it this process may use."""

import os
from functools import lru_cache
from pathlib import Path

_USUAL = {2: 1 << 20, 3: 32 << 20}
# Of the last level, for each core: what says more is the cache of a host of which this machine has a part. With two
# cores of a host with 480 MB, results past the caches are faster from about 100 MB on.
_MOST_PER_CORE = 48 << 20


@lru_cache(maxsize=1)
def cache_sizes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[int, int]:
    """Bytes of the first core's data caches by level; usual sizes where the system does not tell."""
    found = {}
    for folder in root.glob("index*"):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                found[int(level)] = int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]]
        except (OSError, ValueError, LookupError):
            continue
    return found if len(found) > 1 else _USUAL


def last_level_cache() -> int:
    """Bytes of the largest cache that this machine's cores may hope for."""
    return min(max(cache_sizes().values()), _MOST_PER_CORE * (os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> tuple[int, Path | None]:
    """How many CPUs' time the control groups of this process leave it, rounded up, and the file that says so.

    Every group on the way up to the root has a say, and the smallest quota counts. A huge number and None without any.
    """
    # A container may see its own group as the root, where the path of `own` does not exist.
    found = [q for base, path in _groups(root, own) for f in ("", *_prefixes(path)) if (q := _quota(base / f))]
    return min(found, default=(1 << 20, None))


def _groups(root: Path, own: Path) -> list[tuple[Path, str]]:
    """Where each version of control groups has its root, and the path of this process's group below it."""
    paths: dict[str, str] = {}
    try:
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            paths |= dict.fromkeys(controllers.split(","), path)
    except (OSError, ValueError):
        pass
    of_version_1 = [(root / name, paths.get("cpu", "")) for name in ("cpu", "cpu,cpuacct")]
    return [(root, paths.get("", "")), *of_version_1]


def _prefixes(path: str) -> list[str]:
    """a, a/b, a/b/c of /a/b/c."""
    parts = path.strip("/").split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _quota(group: Path) -> tuple[int, Path] | None:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # of version 2, and of version 1
        try:
            quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
        except (OSError, ValueError):  # "max" is no number
            continue
        if quota > 0 and period > 0:  # -1: none, in version 1
            return -(-quota // period), group / names[0]
    return None
