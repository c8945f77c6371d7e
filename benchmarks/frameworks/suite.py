"""Measuring the faces, one after the other, each in a process of its own: frameworks get in each other's way."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import QUICK, Effort, measure

PACKAGES = ("torch", "jax", "flax", "keras", "tensorflow")
FACES = ("numba", "torch", "flax", "keras_on_torch", "keras_on_jax", "keras_on_tensorflow")
EFFORT = Effort(rounds=15, seconds=3.0, lead_in=0.01, sample=0.01)
Row = dict[str, Any]


def run(faces: Sequence[str], quick: bool) -> dict[str, list[Row]]:
    """The rows of each face. Raises: RuntimeError for one that fails, with what it says."""
    return {face: _in_process(face, quick) for face in faces}


def _in_process(face: str, quick: bool) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.frameworks.suite", face, *(["--quick"] if quick else [])]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the face {face} has failed:\n{done.stderr}")
    found: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(face: str, quick: bool) -> list[Row]:
    """One for each case of a face: seconds of each contender, and how nbbn's compare with the framework's own."""
    effort, found = QUICK if quick else EFFORT, []
    for case in importlib.import_module(f"benchmarks.frameworks.{face}").cases(quick):
        samples = measure(case.contenders, effort)
        own = samples[case.reference].median
        times = {name: sample._asdict() for name, sample in samples.items()}
        ratios = {name: sample.median / own for name, sample in samples.items() if name != case.reference}
        found.append({"case": case.name, "times": times, "ratios": ratios, "bound": case.bound})
    return found


def table(found: dict[str, list[Row]]) -> str:
    """Microseconds, and the ratio of nbbn's times to the framework's own."""
    lines = []
    for face, of_face in found.items():
        lines += [f"## nbbn.{face}", "", "| case | us | of the framework's own | bound |", "|---|---|---|---|"]
        for row in of_face:
            times = ", ".join(f"{name} {sample['median'] * 1e6:.1f}" for name, sample in row["times"].items())
            ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
            lines.append(f"| {row['case']} | {times} | {ratios} | {row['bound'] or ''} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(rows(sys.argv[1], "--quick" in sys.argv[2:])))
