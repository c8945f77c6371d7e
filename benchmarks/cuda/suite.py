"""A run on a GPU: every selected case in every mode by every contender, checked before it is timed."""

import importlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.cases import Case
from benchmarks.cuda import bounds, peers
from benchmarks.cuda.cases import least_bytes
from benchmarks.cuda.problem import Problem, check
from benchmarks.cuda.timing import Contender, Device, Gpu, measure, measure_calls
from benchmarks.peers import OWN, CannotDo
from benchmarks.problem import WrongResult
from benchmarks.timing import Effort
from nbbn.gpu import availability

Progress = Callable[[str, int], None]

SMALL = 1 << 20  # bytes of an input whose calls are timed by the host's clock, too
PACKAGES = ("numba-cuda", "cuda-core", "cuda-bindings", "torch", "triton", "jax", "jaxlib")


@dataclass(frozen=True)
class Plan:
    """What to run. `peers` by name, nbbn not among them."""

    cases: list[Case]
    modes: tuple[str, ...]
    peers: tuple[str, ...]
    effort: Effort

    @property
    def steps(self) -> int:
        """How many pairs of case and mode there are."""
        return len(self.cases) * len(self.modes)


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


def find_peers(names: Iterable[str] | None) -> tuple[str, ...]:
    """The peers of these names, or of those that are installed.

    Raises: ValueError for an unknown name; ImportError for one that was asked for and is not installed.
    """
    # JAX would take most of the GPU's memory when it is first used.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if names is None:
        return tuple(name for name in peers.PEERS if find_spec(name) is not None)
    for name in (names := list(names)):
        if name not in peers.PEERS:
            raise ValueError(f"no peer is called {name!r}; there are: {', '.join(peers.PEERS)}")
    for name in names:
        importlib.import_module(name)
    return tuple(names)


def describe(torch: Any) -> dict[str, Any]:
    """JSON-serializable facts about the machine, its GPU and the versions."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return machine.describe(versions) | {
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


def run(plan: Plan, output: Path, progress: Progress = lambda name, done: None) -> dict[str, Any]:
    """Measure, and write the report as JSON after every case. progress: see benchmarks.suite.run."""
    torch = find_torch()
    device = Gpu(torch)
    report: dict[str, Any] = {"machine": describe(torch), "effort": vars(plan.effort), "results": []}
    for case in plan.cases:
        problem = Problem(case, torch)
        for mode in plan.modes:
            progress(f"{case.name} {mode}", len(report["results"]))
            report["results"].append(time_mode(problem, mode, plan, device, report["machine"]["gpu"]["l2_cache"]))
            torch.cuda.empty_cache()
        save(report, output)
    return report


def save(report: dict[str, Any], output: Path) -> None:
    report["bounds"] = bounds.rows(report)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def time_mode(problem: Problem, mode: str, plan: Plan, device: Device, cache: int) -> dict[str, Any]:
    """The report of one case in one mode. Raises: WrongResult if nbbn's result is."""
    case = problem.case
    contenders, errors, left_out = enter(problem, mode, plan.peers)
    contenders[bounds.COPY] = peers.copy_contender(problem)
    samples = measure(contenders, plan.effort, device)
    calls = measure_calls(contenders, plan.effort, device) if case.bytes <= SMALL else {}
    least = least_bytes(case, mode, cache)
    return {
        "case": case.name,
        "mode": mode,
        "shape": case.shape,
        "axis": case.kept,
        "dtype": case.dtype,
        "bytes": case.bytes,
        "least_bytes": least,
        "limit": samples[bounds.COPY].median * least / (2 * case.bytes),
        "contenders": {n: s._asdict() | ({"error": errors[n]} if n in errors else {}) for n, s in samples.items()},
        "calls": {name: sample._asdict() for name, sample in calls.items()},
        "left_out": left_out,
    }


def enter(
    problem: Problem, mode: str, names: Iterable[str]
) -> tuple[dict[str, Contender], dict[str, float], dict[str, str]]:
    """What to time by "library/form", the errors of its results, and why the rest is not timed.

    Raises: WrongResult if nbbn's result is wrong; whatever keeps nbbn from a result.
    """
    expected = problem.expected(mode)
    contenders: dict[str, Contender] = {}
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for library, prepare in {OWN: peers.nbbn_forms, **{n: peers.PEERS[n] for n in names}}.items():
        try:
            forms = prepare(problem, mode)
        except Exception as error:  # whatever ails a peer must not end an hour's run
            if library == OWN:
                raise
            left_out[library] = _reason(error)
            continue
        for form, contender in forms.items():
            name = f"{library}/{form}"
            try:
                errors[name] = check(contender.read(contender.call()), expected, problem.case)
                contenders[name] = contender
            except Exception as error:
                if library == OWN:
                    raise WrongResult(f"{problem.case.name} {mode} {form}: {error}") from error
                left_out[name] = _reason(error)
    return contenders, errors, left_out


def _reason(error: Exception) -> str:
    """What stands in the report's table."""
    kind = {WrongResult: "wrong result: ", CannotDo: ""}.get(type(error), f"{type(error).__name__}: ")
    lines = str(error).strip().splitlines()
    return kind + (lines[0][:200].replace("|", "/") if lines else "")
