"""NUMBA_DISABLE_JIT=1: the kernels run in plain Python. In processes of their own, as Numba decides at its import."""

import os
import subprocess
import sys

from tests.helpers.processes import TESTS, run

# Training, inference and gradients of every loop and dtype, against the reference. .ci/run runs more that way.
CHOSEN = ["tests/test_layer_pullback.py", "tests/test_kernels.py", "-k", "pullback or inference or 16_bit"]


def test_results_are_right():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHOSEN],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


# Nothing here may warn: a constant, a large and a NaN channel, a single value without epsilon.
QUIET = """
import numpy as np, nbbn
layer = nbbn.BatchNormalization(epsilon=0.0)
x = np.array([[1, 1e38, np.nan], [1, -1e38, 1]], np.float32)
for _ in range(2):
    layer(x, training=True), layer(x)
print(nbbn.explain(layer, x).schedule.parallel)
"""


def test_it_is_said_once_and_nothing_else():
    import_alone = run("import nbbn, nbbn.compat.v1", "-W", "error", NUMBA_DISABLE_JIT="1")
    assert (import_alone.returncode, import_alone.stdout, import_alone.stderr) == (0, "", "")
    done = run(QUIET, "-W", "error", NUMBA_DISABLE_JIT="1", NBBN_CACHE_DIR="/nowhere")
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    assert done.stderr == "NUMBA_DISABLE_JIT is set: nbbn's kernels run in plain Python, very slowly\n"
