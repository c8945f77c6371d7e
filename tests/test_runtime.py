"""What a library must not do to the process that imports it: crash, hang, print, use stale code, or trust a file."""

import copy
import os
import pickle
import shutil
import sys
import textwrap
import threading
from functools import lru_cache
from pathlib import Path

import numba
import numpy as np
import pytest
from numba import types
from processes import PACKAGE, check, run

from nbbn import runtime
from nbbn.runtime import cache, threads

# --- the cache of compiled kernels, seen from one kernel that is quickly compiled ---------

SIGNATURE = types.void(types.float64[::1])


def compile_add(amount, signature=SIGNATURE, name="add"):
    """A kernel that adds `amount`, and whether it came from the cache."""

    def add(x):
        for i in range(x.size):
            x[i] += amount

    kernel = cache.compile_kernel(add, f"{name}_{amount}", signature, parallel=False)
    x = np.zeros(3)
    kernel(x.astype(kernel.signatures[0][0].dtype.name))
    kernel(x) if signature is SIGNATURE else None
    return x.tolist(), sum(kernel.stats.cache_hits.values()) == 1


ADDED = [1.0, 1.0, 1.0]


@pytest.fixture
def use_folder(monkeypatch):
    """A function that makes a folder the cache, as NBBN_CACHE_DIR would."""

    def use(folder):
        monkeypatch.setenv("NBBN_CACHE_DIR", str(folder))
        cache.cache_folder.cache_clear()
        return cache.cache_folder()

    yield use
    monkeypatch.undo()
    cache.cache_folder.cache_clear()


@pytest.fixture
def folder(use_folder, tmp_path):
    return use_folder(tmp_path / "cache")


def files(folder):
    return sorted(p for p in Path(folder).iterdir())


def test_second_time_comes_from_the_cache(folder):
    assert compile_add(1) == (ADDED, False)
    assert compile_add(1) == (ADDED, True)
    assert len(files(folder)) == 1


def test_name_and_signature_tell_kernels_apart(folder):
    compile_add(1)
    assert compile_add(2) == ([2.0, 2.0, 2.0], False)
    other = types.void(types.Array(types.float64, 1, "A"))
    assert compile_add(1, other)[1] is False
    assert compile_add(1, types.void(types.float32[::1]))[1] is False
    assert len(files(folder)) == 4


DAMAGE = {
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "seal only": lambda content: content[:64],
    "truncated": lambda content: content[: len(content) // 2],
    "last byte missing": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "garbage": lambda content: bytes(range(256)) * 20,
    "one bit": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "other pickle": lambda content: content[:64] + pickle.dumps([1, 2, 3]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_heal(folder, kind):
    compile_add(1)
    (path,) = files(folder)
    content = path.read_bytes()
    path.write_bytes(DAMAGE[kind](content))
    assert compile_add(1) == (ADDED, False)
    assert compile_add(1) == (ADDED, True)
    assert files(folder) == [path]


def test_swapped_files_heal(folder):
    compile_add(1)
    compile_add(2)
    one, two = files(folder)
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    assert compile_add(1) == (ADDED, False)
    assert compile_add(2) == ([2.0, 2.0, 2.0], False)
    assert compile_add(1) == (ADDED, True)


def test_a_sealed_file_that_cannot_be_loaded_costs_a_compilation(folder, monkeypatch):
    """As one that another build of Numba wrote under the same version."""
    compile_add(1)

    def rebuild(*arguments):
        raise RuntimeError("what is this?")

    with monkeypatch.context() as patch:
        patch.setattr(cache.CompileResult, "_rebuild", rebuild)
        assert compile_add(1) == (ADDED, False)
    assert compile_add(1) == (ADDED, True)


def test_a_folder_in_place_of_the_file(folder):
    compile_add(1)
    (path,) = files(folder)
    path.unlink()
    path.mkdir()
    assert compile_add(1) == (ADDED, False)
    assert compile_add(1) == (ADDED, False)


def test_the_folder_vanishes(folder):
    compile_add(1)
    shutil.rmtree(folder)
    assert compile_add(1) == (ADDED, False)


class FullDisk:
    """A temporary file that nothing can be written to."""

    def __init__(self, make, **options):
        self._file = make(**options)
        self.name = self._file.name

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def write(self, content):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failing", ["replace", "write"])
def test_a_full_disk_leaves_nothing_behind(folder, failing, monkeypatch):
    if failing == "replace":
        monkeypatch.setattr(cache.os, "replace", FullDisk.write)
    else:
        make = cache.tempfile.NamedTemporaryFile
        monkeypatch.setattr(cache.tempfile, "NamedTemporaryFile", lambda **options: FullDisk(make, **options))
    assert compile_add(1) == (ADDED, False)
    assert files(folder) == []


# --- which folder ---------------------------------------------------------------------------


def test_the_folder_is_made_private(use_folder, tmp_path):
    folder = use_folder(tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_an_empty_name_switches_the_cache_off(use_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert use_folder("") is None
    assert compile_add(1) == (ADDED, False)
    assert compile_add(1) == (ADDED, False)
    assert files(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are POSIX's")
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_can_write_to_is_not_used(use_folder, tmp_path, mode):
    """Its files are unpickled."""
    tmp_path.chmod(mode)
    assert use_folder(tmp_path) is None
    assert compile_add(1) == (ADDED, False)
    assert files(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_not_used(use_folder, tmp_path):
    os.chown(tmp_path, 12345, 12345)
    assert use_folder(tmp_path) is None


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root can write everywhere")
def test_an_unwritable_folder_is_not_used(use_folder, tmp_path):
    tmp_path.chmod(0o500)
    assert use_folder(tmp_path) is None
    assert use_folder(tmp_path / "deeper") is None
    assert compile_add(1) == (ADDED, False)


@pytest.mark.parametrize("name", ["file", "file/deeper"])
def test_a_file_in_the_way(use_folder, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    assert use_folder(tmp_path / name) is None
    assert compile_add(1) == (ADDED, False)
    assert (tmp_path / "file").read_text() == "mine"


LAYER = """
import os, numpy as np, nbbn
from nbbn.runtime import cache, cache_folder
saved = []
save = cache.KernelCache.save_overload
cache.KernelCache.save_overload = lambda self, *a: (saved.append(self._name), save(self, *a))[1]
y = nbbn.BatchNormalization()(np.ones((4, 3), np.float32))
print(cache_folder(), len(saved), y.ravel()[:1])
"""
USED = 1 / np.sqrt(np.float32(1.001))


def run_layer(**variables):
    """The cache folder, the number of kernels that were compiled, and an element of the result."""
    folder, compiled, value = check(LAYER, **variables).split(maxsplit=2)
    return folder, int(compiled), float(value.strip("[]\n"))


def test_without_a_home(tmp_path):
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "home")
    found = run_layer(HOME=nowhere, XDG_CACHE_HOME=None, NBBN_CACHE_DIR=None, LOCALAPPDATA=nowhere)
    assert found == ("None", 1, pytest.approx(USED))


def test_the_users_cache_folder(tmp_path):
    if sys.platform in ("win32", "darwin"):
        pytest.skip("XDG_CACHE_HOME is Linux's")
    code = "from nbbn.runtime import cache_folder; print(cache_folder())"
    for xdg, expected in ((str(tmp_path / "xdg"), "xdg/nbbn"), (None, ".cache/nbbn")):
        found = check(code, HOME=str(tmp_path), XDG_CACHE_HOME=xdg, NBBN_CACHE_DIR=None)
        assert found.strip() == str(tmp_path / expected)


def test_an_edited_rule_is_compiled_anew(tmp_path):
    """Kernels call rules.py: the machine code of one depends on the text of the other. An undone edit costs nothing."""
    shutil.copytree(PACKAGE, tmp_path / "nbbn", ignore=shutil.ignore_patterns("__pycache__"))
    rules, cached = tmp_path / "nbbn" / "rules.py", str(tmp_path / "cache")
    original = rules.read_text()

    def result():
        return run_layer(root=tmp_path, NBBN_CACHE_DIR=cached)[1:]

    assert result() == (1, pytest.approx(USED))
    edit = "def normalize(x, mean, scale, shift):\n    return x * type(x)(0) + type(x)(7)\n"
    rules.write_text(f"{original}\n\n@register_jitable\n{edit}")
    assert result() == (1, 7.0)
    rules.write_text(original)
    assert result() == (0, pytest.approx(USED))


def test_processes_that_start_together_share_a_cold_cache(tmp_path):
    """Each result is right, and afterwards nobody compiles."""
    results = []

    def one():
        results.append(run_layer(NBBN_CACHE_DIR=str(tmp_path / "cache"))[2])

    starters = [threading.Thread(target=one) for _ in range(2)]
    for t in starters:
        t.start()
    for t in starters:
        t.join()
    assert results == [pytest.approx(USED)] * 2
    assert run_layer(NBBN_CACHE_DIR=str(tmp_path / "cache"))[1] == 0


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
