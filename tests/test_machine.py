"""What the system tells about the processor, and what is assumed where it does not."""

import pytest

from nbbn.runtime import last_level_cache, machine

DESCRIPTIONS = [
    (
        [("1", "Data", "32K"), ("1", "Instruction", "64K"), ("2", "Unified", "1024K"), ("3", "Unified", "32768K")],
        {1: 2**15, 2: 2**20, 3: 2**25},
    ),
    ([("1", "Data", "48K"), ("2", "Unified", "2M")], {1: 48 << 10, 2: 2**21}),
    ([("1", "Data", "48K")], machine._USUAL),
    ([("1", "Data", "nonsense"), ("2", "Unified", "")], machine._USUAL),
    ([], machine._USUAL),
]


@pytest.mark.parametrize(("caches", "expected"), DESCRIPTIONS, ids=str)
def test_cache_sizes(tmp_path, caches, expected):
    for i, values in enumerate(caches):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size"), values, strict=True):
            (folder / name).write_text(value + "\n")
    assert machine.cache_sizes.__wrapped__(tmp_path) == expected


@pytest.mark.parametrize(("cores", "expected"), [(None, 48), (1, 48), (2, 96), (12, 480)])
def test_last_level_cache_of_a_host_is_shared(monkeypatch, cores, expected):
    monkeypatch.setattr(machine, "cache_sizes", lambda: {1: 48 << 10, 2: 2 << 20, 3: 480 << 20})
    monkeypatch.setattr(machine.os, "cpu_count", lambda: cores)
    assert last_level_cache() == expected << 20


def test_last_level_cache_of_this_machine():
    assert 2**15 <= last_level_cache() <= max(machine.cache_sizes().values())


# What the files of control groups say, the group of the process, and how many CPUs that is. V1, V2: how
# /proc/self/cgroup names it in either version.
V1, V2 = "3:cpuset:/x\n2:cpu,cpuacct:{}\n", "1:name=systemd:/x\n0::{}\n"
GROUPS = [
    ({"cpu.max": "150000 100000\n"}, "", 2),
    ({"cpu.max": "100000 100000\n"}, "", 1),
    ({"cpu.max": "1600000 100000\n"}, V2.format("/"), 16),
    ({"cpu.max": "1000 100000\n"}, "", 1),
    ({"cpu.max": "max 100000\n"}, "", None),
    ({"cpu.max": ""}, "", None),
    ({"cpu.max": "max\n"}, "", None),
    ({"cpu.max": "nonsense 100000\n"}, "nonsense", None),
    ({"cpu.max": "100000 0\n"}, "", None),
    ({"cpu/cpu.cfs_quota_us": "350000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "", 4),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, V1.format("/"), None),
    ({"cpu/cpu.cfs_quota_us": "350000\n"}, "", None),
    ({"cpu,cpuacct/cpu.cfs_quota_us": "350000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, V1.format("/"), 4),
    ({}, "", None),
    # nested: the smallest on the way up counts
    ({"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "200000 100000\n"}, V2.format("/a/b"), 2),
    ({"a/b/cpu.max": "100000 100000\n", "a/cpu.max": "200000 100000\n"}, V2.format("/a/b"), 1),
    ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, V2.format("/a/b"), 2),
    ({"a/b/cpu.max": "100000 100000\n", "a/cpu.max": "200000 100000\n"}, V2.format("/a"), 2),
    ({"cpu.max": "500000 100000\n"}, V2.format("/not/seen/in/here"), 5),
    ({"cpu.max": "500000 100000\n"}, V2.format("/../../elsewhere"), 5),
    (
        {
            **{"cpu/a/b/cpu.cfs_quota_us": "350000", "cpu/a/b/cpu.cfs_period_us": "100000"},
            **{"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "50000"},
        },
        V1.format("/a/b"),
        2,
    ),
]


@pytest.mark.parametrize(("contents", "group", "expected"), GROUPS, ids=str)
def test_cpu_quota(tmp_path, contents, group, expected):
    root, own = tmp_path / "root", tmp_path / "own"
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    if group:
        own.write_text(group)
    cpus, file = machine.cpu_quota(root, own)
    if expected is None:
        assert (cpus >= 1 << 20, file) == (True, None)
    else:
        assert cpus == expected
        assert str(file.relative_to(root)) in contents
