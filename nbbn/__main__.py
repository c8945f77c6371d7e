"""python -m nbbn: a demonstration, facts about this installation, and kernels compiled ahead."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import nbbn
from nbbn.core import dtypes
from nbbn.deploy import warming


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 2 for what cannot be understood."""
    parser = argparse.ArgumentParser(prog="python -m nbbn", description=nbbn.__doc__)
    parser.add_argument("--version", action="version", version=f"nbbn {nbbn.__version__}")
    commands = parser.add_subparsers(metavar="command")
    for add in (add_demo, add_info, add_warmup):  # each new command is one function
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

        print(*info.lines(), sep="\n")
        return 0

    what = "versions, processor, threads, kernel cache and GPUs"
    commands.add_parser("info", help=what, description=what).set_defaults(run=run)


def add_warmup(commands: Any) -> None:
    what = "compile ahead, into the kernel cache, what calls will need"
    default = "By default: images with the channels first and last and dense inputs, small and large."
    parser = commands.add_parser("warmup", help=what, description=f"{what.capitalize()}. {default}")
    parser.add_argument(
        "--shape", nargs="+", type=integers, dest="shapes", metavar="N,N", help="of the inputs: 32,112,112,64 32,64"
    )
    parser.add_argument("--axis", type=integers, metavar="N", help="the feature axis of these shapes; default: -1")
    for option, target, names in (("--dtype", "dtypes", dtypes.NAMES), ("--modes", "modes", warming.MODES)):
        default = "float32" if option == "--dtype" else ",".join(names)
        what = f"some of {','.join(names)}; default: {default}"
        parser.add_argument(option, type=some_of(names), dest=target, default=default, metavar="NAME,NAME", help=what)
    parser.add_argument("--activation", choices=["relu"], help="that of the layers")
    parser.add_argument("--residual", action="store_true", help="the calls have one")
    parser.add_argument("--renorm", action="store_true", help="the layers have it")
    parser.set_defaults(run=warming.run)


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


def integers(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in value.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers with commas between; received {value!r}") from None


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(value: str) -> list[str]:
        found = value.split(",")
        if not set(found) <= set(names):
            raise argparse.ArgumentTypeError(f"must be some of {','.join(names)}; received {value!r}")
        return found

    return parse


if __name__ == "__main__":
    sys.exit(main())
