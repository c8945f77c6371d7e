"""What a layer must not do to its process: no abort, no hang, no wrong number, nothing on stdout.

Every scenario runs in a process of its own, once for each of Numba's threading layers. `workload.py` has the calls.
"""

import os
from functools import lru_cache
from importlib.util import find_spec

import pytest

from nbbn import runtime
from tests.helpers.processes import run

LAYERS = ["tbb", "omp", "workqueue"]

SCENARIOS = {
    "8 threads": "work_in_threads(8)",
    "32 threads": "work_in_threads(32, 5)",
    "threads train one layer, others use it": """
counted = nbbn.BatchNormalization(momentum=0.9)
ones = np.ones_like(X)
in_threads([lambda: [counted(ones, training=True) for _ in range(5)]] * 8)
# One update less would make it differ by 2e-3.
np.testing.assert_allclose(counted.moving_mean, 1 - 0.9**40, rtol=1e-5)

# Mean m and variance m^2 belong together: (0 - mean) / sqrt(variance) is -1, or they are of different steps.
paired = nbbn.BatchNormalization(momentum=0.0, epsilon=0.0, center=False, scale=False)
zero, sign = np.zeros((4, 128), np.float32), np.resize(np.float32([0, 2]), (2048, 1))
batches = [np.float32(m) * sign * np.ones_like(X) for m in (1, 1000)]
paired(batches[0], training=True)
stop = threading.Event()
def train_both():
    try:
        for i in range(200):
            paired(batches[i % 2], training=True)
    finally:
        stop.set()
def infer():
    while not stop.is_set():
        np.testing.assert_allclose(paired(zero), -1, rtol=1e-5)
in_threads([train_both, infer, infer])
""",
    "a kernel in a child, a child of the child, threads in both": """
work()
def child():
    work(2)
    in_child(lambda: (work(2), work_in_threads(4, 2)))
    work_in_threads(4, 2)
    work(2)
in_child(child)
work()
in_child(child)
""",
    "training in a child": """
train()
in_child(lambda: in_threads([train] * 4))
train()
""",
    "forks while threads run kernels": """
stop = threading.Event()
def busy():
    while not stop.is_set():
        layer(X, training=True)
        work(1)
workers = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
for w in workers:
    w.start()
for _ in range(200):
    in_child(lambda: (layer(X, training=True), work(1)), limit=20)
stop.set()
for w in workers:
    w.join()
work()
""",
    "a fork while a thread compiles": """
from numba.core import event
compiling = event.RecordingListener()
event.register("numba:compile", compiling)
os.environ["NBBN_CACHE_DIR"] = ""
cache_folder.cache_clear()
compiler = threading.Thread(target=lambda: layer(X[:8].astype(np.float64)))
compiler.start()
def child():
    work(1)
    assert numba.njit(lambda n: n + 1)(1) == 2  # takes the compiler's lock
while not compiling.buffer:
    time.sleep(0.001)
in_child(child, limit=20)
compiler.join()
work()
""",
    "a thread forks": """
work()
in_threads([lambda: (work(2), in_child(work))] * 3)
work()
""",
    "a signal handler forks": """
forks = 0
def fork(*signal_and_frame):
    global forks
    in_child(lambda: work(1))
    forks += 1
    signal.setitimer(signal.ITIMER_PROF, 0.003)
signal.signal(signal.SIGPROF, fork)
signal.setitimer(signal.ITIMER_PROF, 0.003)
while forks < 40:
    work(1)
signal.setitimer(signal.ITIMER_PROF, 0)
work()
""",
    "multiprocessing": """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
checksum = work()
for method in ("fork", "forkserver", "spawn"):
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        assert pool.map_async(work, [2] * 4).get(60) == [checksum] * 4, method
        pool.close()
        pool.join()
with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
    assert list(pool.map(work, [2] * 4, timeout=60)) == [checksum] * 4
work()
""",
    "a DataLoader with fork workers": """
import torch
class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, index): return work(2)
checksum = work()
loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork", timeout=60)
for epoch in range(2):
    assert [int(c) for c in loader] == [checksum] * 4
work()
""",
    "a prange function of the user's": """
@numba.njit(parallel=True, nogil=True)
def total(values):
    sum = 0.0
    for i in numba.prange(values.size):
        sum += values[i]
    return sum
numbers = np.arange(1e5)
def foreign(times=100):
    for _ in range(times):
        assert total(numbers) == 99999 * 5e4
foreign()
work()
foreign()
beside = threading.Thread(target=foreign, args=(300,))
beside.start()
work(50)
beside.join()
foreign()
work()
""",
    "interrupts": """
import random
from nbbn.runtime import StateLock, threads
random.seed(0)
delivered = 0
def interrupt(*signal_and_frame):
    global delivered
    delivered += 1
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
def interrupt_within(seconds):
    \"\"\"Once, and again after a second if the exception has not arrived.\"\"\"
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, seconds), 1)
def has_arrived(count):
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert delivered == count, "an interrupt was lost"
def is_free(lock):
    \"\"\"Both locks are reentrant: only another thread can tell.\"\"\"
    found = []
    t = threading.Thread(target=lambda: found.append(lock.acquire(blocking=False)) or found[0] and lock.release())
    t.start()
    t.join()
    return found[0]

# Between any two instructions of a region or a lock.
lock = StateLock()
for i in range(1000):
    try:
        interrupt_within(2e-4)
        while True:
            with parallel_region(), lock:
                pass
    except KeyboardInterrupt:
        has_arrived(i + 1)
    assert is_free(threads._pool) and is_free(lock), i

# A training step happens whole or not at all. With momentum 0 the statistics are those of the last batch.
trained = nbbn.BatchNormalization(momentum=0.0)
batches, states = [X, 2 * X + 1], []
def statistics():
    return np.stack([trained.moving_mean, trained.moving_variance])
for x in batches:
    trained(x, training=True)
    states.append(statistics())
for i in range(300):
    try:
        interrupt_within(6e-4)
        while True:
            trained(batches[0], training=True)
            trained(batches[1], training=True)
    except KeyboardInterrupt:
        has_arrived(1000 + i + 1)
    assert any(np.array_equal(statistics(), s) for s in states), i
    assert is_parallel() and is_free(threads._pool) and is_free(trained._variables.lock), i
work()
""",
}
NEEDS = {"torch": ["a DataLoader with fork workers"]}
FORKS = [name for name, code in SCENARIOS.items() if "fork" in name or "child" in code or "multiprocessing" in code]

PREPARE = """
import os, signal, threading, time
import numba, numpy as np, nbbn
from tests.helpers.concurrency import in_threads
from nbbn.runtime import cache_folder, parallel_region
from tests.helpers.processes import in_child
from tests.helpers.workload import X, is_parallel, layer, train, work, work_in_threads
assert is_parallel()
"""


@lru_cache
def obstacle(layer):
    """Why Numba cannot use a threading layer here, or None."""
    if runtime.thread_limit() < 2:
        return "this machine, or NBBN_NUM_THREADS, allows one thread only"
    code = "from nbbn.runtime import start_pool; assert start_pool()"
    done = run(code, NUMBA_THREADING_LAYER=layer)
    return None if done.returncode == 0 else f"Numba finds no threading layer {layer}"


def skip_if_impossible(layer, scenario):
    if scenario in FORKS and not hasattr(os, "fork"):
        pytest.skip("there is no fork on this system")
    for module, scenarios in NEEDS.items():
        if scenario in scenarios and find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if obstacle(layer):
        pytest.skip(obstacle(layer))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(layer, scenario):
    skip_if_impossible(layer, scenario)
    code = f"{PREPARE}\n{SCENARIOS[scenario]}\nprint('done', numba.threading_layer())"
    done = run(code, timeout=120, NUMBA_THREADING_LAYER=layer)
    assert (done.returncode, done.stdout) == (0, f"done {layer}\n"), done.stderr


@pytest.mark.parametrize("layer", LAYERS)
def test_exit_beside_a_kernel(layer):
    """Daemon threads are in a kernel, parallel or serial, when the interpreter ends."""
    skip_if_impossible(layer, "exit")
    code = """
for _ in range(3):
    threading.Thread(target=work, args=(1 << 30,), daemon=True).start()
time.sleep(0.05)
"""
    for _ in range(2):
        done = run(PREPARE + code, timeout=60, NUMBA_THREADING_LAYER=layer)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
