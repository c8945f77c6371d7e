"""What a library must not do to the process that imports it: crash, hang, print, use stale code, or trust a file."""

import copy
import os
import pickle
import textwrap
import threading
from functools import lru_cache

import numba
import pytest
from processes import check, run

from nbbn import runtime
from nbbn.runtime import threads

# --- import ----------------------------------------------------------------------------------------


def test_import_is_silent():
    done = run("import nbbn, nbbn.compat.v1", "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


FOREIGN = (
    "numba.cuda",
    "numba_cuda",
    "tensorflow",
    "keras",
    "tf_keras",
    "torch",
    "jax",
    "sklearn",
    "matplotlib",
    "tqdm",
)


def test_import_loads_no_framework():
    """Nor what takes long: numba.cuda costs as much time as everything else."""
    loaded = check("import sys, nbbn, nbbn.compat.v1; print(*sys.modules)").split()
    assert [m for m in loaded if m in FOREIGN or m.startswith("ml_dtypes")] == []


def test_import_compiles_nothing_and_starts_no_threads(tmp_path):
    code = """
        import threading, nbbn
        from numba.np.ufunc import parallel
        assert not parallel._is_initialized
        assert threading.active_count() == 1
    """
    check(textwrap.dedent(code), NBBN_CACHE_DIR=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


# --- how many threads ------------------------------------------------------------------------------


@pytest.fixture
def ask_for(monkeypatch):
    """A function that sets NBBN_NUM_THREADS and returns the limit."""

    def ask(value):
        monkeypatch.setenv("NBBN_NUM_THREADS", value)
        runtime.thread_limit.cache_clear()
        return runtime.thread_limit()

    yield ask
    monkeypatch.undo()
    runtime.thread_limit.cache_clear()


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "1e3", " ", "+2", "0x2"])
def test_bad_number_of_threads(ask_for, value):
    with pytest.raises(ValueError, match="NBBN_NUM_THREADS must be a positive integer; received") as caught:
        ask_for(value)
    assert repr(value) in str(caught.value)


def test_number_of_threads(ask_for, monkeypatch):
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 4)
    monkeypatch.setattr(threads, "_cgroup_cpus", lambda: 3)
    assert [ask_for(v) for v in ("", "1", "2", "3", "100")] == [3, 1, 2, 3, 3]
    monkeypatch.setattr(threads, "_cgroup_cpus", lambda: 100)
    assert ask_for("100") == 4


UNLIMITED = 1 << 20
CGROUPS = [
    ({"cpu.max": "150000 100000\n"}, 2),
    ({"cpu.max": "100000 100000\n"}, 1),
    ({"cpu.max": "1600000 100000\n"}, 16),
    ({"cpu.max": "1000 100000\n"}, 1),
    ({"cpu.max": "max 100000\n"}, UNLIMITED),
    ({"cpu.max": ""}, UNLIMITED),
    ({"cpu.max": "max\n"}, UNLIMITED),
    ({"cpu.max": "nonsense 100000\n"}, UNLIMITED),
    ({"cpu/cpu.cfs_quota_us": "350000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, UNLIMITED),
    ({"cpu/cpu.cfs_quota_us": "350000\n"}, UNLIMITED),
    ({}, UNLIMITED),
]


@pytest.mark.parametrize(("contents", "expected"), CGROUPS, ids=[str(c[0]) for c in CGROUPS])
def test_cgroup(tmp_path, contents, expected):
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads._cgroup_cpus(tmp_path) == expected


# --- who may use the pool -----------------------------------------------------------------------------


@pytest.fixture
def two_threads(monkeypatch):
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("Numba has one thread on this machine")
    monkeypatch.setattr(threads, "thread_limit", lambda: 2)
    monkeypatch.setattr(threads, "_pool_is_safe", lambda: True)


def in_thread(function):
    """What `function` returns in another thread."""
    found = []
    t = threading.Thread(target=lambda: found.append(function()))
    t.start()
    t.join(20)
    assert found, "the thread hangs"
    return found[0]


def is_granted():
    with runtime.parallel_region() as granted:
        return granted


@pytest.mark.usefixtures("two_threads")
def test_one_region_at_a_time():
    with runtime.parallel_region() as granted:
        assert granted
        assert not in_thread(is_granted)
        assert not is_granted()
    assert is_granted()
    assert in_thread(is_granted)


@pytest.mark.usefixtures("two_threads")
def test_an_exception_gives_the_pool_back():
    with pytest.raises(KeyError), runtime.parallel_region():
        raise KeyError
    assert is_granted()


@pytest.mark.usefixtures("two_threads")
def test_the_callers_number_of_threads_is_restored(monkeypatch):
    before = numba.get_num_threads()
    monkeypatch.setattr(threads, "thread_limit", lambda: 3)
    with runtime.parallel_region():
        assert numba.get_num_threads() == min(before, 3)
    assert numba.get_num_threads() == before
    numba.set_num_threads(1)
    try:
        with runtime.parallel_region():
            assert numba.get_num_threads() == 1
        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(before)


def test_one_thread_needs_no_pool(monkeypatch):
    monkeypatch.setattr(threads, "thread_limit", lambda: 1)
    assert not is_granted()


# --- locks ------------------------------------------------------------------------------------------------


def test_state_lock_excludes():
    lock, inside, most = runtime.StateLock(), 0, 0

    def work():
        nonlocal inside, most
        for _ in range(200):
            with lock:
                inside += 1
                most = max(most, inside)
                inside -= 1

    workers = [threading.Thread(target=work) for _ in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert (inside, most) == (0, 1)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda lock: pickle.loads(pickle.dumps(lock))])
def test_state_lock_is_duplicated_open(duplicate):
    lock = runtime.StateLock()
    with lock, duplicate(lock) as nothing:
        assert nothing is None


def test_state_lock_is_released_by_an_exception():
    lock = runtime.StateLock()
    with pytest.raises(KeyError), lock:
        raise KeyError
    with lock:
        pass


# --- threads and forks, each in a process of its own -----------------------------------------------------------

LAYERS = ["omp", "workqueue", "tbb"]

# Large enough for several threads; `work` checks every result against the first.
COMMON = """
import os, sys, signal, threading
import numba, numpy as np, nbbn
x = np.random.default_rng(0).normal(size=(2048, 128)).astype(np.float32)
layer = nbbn.BatchNormalization()
assert nbbn.explain(layer, x, training=True).parallel
expected = layer(x, training=True, update_statistics=False)
def work(times=20):
    for _ in range(times):
        y = layer(x, training=True, update_statistics=False)
        if not np.array_equal(y, expected):
            print("wrong result"); os._exit(3)
def in_child(function):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs is killed
        try:
            function()
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(4)
    status = os.waitpid(child, 0)[1]
    if status:
        print("child ended with", os.waitstatus_to_exitcode(status)); os._exit(5)
def in_threads(function, count=8):
    failures = []
    def guarded():
        try: function()
        except BaseException as error: failures.append(repr(error))
    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for t in threads: t.start()
    for t in threads: t.join()
    if failures: print(failures); os._exit(6)
"""

SCENARIOS = {
    "8 threads": "in_threads(work)",
    "fork after a parallel kernel": "work(); in_child(work); work(); in_child(work)",
    "fork of a fork": "work(); in_child(lambda: (work(2), in_child(work), work(2)))",
    "threads in a child": "work(); in_child(lambda: in_threads(work))",
    "training in a child": """
layer(x, training=True)
def train():
    before = layer.moving_mean.copy()
    in_threads(lambda: layer(x, training=True), 4)
    assert not np.array_equal(before, layer.moving_mean)
in_child(train)
""",
    "fork while threads run kernels": """
stop = threading.Event()
def busy():
    while not stop.is_set():
        layer(x, training=True); work(1)
threads = [threading.Thread(target=busy) for _ in range(2)]
for t in threads: t.start()
for _ in range(20):
    in_child(lambda: (layer(x, training=True), work(2)))
stop.set()
for t in threads: t.join()
work()
""",
    "multiprocessing": """
import multiprocessing
work()
with multiprocessing.get_context("fork").Pool(2) as pool:
    pool.map_async(work, [2] * 4).get(60)
""",
    "foreign kernel in another thread": """
@numba.njit(parallel=True)
def foreign(values):
    total = 0.0
    for i in numba.prange(values.size):
        total += values.flat[i]
    return total
foreign(x)
lonely = threading.Thread(target=lambda: [foreign(x) for _ in range(200)], name="lonely")
lonely.start()
work(100)
lonely.join()
""",
}
FORKING = [name for name, code in SCENARIOS.items() if "child" in code or "fork" in code]


@lru_cache
def obstacle(layer):
    """Why Numba cannot use a threading layer here, or None."""
    if runtime.thread_limit() < 2:
        return "this machine, or NBBN_NUM_THREADS, allows one thread only"
    done = run("import numba; numba.get_num_threads()", NUMBA_THREADING_LAYER=layer)
    return None if done.returncode == 0 else f"Numba finds no threading layer {layer}"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(layer, scenario):
    if scenario in FORKING and not hasattr(os, "fork"):
        pytest.skip("there is no fork on this system")
    if scenario == "foreign kernel in another thread" and layer != "workqueue":
        pytest.skip("only workqueue aborts when two threads enter it")
    if obstacle(layer):
        pytest.skip(obstacle(layer))
    code = f"{COMMON}\n{SCENARIOS[scenario]}\nprint('done', numba.threading_layer())"
    printed = check(code, NUMBA_THREADING_LAYER=layer, timeout=120)
    assert printed == f"done {layer}\n"


COMPILING = """
thread = threading.Thread(target=lambda: layer(x.astype(np.float64)))
thread.start()
in_child(lambda: layer(x))
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_fork_while_another_thread_compiles():
    """The child needs the compiler's lock too: nothing is cached."""
    common = COMMON.partition("assert")[0] + "".join(COMMON.partition("def in_child")[1:])
    printed = check(f"{common}\n{COMPILING}\nprint('done')", NBBN_CACHE_DIR="", NBBN_NUM_THREADS="1", timeout=120)
    assert printed == "done\n"


IMPORTS = """
import sys
import numpy as np, nbbn
from nbbn.runtime import threads
from numba.core.compiler_lock import global_compiler_lock
class Watch:
    def find_spec(name, path=None, target=None):
        if not (global_compiler_lock.is_locked() or threads._pool.locked()):
            print(name)
sys.meta_path.insert(0, Watch)
layer = nbbn.BatchNormalization()
y, pullback = layer.vjp(np.ones((4, 3), np.float32), training=True)
pullback(y)
layer(y)
"""


def test_a_call_imports_nothing_that_a_fork_could_interrupt():
    """A child for ever waits for a module that another thread of its parent was importing. Where the fork waits for a
    lock of this package's or the compiler's, imports are safe."""
    assert check(IMPORTS) == ""


LOCKS = """
import os, signal, threading, time
from nbbn.runtime import StateLock
lock, held, finish = StateLock(), threading.Event(), threading.Event()
def hold():
    with lock:
        held.set(); finish.wait()
holder = threading.Thread(target=hold, daemon=True)
holder.start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(10)
    getpid = os.getpid
    os.getpid = lambda: (time.sleep(0.01), getpid())[1]  # threads change places here
    inside, errors = [], []
    def work():
        try:
            with lock:
                inside.append(1)
                time.sleep(0.02)
                if inside.pop() != 1 or inside: errors.append("two inside")
        except BaseException as error:
            errors.append(repr(error))
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start(); time.sleep(0.005)
    for t in threads: t.join()
    print(errors, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
finish.set()
holder.join()
with lock: print("parent")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_lock_held_at_the_fork_is_open_in_the_child_and_excludes_its_threads():
    """They find the parent's lock closed for ever; all must agree on the one that takes its place."""
    assert check(LOCKS) == "[]\nparent\n"
