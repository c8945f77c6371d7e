"""The cache of compiled kernels: what damages it, who may write to it, what its keys depend on."""

import compileall
import os
import pickle
import shutil
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from numba import types
from numba.core.registry import cpu_target

from nbbn.runtime import cache
from tests.helpers.imports import MODULES, is_in, reachable
from tests.helpers.processes import PACKAGE, check, in_child, run

# --- the cache of compiled kernels, seen from one kernel that is quickly compiled ---------

SIGNATURE = types.void(types.float64[::1])


def compile_add(amount, signature=SIGNATURE, name="add"):
    """A kernel that adds `amount`, and whether it came from the cache."""

    def add(x):
        for i in range(x.size):
            x[i] += amount

    kernel = cache.compile_kernel(add, f"{name}_{amount}", signature)
    x = np.zeros(3)
    kernel(x.astype(kernel.signatures[0][0].dtype.name))
    kernel(x) if signature is SIGNATURE else None
    return x.tolist(), sum(kernel.stats.cache_hits.values()) == 1


ADDED = [1.0, 1.0, 1.0]


@pytest.fixture
def use_folder(monkeypatch):
    """A function that makes a folder the cache, as NBBN_CACHE_DIR would; it expects a warning where there is none."""

    def use(folder):
        monkeypatch.setenv("NBBN_CACHE_DIR", str(folder))
        cache.cache_folder.cache_clear()
        with warnings.catch_warnings(record=True, action="always") as caught:
            found = cache.cache_folder()
        expected = [] if found or not str(folder) else [f"NBBN_CACHE_DIR={str(folder)!r}: {folder} "]
        assert [str(w.message)[: len(e)] for w, e in zip(caught, expected, strict=True)] == expected
        return found

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


def test_a_kernel_keeps_only_its_machine_code(use_folder, tmp_path):
    """Its code for LLVM is 2 MB, of which a process that compiled many had gigabytes."""
    modules = cpu_target.target_context.codegen()._engine._ee._modules
    before = len(modules)
    for folder, cached in ((tmp_path / "cache", False), (tmp_path / "cache", True), ("", False)):
        use_folder(folder)
        assert compile_add(2) == ([2.0, 2.0, 2.0], cached)
        assert len(modules) == before


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


def test_a_kernel_that_nobody_uses_any_more_is_deleted(folder):
    """When another is written; what is not a kernel stays."""
    hundred_days_ago = time.time() - 100 * 86400

    def age(path):
        os.utime(path, (hundred_days_ago, hundred_days_ago))

    compile_add(1)
    (used,) = files(folder)
    compile_add(2)
    (unused,) = set(files(folder)) - {used}
    foreign = folder / "notes.txt"
    foreign.write_text("mine")
    for path in (used, unused, foreign):
        age(path)
    assert compile_add(1) == (ADDED, True)
    cache._prune.cache_clear()
    compile_add(3)
    assert {used, foreign} < set(files(folder))
    assert unused not in files(folder)
    age(used)
    compile_add(4)
    assert used in files(folder), "the folder is gone through once in a process"


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
    assert cache.find_cache() == (None, f"{tmp_path} belongs to user 12345, neither to this one, 0, nor to root")


READ_ONLY = pytest.mark.skipif(not hasattr(os, "getuid"), reason="permissions are POSIX's")


def as_reader(folder, function):
    """Run `function` in a child that can read the folder, and not write to it: where root has filled it, as nobody."""
    folder.chmod(0o555)

    def work():
        if os.getuid() == 0:
            os.setuid(65534)
        function()

    in_child(work)


@pytest.fixture
def prefilled(use_folder):
    """A cache with one kernel in it, where any user can get to."""
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        parent.chmod(0o755)
        folder = use_folder(parent / "cache")
        compile_add(1)
        yield folder
        folder.chmod(0o755)


@READ_ONLY
def test_a_prefilled_cache_may_be_read_only(prefilled):
    """Kernels are loaded from it, and what is missing is compiled; nothing is written, not even a time."""
    before = [(p, p.stat().st_mtime_ns) for p in files(prefilled)]

    def load():
        cache.cache_folder.cache_clear()
        assert cache.find_cache() == (prefilled, "read-only")
        assert compile_add(1) == (ADDED, True)
        assert compile_add(2) == ([2.0, 2.0, 2.0], False)
        assert cache.kept_where() == f"not kept: {prefilled} is read-only"

    as_reader(prefilled, load)
    assert [(p, p.stat().st_mtime_ns) for p in files(prefilled)] == before


@READ_ONLY
def test_a_cache_that_cannot_be_read(prefilled):
    def look():
        prefilled.chmod(0o300)
        if os.getuid() == 0:
            os.setuid(65534)
        assert cache.find_cache() == (None, f"{prefilled} cannot be read by this user")

    in_child(look)


@READ_ONLY
@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write_to_is_not_loaded(folder, mode):
    compile_add(1)
    (path,) = files(folder)
    path.chmod(mode)
    assert compile_add(1) == (ADDED, False)
    assert compile_add(1) == (ADDED, True)  # it was written anew


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


def test_a_folder_that_cannot_be_used_is_told_once(tmp_path):
    """By a warning; results are right all the same."""
    (tmp_path / "file").write_text("")
    done = run(f"{LAYER}\nnbbn.BatchNormalization()(np.ones((4, 3)))", NBBN_CACHE_DIR=str(tmp_path / "file"))
    assert done.stdout.startswith("None 1 ")
    assert done.stderr.count("RuntimeWarning: NBBN_CACHE_DIR=") == 1


def test_read_only_package_and_no_home(tmp_path):
    """Nothing is written anywhere; where a home is missing for no fault of the user's, nothing is said."""
    package = tmp_path / "nbbn"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    folders = [package, *(p for p in package.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    before = sorted(package.rglob("*"))
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "home")
    home = {"HOME": nowhere, "XDG_CACHE_HOME": None, "LOCALAPPDATA": nowhere}
    done = run(LAYER, "-B", root=tmp_path, NBBN_CACHE_DIR=None, **home)
    for folder in folders:
        folder.chmod(0o755)  # for pytest, which deletes them
    assert (done.stdout.split(maxsplit=2)[:2], done.stderr) == (["None", "1"], "")
    assert sorted(package.rglob("*")) == before


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
    rules, cached = tmp_path / "nbbn" / "core" / "rules.py", str(tmp_path / "cache")
    original = rules.read_text()

    def result():
        return run_layer(root=tmp_path, NBBN_CACHE_DIR=cached)[1:]

    assert result() == (1, pytest.approx(USED))
    edit = "def normalize(x, mean, scale, shift):\n    return x * type(x)(0) + type(x)(7)\n"
    rules.write_text(f"{original}\n\n@register_jitable\n{edit}")
    assert result() == (1, 7.0)
    rules.write_text(original)
    assert result() == (0, pytest.approx(USED))


def as_zip(package, root):
    return shutil.make_archive(str(root / "app"), "zip", package.parent, package.name)


def as_byte_code(package, root):
    """A tree with .pyc files in the place of sources."""
    shutil.copytree(package, root / "nbbn", ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(root, quiet=1, legacy=True)
    for path in root.rglob("*.py"):
        path.unlink()
    return root


@pytest.mark.parametrize("ship", [as_zip, as_byte_code])
def test_a_cache_without_source_files(tmp_path, ship):
    """The second process finds what the first one has compiled; nothing is said."""
    root = ship(PACKAGE, tmp_path)
    for compiled in (1, 0):
        done = run(LAYER, root=root, NBBN_CACHE_DIR=str(tmp_path / "cache"))
        folder, count, _ = done.stdout.split(maxsplit=2)
        assert (folder, int(count), done.stderr) == (str(tmp_path / "cache"), compiled, "")


def test_code_that_cannot_be_read(monkeypatch):
    """As of a module that was compiled to machine code."""
    monkeypatch.setattr(cache, "code_hash", lambda: None)
    assert cache.find_cache()[1].startswith("the code of the kernels")
    monkeypatch.setenv("NBBN_CACHE_DIR", "")
    assert cache.find_cache() == (None, "NBBN_CACHE_DIR is empty")


def test_the_hash_of_byte_code():
    """The same wherever it lies, and another one for another constant, name or nested function."""

    def facts(text, file="a.py"):
        return cache._facts(compile(text, file, "exec"))

    text = "def f(x):\n    return lambda: x in {'a', 'b', 3} and (1.0, -0.0)"
    assert facts(text) == facts(text, "b.py") == facts(f"# a comment\n{text}")
    changes = [("-0.0", "0.0"), ("1.0", "1"), ("'b'", "'c'"), ("f(x)", "f(x, y=1)"), ("lambda:", "lambda y:")]
    assert len({facts(text), *(facts(text.replace(*c)) for c in changes)}) == len(changes) + 1


def test_the_key_covers_what_kernels_import():
    """Whatever else they imported could change their machine code unnoticed."""
    assert reachable("kernels.cpu.steps") > {"core.rules", "kernels.cpu.rows", "kernels.cpu.llvm"}
    for module in (m for m in MODULES if is_in(m, "kernels")):
        needed = [m for m in reachable(module) if not is_in(m, "kernels") and not is_in(m, "runtime")]
        assert set(needed) <= {"core.rules", "core.dtypes"}, module  # of dtypes, names for messages


def test_processes_that_start_together_share_a_cold_cache(tmp_path):
    """Each result is right, and afterwards nobody compiles."""
    results = []

    def one():
        results.append(run_layer(NBBN_CACHE_DIR=str(tmp_path / "cache"))[2])

    starters = [threading.Thread(target=one) for _ in range(4)]
    for t in starters:
        t.start()
    for t in starters:
        t.join()
    assert results == [pytest.approx(USED)] * 4
    assert run_layer(NBBN_CACHE_DIR=str(tmp_path / "cache"))[1] == 0


CALLS = {
    "rows": ((4, 3), -1),
    "rows in parallel": ((512, 512), -1),
    "planes in parallel": ((8, 32, 32, 32), 1),
}
RESULTS = """
import zlib, numpy as np, nbbn
for shape, axis in {calls}:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    print(zlib.crc32(nbbn.BatchNormalization(axis)(x, training=True)))
"""


def test_kernels_that_several_processes_compiled_serve_one(tmp_path):
    """All code in a process shares one table of symbols, and each process numbers its functions from 1: a function of
    one kernel must not be taken for that of another."""

    def results(*calls, **variables):
        return check(RESULTS.format(calls=calls), **variables)

    expected = [results(call, NBBN_CACHE_DIR=str(tmp_path / "cache")) for call in CALLS.values()]
    for calls in (list(CALLS), list(CALLS)[::-1]):
        found = results(*[CALLS[c] for c in calls], NBBN_CACHE_DIR=str(tmp_path / "cache")).splitlines(keepends=True)
        assert dict(zip(calls, found, strict=True)) == dict(zip(CALLS, expected, strict=True))


# Numba is warm in all of them, or its start would take most of the time. Half of the processes begin with the other
# kernel: the writers of one file meet, and those of different files.
ROUNDS = """
import os, tempfile
from tests.helpers.processes import in_children
from tests.test_cache import compile_add
from nbbn.runtime import cache_folder

def start_cold(order):
    for amount in order:
        assert compile_add(amount)[0] == [float(amount)] * 3

def start_warm():
    assert compile_add(1)[1] and compile_add(2)[1]

compile_add(3)
for _ in range(6):
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NBBN_CACHE_DIR"] = folder
        cache_folder.cache_clear()
        in_children([lambda: start_cold((1, 2)), lambda: start_cold((2, 1))] * 4)
        in_children([start_warm])
        assert len(os.listdir(folder)) == 2
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_eight_processes_six_times():
    assert check(ROUNDS, timeout=120, NBBN_CACHE_DIR="") == ""
