"""Python in a process of its own, for what must not happen in the tests' process."""

import os
import subprocess
import sys
from pathlib import Path

import nbbn

PACKAGE = Path(nbbn.__file__).parent
FROM_OUTSIDE = ("NBBN_NUM_THREADS", "NUMBA_THREADING_LAYER", "NUMBA_CPU_NAME")  # the tests set what they need


def run(code: str, *arguments: str, timeout: float = 60, root: Path | None = None, **variables: str | None):
    """The finished process of `python *arguments -c code`; a timeout fails the test, and ends the process.

    Args:
        root: the folder that nbbn is imported from; this one's by default.
        variables: of the environment; None removes one.
    """
    environment = {k: v for k, v in os.environ.items() if k not in FROM_OUTSIDE and not k.startswith("COV_")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (root or PACKAGE.parent, Path(__file__).parent)))
    environment |= {k: v for k, v in variables.items() if v is not None}
    for name in (k for k, v in variables.items() if v is None):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, *arguments, "-c", code],
        env=environment,
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def check(code: str, *arguments: str, **options) -> str:
    """What `code` printed; fails unless it exits with 0, and shows what it wrote when it does not."""
    done = run(code, *arguments, **options)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
