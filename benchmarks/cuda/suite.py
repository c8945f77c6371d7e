"""A run on a GPU: every selected case in every mode by every contender, checked before it is timed."""

import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import machine, suite
from benchmarks.cases import Case
from benchmarks.cuda import bounds, peers
from benchmarks.cuda.cases import launches, least_bytes
from benchmarks.cuda.problem import Problem, check
from benchmarks.cuda.timing import Device, Gpu, measure, measure_calls
from benchmarks.peers import OWN, find
from benchmarks.suite import Entrant, Plan, Progress, Report, admit, run_cases
from nbbn.arrays import availability

SMALL = 1 << 20  # bytes of an input whose calls are timed by the host's clock, too
PACKAGES = ("numba-cuda", "cuda-core", "cuda-bindings", "torch", "triton", "jax", "jaxlib")


def find_torch() -> Any:
    """PyTorch, which holds the arrays. Raises: RuntimeError, with what is missing, where it or a GPU is not there."""
    availability.require("python -m benchmarks cuda")
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        raise RuntimeError(
            "python -m benchmarks cuda needs PyTorch, which holds the arrays: pip install torch"
        ) from None
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"python -m benchmarks cuda needs a PyTorch that sees the GPU; {torch.__version__} sees none"
        )
    return torch


def find_peers(names: Iterable[str] | None) -> dict[str, peers.Prepare]:
    """As benchmarks.peers.find."""
    # JAX would take most of the GPU's memory when it is first used.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    def load(name: str) -> peers.Prepare:
        importlib.import_module(name)
        return peers.PEERS[name]

    return find(names, peers.PEERS, load)


def describe(torch: Any) -> dict[str, Any]:
    """JSON-serializable facts about the machine, its GPU and the versions."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return machine.describe(machine.versions(PACKAGES)) | {
        "gpu": {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2_cache": properties.L2_cache_size,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    }


def _driver() -> str | None:
    try:
        lines = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return lines[0].partition(":")[2].strip()


def run(plan: Plan, output: Path, progress: Progress = lambda name, done: None) -> Report:
    """Measure, and write the report as JSON after every case. progress: see benchmarks.suite.run_cases."""
    torch = find_torch()
    device = Gpu(torch)
    report: Report = {"machine": describe(torch), "effort": vars(plan.effort), "results": []}

    def prepare(case: Case) -> Callable[[str], dict[str, Any]]:
        problem = Problem(case, torch)

        def time(mode: str) -> dict[str, Any]:
            result = time_mode(problem, mode, plan, device, report["machine"]["gpu"]["l2_cache"])
            torch.cuda.empty_cache()
            return result

        return time

    return run_cases(plan, report, prepare, bounds.rows, output, progress)


def time_mode(problem: Problem, mode: str, plan: Plan, device: Device, cache: int) -> dict[str, Any]:
    """The report of one case in one mode. Raises: WrongResult if nbbn's result is."""
    case = problem.case
    entrants, left_out = enter(problem, mode, plan.peers)
    contenders = {name: e.contender for name, e in entrants.items()} | {bounds.COPY: peers.copy_contender(problem)}
    samples = measure(contenders, plan.effort, device)
    calls = measure_calls(contenders, plan.effort, device) if case.bytes <= SMALL else {}
    least = least_bytes(case, mode, cache)
    limit = samples[bounds.COPY].median * least / (2 * case.bytes)
    result = suite.describe(case, mode, least, limit, samples, entrants)
    called = {name: sample._asdict() for name, sample in calls.items()}
    return result | {"launches": launches(case, mode), "calls": called, "left_out": left_out}


def enter(
    problem: Problem, mode: str, others: Mapping[str, peers.Prepare]
) -> tuple[dict[str, Entrant], dict[str, str]]:
    """What to time, and why the rest is not: see benchmarks.suite.admit. Whatever ails a peer, the run goes on."""
    verify = partial(check, expected=problem.expected(mode), case=problem.case)
    own, _ = admit({OWN: peers.nbbn_forms}, problem, mode, verify)
    entrants, left_out = admit(others, problem, mode, verify, excused=(Exception,))
    return own | entrants, left_out
