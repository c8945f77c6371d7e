"""Collection, and shared fixtures.

TensorFlow and others take seconds to import, so their tests are only looked at when they are asked for.
"""

import os
from pathlib import Path

import pytest

from nbbn.compat import v1
from nbbn.runtime import thread_limit

MOST_PROCESSES = 4  # each has some 600 MB


def pytest_configure(config: pytest.Config) -> None:
    """Rules compute what they then drop (inf - inf, inf * 0). Machine code says nothing of it, and kernels in plain
    Python run with such warnings off; in Numba's simulator they run in threads of its own."""
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        config.addinivalue_line("filterwarnings", "ignore:.*invalid value encountered:RuntimeWarning")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process for each core where all tests run; 0, which is this one, for what somebody has named: it is there at
    once, and what starts processes or loads frameworks has its marker."""
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    chosen = config.getoption("markexpr") in ("parity", "frozen", "distributed", "frameworks")
    return min(thread_limit(), MOST_PROCESSES) if everything and not chosen else 0


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    folder = collection_path.name
    return True if folder in ("parity", "frameworks") and config.getoption("markexpr") != folder else None


@pytest.fixture(autouse=True)
def _fresh_graph():
    """No test leaves variables in the default graph: the pages' examples share the process with all tests."""
    yield
    v1.reset_default_graph()
