"""nbbn in a program that PyInstaller has built: no source files, and an executable that is not Python."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from tests.helpers.processes import PACKAGE, TESTS

PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
import numpy as np, nbbn, nbbn.info
layer = nbbn.BatchNormalization(dtype="bfloat16")
nbbn.warmup(layer, (1024, 1024))
y = layer(np.ones((4, 3)))
print(y.dtype.name, float(y[0, 0]))
print([m for m in ("torch", "jax", "tensorflow", "sklearn", "matplotlib") if m in sys.modules])
print(*nbbn.info.lines(), sep="\\n")
"""


def test_the_hook_is_found():
    """PyInstaller imports what the entry point names."""
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["pyinstaller40"]["hook-dirs"].split(":")
    (folder,) = getattr(import_module(module), function)()
    assert (Path(folder) / "hook-nbbn.py").is_file()


@pytest.mark.frozen
def test_a_program_of_pyinstallers(tmp_path):
    """It compiles once, loads afterwards, and brings no library along that only nbbn would have imported."""
    (tmp_path / "program.py").write_text(PROGRAM)
    build = [*("-m", "PyInstaller", "--noconfirm", "--log-level", "ERROR"), "program.py"]
    paths = [*("--paths", str(PACKAGE.parent)), *("--additional-hooks-dir", str(PACKAGE / "__pyinstaller"))]
    subprocess.run([sys.executable, *build, *paths], cwd=tmp_path, check=True, timeout=900)
    folder = tmp_path / "dist" / "program"
    assert not [p.name for p in (folder / "_internal").iterdir() if p.name in ("torch", "jax", "tensorflow", "sklearn")]
    for first in (True, False):
        done = subprocess.run(
            [folder / "program"],
            env={"NBBN_CACHE_DIR": str(tmp_path / "cache"), "NUMBA_NUM_THREADS": "2"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        lines = done.stdout.splitlines()
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert any(line.startswith("compiled rows_infer") for line in lines) == first
        assert {"bfloat16 1.0", "[]"} <= set(lines)
        assert any(line.startswith(f"kernel cache     {tmp_path / 'cache'} (") for line in lines)
