"""What the system tells about the processor's caches, and what is assumed where it does not."""

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


def test_last_level_cache():
    assert last_level_cache() == max(machine.cache_sizes().values()) >= 2**15
