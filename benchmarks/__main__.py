"""python -m benchmarks: measure, and report what was measured."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bounds, report, suite
from benchmarks.cases import CASES, MODES, select
from benchmarks.cuda import bounds as cuda_bounds
from benchmarks.cuda import report as cuda_report
from benchmarks.cuda import suite as cuda_suite
from benchmarks.cuda.cases import CASES as CUDA_CASES
from benchmarks.cuda.peers import PEERS as CUDA_PEERS
from benchmarks.peers import PEERS, find, load
from benchmarks.problem import WrongResult
from benchmarks.timing import QUICK, Effort

RESULTS = Path(__file__).parent / "results"
# glibc returns large blocks to the system when they are freed, and every new one costs its page faults.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 50)}


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
    cpu.add_argument(
        "--patience", type=float, default=120, metavar="SECONDS", help="per case, for a quiet CPU; default: %(default)s"
    )
    _add_output(cpu, "cpu.json")
    cpu.set_defaults(run=run_cpu)
    what = "time nbbn and its peers on a GPU (extras: bench, cuda; a PyTorch with CUDA)"
    gpu = commands.add_parser("cuda", help=what, description=what)
    _add_selection(gpu, CUDA_CASES, CUDA_PEERS)
    _add_output(gpu, "cuda.json")
    gpu.set_defaults(run=run_cuda)
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
    parser.add_argument("--peers", metavar="LIST", help=f"of {', '.join(peers)}, with commas; default: those installed")
    parser.add_argument("--quick", action="store_true", help="few rounds")


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
    if keep_memory and any(os.environ.get(k) != v for k, v in KEEP_MEMORY.items()):
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **KEEP_MEMORY})

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


def run_cuda(case: list[str], mode: list[str] | None, peers: str | None, quick: bool, output: Path) -> int:
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
    from tqdm import tqdm  # from here on the extra is needed; what was asked for has been understood

    with tqdm(total=plan.steps, unit="case", disable=None) as bar:

        def progress(name: str, done: int) -> None:
            bar.n = done
            bar.set_description(name)

        found = module.run(plan, output, progress)
    return finish(found, output)


def run_report(file: Path, update: Path | None) -> int:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    suite.save(found, (cuda_bounds if _on_gpu(found) else bounds).rows, file)
    if update is not None:
        report.update(update, found, _writer(found).tables)
    return finish(found, file)


def _on_gpu(found: dict[str, Any]) -> bool:
    return "gpu" in found["machine"]


def _writer(found: dict[str, Any]) -> Any:
    return cuda_report if _on_gpu(found) else report


def finish(found: dict[str, Any], output: Path) -> int:
    """The picture beside the report, and the tables on stdout."""
    writer = _writer(found)
    print(writer.tables(found))
    writer.draw(found, output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
