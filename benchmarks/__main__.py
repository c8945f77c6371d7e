"""python -m benchmarks: measure, and report what was measured."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report, suite
from benchmarks.cases import CASES, MODES, select
from benchmarks.peers import PEERS
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
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="How fast nbbn is.")
    commands = parser.add_subparsers(metavar="command", required=True)
    what = "time nbbn and its peers on the CPU (extra: bench)"
    cpu = commands.add_parser("cpu", help=what, description=what)
    cpu.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="PATTERN",
        help=f"of {', '.join(CASES)}; * and ? match; repeatable",
    )
    cpu.add_argument("--mode", action="append", choices=MODES, help="repeatable; default: all")
    cpu.add_argument("--peers", metavar="LIST", help=f"of {', '.join(PEERS)}, with commas; default: those installed")
    cpu.add_argument("--quick", action="store_true", help="few rounds")
    cpu.add_argument("--keep-memory", action="store_true", help="glibc keeps what is freed, for every contender")
    cpu.add_argument(
        "--patience", type=float, default=120, metavar="SECONDS", help="per case, for a quiet CPU; default: %(default)s"
    )
    cpu.add_argument("--output", type=Path, default=RESULTS / "cpu.json", metavar="FILE", help="default: %(default)s")
    cpu.set_defaults(run=run_cpu)
    what = "draw the picture of a report and print its tables"
    again = commands.add_parser("report", help=what, description=what)
    again.add_argument("file", type=Path)
    again.add_argument("--update", type=Path, metavar="FILE.md", help="replace the tables between this file's markers")
    again.set_defaults(run=run_report)
    return parser


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

    modes = tuple(m for m in MODES if mode is None or m in mode)
    plan = suite.Plan(
        cases=select(case),
        modes=modes,
        peers=suite.find_peers(None if peers is None else [p for p in peers.split(",") if p]),
        effort=QUICK if quick else Effort(),
        # First calls belong to the whole suite, and no case changes them.
        startups=0 if case else 1 if quick else 5,
        patience=patience,
        memory="kept by glibc" if keep_memory else "the allocator's default",
    )
    from tqdm import tqdm  # from here on the extra is needed; what was asked for has been understood

    with tqdm(total=plan.steps, unit="case", disable=None) as bar:

        def progress(name: str, done: int) -> None:
            bar.n = done
            bar.set_description(name)

        found = suite.run(plan, output, progress)
    return finish(found, output)


def run_report(file: Path, update: Path | None) -> int:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    suite.save(found, file)
    if update is not None:
        report.update(update, found)
    return finish(found, file)


def finish(found: dict[str, Any], output: Path) -> int:
    """The picture beside the report, and the tables on stdout."""
    print(report.tables(found))
    report.draw(found, output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
