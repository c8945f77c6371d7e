"""Collection, and shared fixtures.

TensorFlow takes seconds to import, so its tests are only looked at when they are asked for.
"""

from pathlib import Path

import pytest

from nbbn.compat import v1


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked_for = config.getoption("markexpr") == "parity"
    return None if asked_for or collection_path.name != "parity" else True


@pytest.fixture
def fresh_graph():
    """A default graph without variables, before and after."""
    v1.reset_default_graph()
    yield
    v1.reset_default_graph()
