"""python -m nbbn: a demonstration, and facts about this installation."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbbn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 2 for what cannot be understood."""
    parser = argparse.ArgumentParser(prog="python -m nbbn", description=nbbn.__doc__)
    parser.add_argument("--version", action="version", version=f"nbbn {nbbn.__version__}")
    commands = parser.add_subparsers(metavar="command")
    for add in (add_demo, add_info):  # each new command is one function
        add(commands)
    parsed = vars(parser.parse_args(arguments))
    run = parsed.pop("run", None)
    if run is None:
        parser.print_help(sys.stderr)
        return 2
    return int(run(**parsed))


def add_demo(commands: Any) -> None:
    def run(**options: Any) -> int:
        from nbbn import demo

        return demo.run(**options)

    what = "train small networks with plain, renormalized and ghost batches: a table and a picture (extra: demo)"
    parser = commands.add_parser("demo", help=what, description=what)
    parser.add_argument("--quick", action="store_true", help="fewer seeds and steps")
    parser.add_argument("--output", type=png, default="nbbn-demo.png", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--seeds", type=positive, metavar="N", help="runs per result; default: 5, with --quick 2")
    parser.set_defaults(run=run)


def add_info(commands: Any) -> None:
    def run() -> int:
        from nbbn import info

        return info.run()

    what = "versions, processor, threads, kernel cache and GPUs"
    commands.add_parser("info", help=what, description=what).set_defaults(run=run)


def png(value: str) -> Path:
    """A file that can be written, known before the training and not after it."""
    path = Path(value)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file that can be written; received {value!r}")
    return path


def positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; received {value!r}")
    return int(value)


if __name__ == "__main__":
    sys.exit(main())
