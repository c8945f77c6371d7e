"""Flax's own tests, where its source archive is: `pip download --no-deps --no-binary flax flax==…`, unpacked."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nbbn

pytestmark = pytest.mark.frameworks


@pytest.mark.skipif("NBBN_FLAX_TESTS" not in os.environ, reason="NBBN_FLAX_TESTS names no folder of Flax's tests")
def test_flaxs_own_tests():
    """All but two of linen's complex inputs and one of its summaries (flax_conformance.py says why)."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "flax_conformance.py"), os.environ["NBBN_FLAX_TESTS"]],
        env=os.environ | {"PYTHONPATH": str(Path(nbbn.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-5000:]}\n{done.stderr[-20000:]}"
    assert re.fullmatch(r"passed 2\d\d, unable 3, failed 0", done.stdout.splitlines()[-1])
