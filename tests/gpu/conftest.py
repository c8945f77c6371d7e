"""Where there is no GPU these tests are skipped, each with the reason."""

from functools import lru_cache
from importlib import import_module

import pytest

from nbbn.arrays import availability


@lru_cache
def why_not():
    """What is missing for these tests; None where nothing is."""
    missing = availability.missing()
    if missing is not None:
        return missing
    if import_module("nbbn.kernels.cuda.target").SIMULATED:
        return "Numba's simulator is no GPU"
    return None


@pytest.fixture(autouse=True)
def _gpu():
    reason = why_not()
    if reason is not None:
        pytest.skip(f"needs a GPU: {reason}")


@pytest.fixture
def torch(_gpu):
    module = pytest.importorskip("torch", reason="needs a PyTorch with CUDA")
    if not module.cuda.is_available():
        pytest.skip(f"needs a PyTorch that sees the GPU; {module.__version__} sees none")
    module.manual_seed(0)
    return module
