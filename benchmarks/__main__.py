"""python -m benchmarks: measure, and report what was measured."""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from benchmarks import block, bounds, report, suite, sync
from benchmarks.calibrate import report as calibrate_report
from benchmarks.calibrate import suite as calibrate_suite
from benchmarks.calibrate.points import SUBJECTS
from benchmarks.cases import CASES, MODES, select
from benchmarks.cuda import bounds as cuda_bounds
from benchmarks.cuda import host as cuda_host
from benchmarks.cuda import report as cuda_report
from benchmarks.cuda import suite as cuda_suite
from benchmarks.cuda.cases import CASES as CUDA_CASES
from benchmarks.cuda.peers import PEERS as CUDA_PEERS
from benchmarks.frameworks import suite as frameworks
from benchmarks.machine import describe, versions
from benchmarks.peers import PEERS, find, load
from benchmarks.problem import WrongResult
from benchmarks.survey import bounds as survey_bounds
from benchmarks.survey import report as survey_report
from benchmarks.survey import suite as survey_suite
from benchmarks.threads import environment
from benchmarks.timing import QUICK, Effort

RESULTS = Path(__file__).parent / "results"
SEED = "of the shapes; default: a new one, which is printed"
# glibc returns large blocks to the system when they are freed, and every new one costs its page faults.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 50)}

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 1 for a wrong result, 2 for what cannot be understood or done."""
    parser = _parser()
    parsed = vars(parser.parse_args(arguments))
    run = parsed.pop("run")
    try:
        return int(run(**parsed))
    except WrongResult as fault:
        print(f"wrong result: {fault}", file=sys.stderr)
        return 1
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="How fast nbbn is.")
    commands = parser.add_subparsers(metavar="command", required=True)
    what = "time nbbn and its peers on the CPU (extra: bench)"
    cpu = commands.add_parser("cpu", help=what, description=what)
    _add_selection(cpu, CASES, PEERS)
    cpu.add_argument("--keep-memory", action="store_true", help="glibc keeps what is freed, for every contender")
    _add_patience(cpu, 120)
    _add_output(cpu, "cpu.json")
    cpu.set_defaults(run=run_cpu)
    what = "time nbbn and its peers on the CPU at random shapes (extra: bench)"
    survey = commands.add_parser("survey", help=what, description=what)
    survey.add_argument("--seed", type=int, metavar="S", help=SEED)
    survey.add_argument("--points", type=int, default=160, metavar="P", help="default: %(default)s")
    survey.add_argument(
        "--threads", type=int, metavar="T", help="for every contender; default: what each takes by itself"
    )
    _add_peers(survey, PEERS)
    _add_patience(survey, 5)
    _add_output(survey, "survey.json")
    survey.set_defaults(run=run_survey)
    what = "time nbbn and its peers on a GPU (extras: bench, cuda; a PyTorch with CUDA)"
    gpu = commands.add_parser("cuda", help=what, description=what)
    _add_selection(gpu, CUDA_CASES, CUDA_PEERS)
    gpu.add_argument("--host", action="store_true", help="what a call takes of the host, with no GPU, and nothing else")
    _add_output(gpu, "cuda.json")
    gpu.set_defaults(run=run_cuda)
    what = "measure nbbn's thresholds on this machine, and print what would suit it better"
    calibrate = commands.add_parser("calibrate", help=what, description=what)
    calibrate.add_argument("--only", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(SUBJECTS)}")
    calibrate.add_argument("--seed", type=int, metavar="S", help=SEED)
    calibrate.add_argument("--quick", action="store_true", help="few shapes and rounds, and no patience")
    _add_patience(calibrate, 1)
    calibrate.set_defaults(run=run_calibrate)
    what = "time nbbn between PyTorch's convolutions, whose threads want the same cores"
    beside = commands.add_parser("block", help=what, description=what)
    beside.add_argument("--layer", choices=("omp", "tbb", "workqueue"), help="of Numba; default: what it takes itself")
    beside.add_argument("--quick", action="store_true", help="few rounds, and no patience")
    _add_patience(beside, 5)
    beside.set_defaults(run=run_block)
    what = "time what it costs to share statistics between processes (extra: mpi, and an MPI library; torch for gloo)"
    ranks = commands.add_parser("sync", help=what, description=what)
    ranks.add_argument("--ranks", type=int, nargs="+", default=sync.RANKS, metavar="N", help="default: %(default)s")
    ranks.add_argument(
        "--channels", type=int, nargs="+", default=sync.CHANNELS, metavar="C", help="default: %(default)s"
    )
    ranks.add_argument("--transports", nargs="+", choices=sync.TRANSPORTS, default=sync.TRANSPORTS)
    ranks.set_defaults(run=run_sync)
    what = "time the faces for frameworks against what they replace (extra: frameworks)"
    faces = commands.add_parser("frameworks", help=what, description=what)
    faces.add_argument("--only", nargs="+", choices=frameworks.FACES, default=frameworks.FACES)
    faces.add_argument("--quick", action="store_true", help="few rounds, small networks")
    _add_output(faces, "frameworks.json")
    faces.set_defaults(run=run_frameworks)
    what = "draw the picture of a report and print its tables"
    again = commands.add_parser("report", help=what, description=what)
    again.add_argument("file", type=Path)
    again.add_argument("--update", type=Path, metavar="FILE.md", help="replace the tables between this file's markers")
    again.set_defaults(run=run_report)
    return parser


def _add_selection(parser: argparse.ArgumentParser, cases: Iterable[str], peers: Iterable[str]) -> None:
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="PATTERN",
        help=f"of {', '.join(cases)}; * and ? match; repeatable",
    )
    parser.add_argument("--mode", action="append", choices=MODES, help="repeatable; default: all")
    _add_peers(parser, peers)
    parser.add_argument("--quick", action="store_true", help="few rounds")


def _add_peers(parser: argparse.ArgumentParser, peers: Iterable[str]) -> None:
    parser.add_argument("--peers", metavar="LIST", help=f"of {', '.join(peers)}, with commas; default: those installed")


def _add_patience(parser: argparse.ArgumentParser, seconds: float) -> None:
    what = "per measurement, for a quiet CPU; default: %(default)s"
    parser.add_argument("--patience", type=float, default=seconds, metavar="SECONDS", help=what)


def _add_output(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--output", type=Path, default=RESULTS / name, metavar="FILE", help="default: %(default)s")


def run_cpu(
    case: list[str],
    mode: list[str] | None,
    peers: str | None,
    quick: bool,
    keep_memory: bool,
    patience: float,
    output: Path,
) -> int:
    if keep_memory:
        _start_with(KEEP_MEMORY)
    plan = suite.Plan(
        cases=select(case),
        modes=_modes(mode),
        peers=find(_names(peers), PEERS, load),
        effort=QUICK if quick else Effort(),
        # First calls belong to the whole suite, and no case changes them.
        startups=0 if case else 1 if quick else 5,
        patience=patience,
        memory="kept by glibc" if keep_memory else "the allocator's default",
    )
    return _run(suite, plan, output)


def _start_with(variables: Mapping[str, str]) -> None:
    """Begin this command again unless the environment has these, which are looked at before the command is."""
    if any(os.environ.get(name) != value for name, value in variables.items()):
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **variables})


def run_survey(
    seed: int | None, points: int, threads: int | None, peers: str | None, patience: float, output: Path
) -> int:
    if threads is not None:
        _start_with(environment(threads))
    seed = _announced(seed)
    found = find(_names(peers), PEERS, load)
    plan = survey_suite.plan(points, seed, found, threads=threads, patience=patience)
    return _run(survey_suite, plan, output)


def _announced(seed: int | None) -> int:
    """The seed, or a new one, printed: also for a run that is interrupted."""
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    print(f"seed {seed}", flush=True)
    return seed


def run_calibrate(only: list[str], seed: int | None, quick: bool, patience: float) -> int:
    plan = calibrate_suite.plan(only, _announced(seed), quick, 0 if quick else patience)
    found = _with_bar(plan.steps, lambda progress: calibrate_suite.run(plan, progress))
    print(calibrate_report.tables(found))
    return 0


def run_block(layer: str | None, quick: bool, patience: float) -> int:
    if layer is not None:
        _start_with({"NUMBA_THREADING_LAYER": layer})
    plan = block.plan(layer, quick, 0 if quick else patience)
    print(block.tables(_with_bar(len(plan.shapes), lambda progress: block.run(plan, progress))))
    return 0


def run_sync(ranks: Sequence[int], channels: Sequence[int], transports: Sequence[str]) -> int:
    print(sync.table(sync.run(ranks, channels, transports)))
    return 0


def run_frameworks(only: Sequence[str], quick: bool, output: Path) -> int:
    found = frameworks.run(only, quick)
    measured = {"machine": describe(versions(frameworks.PACKAGES)), "quick": quick, "faces": found}
    output.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(frameworks.table(found))
    return 0


def run_cuda(case: list[str], mode: list[str] | None, peers: str | None, quick: bool, host: bool, output: Path) -> int:
    if host:
        print(cuda_host.table(cuda_host.run(quick)))
        return 0
    cases, modes = select(case, CUDA_CASES), _modes(mode)
    cuda_suite.find_torch()
    effort = Effort(rounds=5, seconds=0.0) if quick else Effort(rounds=25, seconds=2.0)
    plan = suite.Plan(cases, modes, cuda_suite.find_peers(_names(peers)), effort)
    return _run(cuda_suite, plan, output)


def _modes(chosen: list[str] | None) -> tuple[str, ...]:
    return tuple(m for m in MODES if chosen is None or m in chosen)


def _names(peers: str | None) -> list[str] | None:
    return None if peers is None else [p for p in peers.split(",") if p]


def _run(module: Any, plan: Any, output: Path) -> int:
    """module: the suite of the plan."""
    return finish(_with_bar(plan.steps, lambda progress: module.run(plan, output, progress)), output)


def _with_bar(steps: int, run: Callable[[suite.Progress], T]) -> T:
    """What `run` returns, which tells a bar how far it is."""
    from tqdm import tqdm  # from here on the extra is needed; what was asked for has been understood

    tqdm.monitor_interval = 0  # its thread would keep nbbn off the pool of workqueue, which two threads must not enter
    with tqdm(total=steps, unit="case", disable=None) as bar:

        def progress(name: str, done: int) -> None:
            bar.n = done
            bar.set_description(name)

        return run(progress)


def run_report(file: Path, update: Path | None) -> int:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kind = _kind(found)
    suite.save(found, kind.bounds.rows, file)
    if update is not None:
        report.update(update, found, kind.report.tables)
    return finish(found, file)


class Kind(NamedTuple):
    """The modules of one kind of report, each with what its namesake here has."""

    bounds: Any
    report: Any


def _kind(found: dict[str, Any]) -> Kind:
    if "seed" in found:
        return Kind(survey_bounds, survey_report)
    return Kind(cuda_bounds, cuda_report) if "gpu" in found["machine"] else Kind(bounds, report)


def finish(found: dict[str, Any], output: Path) -> int:
    """The picture beside the report, and the tables on stdout."""
    writer = _kind(found).report
    print(writer.tables(found))
    writer.draw(found, output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
