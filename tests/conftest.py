"""Collection, and shared fixtures.

TensorFlow takes seconds to import, so its tests are only looked at when they are asked for.
"""

import os
from pathlib import Path

import pytest

from nbbn.compat import v1


def pytest_configure(config: pytest.Config) -> None:
    """Rules compute what they then drop (inf - inf, inf * 0). Machine code says nothing of it, and kernels in plain
    Python run with such warnings off; in Numba's simulator they run in threads of its own."""
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        config.addinivalue_line("filterwarnings", "ignore:.*invalid value encountered:RuntimeWarning")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked_for = config.getoption("markexpr") == "parity"
    return None if asked_for or collection_path.name != "parity" else True


@pytest.fixture
def fresh_graph():
    """A default graph without variables, before and after."""
    v1.reset_default_graph()
    yield
    v1.reset_default_graph()
