"""Commands of the benchmarks, in a process of their own: peers start threads that the tests of forks must not meet."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_benchmarks(*arguments: str) -> str:
    """What `python -m benchmarks` prints, which has to end well."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
