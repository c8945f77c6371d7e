"""Python in a process of its own, for what must not happen in the tests' process."""

import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import nbbn

PACKAGE = Path(nbbn.__file__).parent
TESTS = Path(__file__).parents[1]
# The tests set what they need.
FROM_OUTSIDE = {
    *("NBBN_NUM_THREADS", "NUMBA_THREADING_LAYER", "NUMBA_THREADING_LAYER_PRIORITY", "NUMBA_CPU_NAME"),
    *("NUMBA_DISABLE_JIT", "OMP_NUM_THREADS"),
}


def run(code: str, *arguments: str, timeout: float = 60, root: Path | None = None, **variables: str | None):
    """The finished process of `python *arguments -c code`; a timeout fails the test, and ends the process.

    Args:
        root: the folder that nbbn is imported from; this one's by default.
        variables: of the environment; None removes one.
    """
    environment = {k: v for k, v in os.environ.items() if k not in FROM_OUTSIDE and not k.startswith("COV_")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (root or PACKAGE.parent, TESTS.parent)))
    environment |= {k: v for k, v in variables.items() if v is not None}
    for name in (k for k, v in variables.items() if v is None):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, *arguments, "-c", code],
        env=environment,
        cwd=TESTS,  # `python -c` looks here first: it must hold no nbbn, or that one would hide the one of `root`
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


def in_children(functions, limit=60):
    """Run each function in a forked child of this process, all at once.

    Raises: AssertionError if one fails, is killed, or takes longer than `limit` seconds.
    """
    children = [_fork(f, limit) for f in functions]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), f"children ended with {codes}"


def in_child(function, limit=60):
    in_children([function], limit)


def _fork(function, limit):
    child = os.fork()
    if child:
        return child
    signal.alarm(limit)  # its default is to end the process
    try:
        function()
    except BaseException:
        traceback.print_exc()
        os._exit(4)
    os._exit(0)
