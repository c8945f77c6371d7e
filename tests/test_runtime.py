"""What a library must not do to the process that imports it: crash, hang, print, use stale code, or trust a file."""

import copy
import ctypes
import os
import pickle
import textwrap
import threading
from importlib import metadata
from importlib.util import find_spec

import numba
import numpy as np
import pytest

from nbbn import runtime
from nbbn.kernels.cpu import compiling, steps
from nbbn.runtime import PLAIN, cache, passes, threadpool, threads
from tests.helpers.processes import check, run

# --- compiler --------------------------------------------------------------------------------------


@pytest.mark.skipif(PLAIN, reason="NUMBA_DISABLE_JIT is set: nothing is compiled")
def test_numba_asks_for_the_passes_that_kernels_do_without(monkeypatch):
    """A Numba that calls them by another name would take half as much time again, and memory, and say nothing."""
    asked = []
    for name in ("_optimize_final_module", "_optimize_functions"):
        monkeypatch.setattr(passes._Library, name, lambda *arguments, name=name: asked.append(name))
    monkeypatch.setattr(cache, "cache_folder", lambda: None)
    runtime.compile_kernel(lambda x: None, "nothing", numba.void(numba.float64[:]))
    assert asked == ["_optimize_functions", "_optimize_functions", "_optimize_final_module"]  # and of its caller


@pytest.mark.skipif(PLAIN, reason="NUMBA_DISABLE_JIT is set: nothing is compiled")
@pytest.mark.parametrize("step", [*steps.steps("planes", False), "finish", "freeze", "merge"])
def test_nothing_of_numbas_own_is_compiled_for_a_kernel(step, monkeypatch):
    """To assign one row of an array to another makes it compile the text of an error, in four seconds."""
    monkeypatch.setattr(cache, "cache_folder", lambda: None)  # what is loaded does not say what it was made from
    absent = frozenset(name for name in compiling.names_of(step) if compiling.ARGUMENTS[name] in ("flag", "S"))
    kernel = compiling.compiled.__wrapped__(step, "planes", False, *[np.dtype(np.float64)] * 3, True, absent)
    (overload,) = kernel.overloads.values()
    assert {library.name for library in overload.library._linking_libraries} <= {"nrt", "combine"}


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
    monkeypatch.setenv("NUMBA_NUM_THREADS", "4")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: (3, "cpu.max"))
    assert [ask_for(v) for v in ("", "1", "2", "3", "100")] == [3, 1, 2, 3, 3]
    monkeypatch.setattr(threads, "cpu_quota", lambda: (100, "cpu.max"))
    assert ask_for("100") == 4


@pytest.mark.parametrize(
    ("value", "limit"),
    [("1", 1), ("3", 3), ("9", 4), ("2,1", 2), (" 2 ", 2), ("", 4), ("0", 4), ("-1", 4), ("many", 4)],
)
def test_openmp_has_a_say(ask_for, monkeypatch, value, limit):
    """What OpenMP would pass over counts for nothing here, too."""
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 4)
    monkeypatch.setenv("NUMBA_NUM_THREADS", "4")
    monkeypatch.setattr(threads, "cpu_quota", lambda: (100, None))
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert ask_for("") == limit
    assert ask_for("1") == 1


PINNED = """
import os
import nbbn
from nbbn.runtime.threads import thread_limits
cores = os.sched_getaffinity(0)
os.sched_setaffinity(0, {min(cores)})
limits = thread_limits()
print(limits.get("the affinity mask"), min(limits.values()))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
@pytest.mark.skipif(PLAIN, reason="NUMBA_DISABLE_JIT is set: one thread")
def test_a_process_that_pins_itself():
    """Numba has counted the cores before. Who sets Numba's number asks for it whatever there is, as for a cache that is
    filled for another machine."""
    assert check(PINNED, NUMBA_NUM_THREADS=None) == "1 1\n"
    assert check(PINNED, NUMBA_NUM_THREADS="3", OMP_NUM_THREADS="2") == "None 2\n"


LIMITED = """
import numba
from threadpoolctl import threadpool_limits
from tests.helpers.sharing import threads_of

def most():
    found = threads_of(64)
    assert numba.get_num_threads() == asked, "the caller's choice stays"
    return len(set(found))

asked = 2
found = [most()]
for api in ("openmp", "blas"):
    with threadpool_limits(1, user_api=api):
        found.append(most())
asked = 1
numba.set_num_threads(1)
print(*found, most())
"""


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="Numba has one thread on this machine")
@pytest.mark.skipif(find_spec("threadpoolctl") is None, reason="threadpoolctl is not installed")
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_threadpoolctl_reaches_openmp(layer):
    """And numba.set_num_threads() every layer."""
    done = run(LIMITED, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2")
    if "No threading layer could be loaded" in done.stderr:
        pytest.skip(f"Numba finds no threading layer {layer}")
    assert done.stdout == ("2 1 2 1\n" if layer == "omp" else "2 2 2 1\n"), done.stderr


SHARED = """
from tests.helpers.sharing import threads_of
for tasks in (0, 1, 2, 3, 7, 64, 1000):
    found = threads_of(tasks)
    shares = [found.count(thread) for thread in set(found)]
    assert sum(shares) == tasks
    if numba.threading_layer() == "tbb":  # whose threads may find nothing left to do
        assert len(shares) <= 2
    else:
        assert len(shares) == min(2, tasks) and (not tasks or max(shares) - min(shares) <= 1), found
print(numba.threading_layer(), numba.get_num_threads())
"""


@pytest.mark.parametrize("layer", ["omp", "tbb", "workqueue"])
def test_threads_share_the_tasks_evenly(layer):
    """As many threads as nbbn is to have, and Numba's number of threads stays the caller's."""
    if runtime.thread_limit() < 2:
        pytest.skip("this machine, or NBBN_NUM_THREADS, allows one thread only")
    variables = {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "4", "NBBN_NUM_THREADS": "2"}
    done = run(f"import numba\n{SHARED}", **variables)
    if "No threading layer could be loaded" in done.stderr:
        pytest.skip(f"Numba finds no threading layer {layer}")
    assert done.stdout == f"{layer} 4\n", done.stderr


# --- which pool --------------------------------------------------------------------------------------------

# What Numba would take without nbbn.
FOUND = "import numba; numba.get_num_threads(); print(numba.threading_layer())"


def has_tbb():
    try:
        return metadata.version("tbb") != ""
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not has_tbb(), reason="the wheel tbb is not installed (extra: tbb)")
class TestTbb:
    """Processes of their own, in which NUMBA_THREADING_LAYER is not set unless the test does."""

    @pytest.mark.parametrize("setting", [None, "default", "threadsafe"])
    def test_openmp_is_preferred(self, setting):
        if run(FOUND, NUMBA_THREADING_LAYER="omp").returncode:
            pytest.skip("Numba finds no OpenMP")
        code = "import numba; from nbbn.runtime import start_pool; print(start_pool(), numba.threading_layer())"
        assert check(code, NUMBA_THREADING_LAYER=setting) == "omp omp\n"

    @pytest.mark.parametrize("setting", ["tbb", "forksafe", "safe"])
    def test_the_wheel_is_used_where_it_is_asked_for(self, setting):
        code = "import numba; from nbbn.runtime import start_pool; print(start_pool(), numba.threading_layer())"
        assert check(code, NUMBA_THREADING_LAYER=setting) == "tbb tbb\n"

    @pytest.mark.parametrize("setting", ["omp", "workqueue"])
    def test_a_chosen_layer_stays(self, setting):
        done = run("from nbbn.runtime import start_pool; print(start_pool())", NUMBA_THREADING_LAYER=setting)
        assert done.stdout in (f"{setting}\n", "None\n")

    def test_an_order_that_prefers_another_layer_stays(self):
        code = "from nbbn.runtime import start_pool; print(start_pool())"
        order = "workqueue omp tbb"
        assert check(code, NUMBA_THREADING_LAYER_PRIORITY=order, NUMBA_THREADING_LAYER=None) == "workqueue\n"

    def test_a_pool_that_runs_stays(self):
        found = check(FOUND)
        assert check(f"{FOUND}; import nbbn; from nbbn.runtime import start_pool; print(start_pool())") == found * 2

    def test_an_import_leaves_the_choice_to_numba(self):
        assert check(f"import nbbn; {FOUND}") == check(FOUND)

    def test_a_call_that_starts_the_pool_offers_tbb(self):
        if runtime.thread_limit() < 2:
            pytest.skip("this machine, or NBBN_NUM_THREADS, allows one thread only")
        call = "nbbn.BatchNormalization()(np.ones((1024, 1024), np.float32))"
        code = f"import numba, numpy as np, nbbn; {call}; print(numba.threading_layer())"
        assert check(code, NUMBA_NUM_THREADS="2", NUMBA_THREADING_LAYER="tbb") == "tbb\n"

    def test_a_damaged_library_is_passed_over(self):
        """As if the wheel had a file that cannot be loaded."""
        code = """
from importlib import metadata
class File:
    name = {name!r}
    def locate(self): return "/nowhere/" + self.name
from nbbn.runtime import threadpool
metadata.files = lambda name: [File()]
print(threadpool.start_pool())
"""
        assert check(code.format(name=threadpool._TBB)) == check(FOUND)
        assert check(code.format(name=threadpool._TBB), NUMBA_THREADING_LAYER="tbb") in ("None\n", "tbb\n")  # another


def test_without_openmp_the_wheel_is_offered():
    """Or, where there is none, Numba finds what it would find."""
    code = """
from nbbn.runtime import threadpool
threadpool._has_openmp = lambda: False
offered = []
threadpool.metadata.files = lambda name: offered.append(name)
threadpool.start_pool()
print(offered, threadpool.likely_layer() in ("tbb", "omp", "workqueue"))
"""
    assert check(code, NUMBA_THREADING_LAYER=None) == "['tbb'] True\n"


@pytest.mark.parametrize("setting", ["omp", "workqueue", None])
def test_the_likely_layer_is_the_one_that_starts(setting):
    code = "from nbbn.runtime import likely_layer, start_pool; before = likely_layer(); print(before == start_pool())"
    done = run(code, NUMBA_THREADING_LAYER=setting)
    if (
        setting
        and "None"
        in run("from nbbn.runtime import start_pool; print(start_pool())", NUMBA_THREADING_LAYER=setting).stdout
    ):
        pytest.skip(f"Numba finds no threading layer {setting}")
    assert done.stdout == "True\n", done.stderr


def test_without_the_wheel():
    code = """
from importlib import metadata
def files(name): raise metadata.PackageNotFoundError(name)
metadata.files = files
from nbbn.runtime import start_pool
print(start_pool())
"""
    assert check(code) == check(FOUND)


# --- who may use the pool -----------------------------------------------------------------------------


@pytest.fixture
def two_threads(monkeypatch):
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("Numba has one thread on this machine")
    monkeypatch.setattr(threads, "thread_limit", lambda: 2)
    monkeypatch.setattr(threads, "_address", 1)  # no kernel runs in these tests


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
def test_an_exception_gives_the_pool_of_a_loop_back():
    def loop():
        for pool in runtime.region():
            raise KeyError(pool)

    with pytest.raises(KeyError) as kept:
        loop()
    assert is_granted(), "while the exception, and with it the loop's frame, is still there"
    assert kept.value.args[0]


@pytest.mark.usefixtures("two_threads")
def test_runs_that_take_too_long_are_followed_by_serial_ones(monkeypatch):
    """Durations are set, not measured: nothing here depends on the machine."""
    now = 100.0
    monkeypatch.setattr(threads, "perf_counter", lambda: now)
    monkeypatch.setattr(threads, "_serial_until", 0.0)
    monkeypatch.setattr(threads, "_lost", 0.0)
    monkeypatch.setattr(threads, "_serial_for", threads._SHORTEST)

    def granted(seconds=0.0, elements=1000):
        nonlocal now
        with runtime.parallel_region(elements) as granted:
            now += seconds
        return granted

    assert granted(10, None)  # compiles
    assert granted(10, 10**10)  # 1 ns per element
    assert granted(0.08)
    assert granted()  # it may be chance
    assert granted(0.2)
    assert not granted()
    assert not granted(0.01)
    assert granted(0, None)
    now += 1
    assert granted()
    assert granted(0.0009)
    assert granted(0.004)
    assert not granted()
    for length in (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0):  # late once more
        now = threads._serial_until + 0.001
        assert granted(0.004)
        assert threads._serial_until == pytest.approx(now + length)
    now += 3
    assert granted()
    assert granted(0.004)
    assert threads._serial_until == pytest.approx(now + 0.05)


@pytest.mark.usefixtures("two_threads")
def test_a_signal_handler_inside_a_region_goes_on_alone_and_can_fork():
    with runtime.parallel_region():
        threads._before_fork()
        assert not is_granted()
        threads._after_fork_in_parent()
        assert not in_thread(is_granted)
    assert in_thread(is_granted)


@pytest.mark.parametrize(
    ("layer", "others", "granted"), [("workqueue", 0, True), ("workqueue", 1, False), ("omp", 1, True)]
)
def test_workqueue_is_for_a_process_without_other_threads(monkeypatch, layer, others, granted):
    """Whose kernel would make it end the process."""
    monkeypatch.setattr(threads, "thread_limit", lambda: 2)
    monkeypatch.setattr(threads, "start_pool", lambda: layer)
    monkeypatch.setattr(threads, "addresses", lambda limit: (ctypes.c_int64 * 1)(limit))
    monkeypatch.setattr(threads.threading, "active_count", lambda: 1 + others)
    for name, value in (("_address", 0), ("_leave", None)):
        monkeypatch.setattr(threads, name, value)
    assert bool(is_granted()) == granted


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
    with lock:
        assert in_thread(duplicate(lock).acquire)
        assert not in_thread(lambda: lock.acquire(blocking=False))


def test_state_lock_is_released_by_an_exception():
    lock = runtime.StateLock()
    with pytest.raises(KeyError), lock:
        raise KeyError
    with lock:
        pass


# --- locks and forks, each in a process of its own; test_harmless.py has what users do -------------------------------

IMPORTS = """
import sys
import numpy as np, nbbn
from nbbn.runtime import threadpool, threads
from numba.core.compiler_lock import global_compiler_lock
class Watch:
    def find_spec(name, path=None, target=None):
        if not (global_compiler_lock.is_locked() or threads._is_in_region()):
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
    for t in threads: t.start()
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
