"""Programs of nbbn.jax, and what happens to the process that runs them: it ends, it is interrupted."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.frameworks

PROGRAM = """
import os, signal, sys, threading, time
import jax, numpy as np
from nbbn.jax import batch_norm, initial_state
x = np.random.default_rng(0).normal(3, 2, (64, 32, 32, 64)).astype(np.float32)  # enough for a parallel step
run = jax.jit(jax.value_and_grad(lambda x: (batch_norm(x, None, None, initial_state(64), training=True)[0] ** 3).sum()))
jax.block_until_ready(run(x))
"""


def outcome(code, timeout=120, **environment):
    """Return code, stdout and stderr of a process. Raises: subprocess.TimeoutExpired where it hangs."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


KEPT_AND_DROPPED = "kept = [run(x) for _ in range(4)]\n[run(x) for _ in range(4)] and None"
OF_A_THREAD = "threading.Thread(target=lambda: [run(x) for _ in range(4)]).start()"


@pytest.mark.parametrize("code", [KEPT_AND_DROPPED, OF_A_THREAD])
def test_a_process_ends_while_programs_run(code):
    """Their parallel steps ask Python for the thread pool, and JAX waits for them while Python ends."""
    assert outcome(PROGRAM + code) == (0, "", "")


def test_a_process_ends_although_a_daemon_trains_on():
    """What becomes of that thread is JAX's affair: also without nbbn it may abort the process then."""
    code = """
def train():
    while True:
        jax.block_until_ready(run(x))
threading.Thread(target=train, daemon=True).start()
time.sleep(0.2)
print("end", flush=True)
"""
    assert outcome(PROGRAM + code)[1] == "end\n"


def test_an_import_starts_no_backend_at_the_end():
    """One that cannot be started would be an error then."""
    assert outcome("import nbbn.jax", JAX_PLATFORMS="cuda") == (0, "", "")


def test_interrupts():
    """One that comes during a step is raised behind it: neither lost nor the end of the process.

    Where other processes keep the cores, JAX 0.10 may never come back from block_until_ready() after an interrupt, in
    programs without nbbn, too: whether it does so here is tried then.
    """
    code = """
x = x[:, :8, :8]  # JAX runs it in the main thread, where signals are handled
jax.block_until_ready(run(x))
found = 0
for seconds in np.random.default_rng().uniform(0.001, 0.02, 40):
    try:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        while True:
            jax.block_until_ready(run(x))
    except KeyboardInterrupt:
        found += 1
    timer.join()
print(found)
"""
    try:
        code_of_exit, printed, _ = outcome(PROGRAM + code, timeout=60)
    except subprocess.TimeoutExpired:
        own = "batch_norm(x, None, None, initial_state(64), training=True)[0]"
        assert own in PROGRAM
        try:
            outcome(PROGRAM.replace(own, "(x - x.mean((0, 1, 2)))") + code, timeout=60)
        except subprocess.TimeoutExpired:
            pytest.skip("JAX hangs here after an interrupt, without nbbn, too")
        code_of_exit, printed, _ = outcome(PROGRAM + code, timeout=60)
    assert (code_of_exit, printed) == (0, "40\n")
