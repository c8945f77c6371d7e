"""python -m nbbn, most of it in processes of its own."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

import nbbn
from nbbn.__main__ import main

ROOT = Path(nbbn.__file__).parent.parent
NOT_FROM_OUTSIDE = ("NBBN_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_ENABLE_CUDASIM")
BLOCKED = "import sys; sys.modules[{module!r}] = None; from nbbn.__main__ import main; sys.exit(main({arguments!r}))"


def python(*arguments, **variables):
    """The finished process of `python arguments` with these variables in its environment."""
    environment = {k: v for k, v in os.environ.items() if k not in NOT_FROM_OUTSIDE}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **variables}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def facts(process):
    """What info printed, by name; checks that the values are aligned."""
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    column = re.match(r"nbbn +", lines[0]).end()
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)
    return {line[:column].strip(): line[column:] for line in lines}


def test_info(tmp_path):
    (tmp_path / "a.kernel").write_bytes(bytes(2_500_000))
    tmp_path.chmod(0o700)
    found = facts(python("-W", "error", "-m", "nbbn", "info", NBBN_CACHE_DIR=str(tmp_path), NBBN_NUM_THREADS="1"))
    assert found["nbbn"].startswith(nbbn.__version__)
    assert found["Python"].startswith(sys.version.split()[0])
    assert found["NumPy"] == np.__version__
    assert found["Numba"] == numba.__version__
    assert set(re.findall(r"\w+ (yes|no)", found["CPU features"])) <= {"yes", "no"}
    assert found["threading layer"] in ("tbb", "omp", "workqueue")
    assert found["threads"].startswith("1 (by ")
    assert "NBBN_NUM_THREADS" in found["threads"]
    assert found["kernel cache"] == f"{tmp_path} (1 kernels, 2.5 MB)"
    assert found["GPU"].startswith("none: ") or "compute capability" in found["GPU"]
    assert not [value for value in found.values() if value.startswith("error")]


def test_info_shows_what_is_broken_and_all_the_rest():
    found = facts(python("-m", "nbbn", "info", NBBN_NUM_THREADS="many", NBBN_CACHE_DIR=""))
    assert found["threads"] == "error: NBBN_NUM_THREADS must be a positive integer; received 'many'"
    assert found["kernel cache"] == "none: NBBN_CACHE_DIR is empty"
    assert found["GPU"]


def test_info_says_which_instructions_are_used():
    found = facts(python("-m", "nbbn", "info", NUMBA_CPU_NAME="generic"))
    assert "NUMBA_CPU_NAME=generic" in found["CPU"]
    if "f16c" in found["CPU features"] and platform.machine() in ("x86_64", "AMD64"):
        assert found["float16"] == "converted by integer arithmetic"


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [("numba_cuda", "GPU", "none: "), ("numba.cuda", "GPU", "none: "), ("ml_dtypes", "ml_dtypes", "not installed")],
)
def test_info_without(module, name, value):
    found = facts(python("-c", BLOCKED.format(module=module, arguments=["info"])))
    assert found[name].startswith(value)


def test_info_lists_devices():
    """Numba's simulator stands for a GPU."""
    assert "compute capability" in facts(python("-m", "nbbn", "info", NUMBA_ENABLE_CUDASIM="1"))["GPU"]


def test_help():
    done = python("-m", "nbbn", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m nbbn")
    assert {"demo", "info"} <= set(done.stdout.split())


def test_no_command():
    done = python("-m", "nbbn")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: python -m nbbn")
    assert {"demo", "info"} <= set(done.stderr.split())


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"nbbn {nbbn.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "'train'"),
        (["demo", "--seeds", "0"], "--seeds: must be a positive integer; received '0'"),
        (["demo", "--seeds", "two"], "--seeds: must be a positive integer; received 'two'"),
        (["demo", "--output", "no/such/folder/x.png"], "must be a file that can be written; received 'no/such/"),
        (["demo", "--output", "."], "must be a file that can be written; received '.'"),
        (["info", "--quick"], "--quick"),
    ],
)
def test_what_cannot_be_understood(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "tqdm"])
def test_demo_without_the_extra(module):
    done = python("-c", BLOCKED.format(module=module, arguments=["demo"]))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("the demo needs scikit-learn, matplotlib and tqdm (")
    assert done.stderr.endswith(": pip install nbbn[demo]\n")


def test_imports_are_lazy():
    code = "import sys, nbbn.__main__, nbbn.info, nbbn.demo; print(*sys.modules)"
    loaded = set(python("-c", code).stdout.split())
    assert "nbbn.demo.training" in loaded
    assert not loaded & {"sklearn", "matplotlib", "tqdm", "threadpoolctl", "ml_dtypes", "numba.cuda"}
