"""SyncBatchNormalization in processes, over MPI and torch.distributed: all cases and failures of tests/helpers.

Processes start slowly, so each runs a whole program, tests/helpers/rank_program.py.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import nbbn
from tests.helpers.benchmarks import run_benchmarks
from tests.helpers.processes import TESTS
from tests.helpers.rank_cases import check_every_case
from tests.helpers.ranks import on_ranks

pytestmark = pytest.mark.distributed

LIMIT = 300  # seconds, for a program of some ten seconds where each process has a core
EXAMPLE = TESTS.parent / "docs/examples/distributed.py"
MPIEXEC = Path(sys.executable).with_name("mpiexec")
# As root, as in containers, and with more processes than cores.
ALLOWED = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def start(command, **variables):
    """In a session of its own, which ends as a whole."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=TESTS, start_new_session=True, **pipes)


def end(processes, limit=LIMIT):
    """(exit code, output) of each. Fails if they have not ended in time, and ends them then."""
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=limit)
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    return found


def mpiexec():
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is missing (extra: distributed)")
    command = MPIEXEC if MPIEXEC.exists() else shutil.which("mpiexec")
    if command is None:
        pytest.skip("mpiexec is missing (extra: distributed)")
    return str(command)


def over_mpi(n, *program):
    ((code, out, err),) = end([start([mpiexec(), "-n", str(n), sys.executable, *program], **ALLOWED)])
    assert code == 0, f"{out}\n{err}"
    return out


def over_gloo(n, *program, **variables):
    """What each rank has returned."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is missing (extra: distributed)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), **variables}
    return end([start([sys.executable, *program], **group, RANK=str(rank)) for rank in range(n)])


PROGRAM = ("-W", "error", "-m", "tests.helpers.rank_program")


@pytest.fixture(scope="module")
def states():
    """The digests of all states, of threads."""
    found = {}
    for n in (2, 3, 4):
        digests = on_ranks(nbbn.sync.threads(n, timeout=30), check_every_case)[0]
        found |= {f"{n}, {name}, {kind}": digest for (name, kind), digest in digests.items()}
    return found


def test_everything_over_mpi(states):
    """With the same bits as in threads: on 4 ranks, and on communicators of 3 and of 2 of them."""
    assert json.loads(over_mpi(4, *PROGRAM, "mpi", "everything")) == states


def test_everything_over_gloo(states):
    results = over_gloo(4, *PROGRAM, "gloo", "everything")
    assert [code for code, _, _ in results] == [0] * 4, "\n".join(err for _, _, err in results)
    assert json.loads(results[0][1]) == states


def test_a_late_rank_over_mpi():
    """It finds what the others had sent, and learns in its next call that they have left; all processes end."""
    assert json.loads(over_mpi(3, *PROGRAM, "mpi", "late")) == ["done", "SyncError"]


def test_a_late_rank_over_gloo():
    """Whose groups end with their first timeout."""
    results = over_gloo(3, *PROGRAM, "gloo", "late")
    assert [code for code, _, _ in results] == [0] * 3, "\n".join(err for _, _, err in results)
    assert json.loads(results[0][1]) == ["SyncError", "SyncError"]


def test_two_groups_of_one_process_group():
    results = over_gloo(3, *PROGRAM, "gloo", "sharing")
    assert [code for code, _, _ in results] == [0] * 3, "\n".join(err for _, _, err in results)
    assert json.loads(results[0][1]) == "done"


def test_a_killed_rank_over_gloo():
    results = over_gloo(3, *PROGRAM, "gloo", "killed")
    assert [code for code, _, _ in results] == [0, 0, -signal.SIGKILL], "\n".join(err for _, _, err in results)
    assert [out for _, out, _ in results] == ["survived\n", "survived\n", ""]


def test_a_killed_rank_over_mpi():
    """Where MPI does not end the others, too."""
    command = [mpiexec(), "--enable-recovery", "-n", "3", sys.executable, *PROGRAM, "mpi", "killed"]
    ((_, out, err),) = end([start(command, **ALLOWED)])
    assert out == "survived\n" * 2, err


def test_the_example():
    """It learns, and ranks do not drift apart; with one rank it learns the same."""
    for n in (1, 2):
        found = re.fullmatch(r"(\d) ranks, accuracy (\S+), the same weights on all: True\n", over_mpi(n, str(EXAMPLE)))
        assert found is not None
        assert int(found[1]) == n
        assert float(found[2]) > 0.95


def test_the_benchmark_of_exchanges():
    """It runs, and its table has a row for each combination."""
    printed = run_benchmarks("sync", "--ranks", "1", "2", "--channels", "8", "--transports", "mpi", "gloo")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in printed.splitlines()[2:]]
    assert [cell[:3] for cell in cells] == [[t, n, "8"] for t in ("mpi", "gloo") for n in ("1", "2")]
    assert all(float(cell[4]) > 0 for cell in cells)
