"""Kernels of a GPU on disk: in the folder of the CPU's, by the same rules (test_cache.py)."""

import os
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (extra: cuda)", allow_module_level=True)
if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("Numba's simulator compiles nothing", allow_module_level=True)

from nbbn.kernels.cuda import broadcast, steps, strided
from nbbn.runtime import cache
from nbbn.streams import compiling
from tests.helpers import cubins
from tests.helpers.cubins import VARIANT
from tests.helpers.imports import MODULES, is_in, reachable
from tests.helpers.processes import run
from tests.test_cache import DAMAGE, files

PROGRAM = "from tests.helpers.cubins import main; main()"


def test_another_process_compiles_nothing(tmp_path):
    """It gives the driver the same bytes. Both are real: only the driver is not."""

    def output():
        done = run(PROGRAM, timeout=200, NBBN_CACHE_DIR=str(tmp_path))
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    compiled, *first = output()
    assert compiled == "1"
    (path,) = files(tmp_path)
    assert output() == ["0", *first]
    path.write_bytes(path.read_bytes()[:-1])
    compiled, name, *_ = output()
    assert (compiled, name) == ("1", first[0])
    assert output()[0] == "0"


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """What has been compiled, in a moment; the cache is in tmp_path."""
    monkeypatch.setenv("NBBN_CACHE_DIR", str(tmp_path))
    cache.cache_folder.cache_clear()
    found = []
    monkeypatch.setattr(compiling, "_compile", lambda *a: found.append(a) or b"name\0cu\0bin" * 100)
    with cubins.installed():
        yield found
    monkeypatch.undo()
    cache.cache_folder.cache_clear()


def load(step="infer", variant=VARIANT):
    compiling.function.cache_clear()
    compiling._capability.cache_clear()
    return compiling.function(steps.kernel(step, variant), 0)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_heal(kind, compiled, tmp_path):
    load(), load()
    assert len(compiled) == 1
    (path,) = files(tmp_path)
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    load(), load()
    assert len(compiled) == 2
    assert files(tmp_path) == [path]


def test_swapped_files_heal(compiled, tmp_path):
    load(), load("train")
    one, two = files(tmp_path)
    content = one.read_bytes()
    one.write_bytes(two.read_bytes()), two.write_bytes(content)
    load(), load("train")
    assert len(compiled) == 4


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="permissions are POSIX's")
def test_a_file_that_others_can_write_to_is_not_loaded(compiled, tmp_path):
    load()
    files(tmp_path)[0].chmod(0o666)
    load()
    assert len(compiled) == 2


def test_without_a_cache(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("NBBN_CACHE_DIR", "")
    cache.cache_folder.cache_clear()
    load(), load()
    assert len(compiled) == 2
    assert files(tmp_path) == []


def other_code(monkeypatch):
    monkeypatch.setattr(compiling, "code_hash", lambda modules: "another")


def other_compiler(monkeypatch):
    monkeypatch.setattr(compiling, "_versions", lambda: ("another",))


def other_machine(monkeypatch):
    monkeypatch.setattr(cubins, "CAPABILITY", (10, 0))


@pytest.mark.parametrize("change", [other_code, other_compiler, other_machine])
def test_what_a_cubin_depends_on(change, compiled, monkeypatch):
    load()
    with monkeypatch.context() as patch:
        change(patch)
        load(), load()
    load()
    assert len(compiled) == 2


def test_steps_and_variants_have_files_of_their_own(compiled, tmp_path):
    load(), load("train"), load(variant=replace(VARIANT, relu=True))
    load(variant=replace(VARIANT, state=np.dtype(np.float64)))
    assert len(compiled) == len(files(tmp_path)) == 4


def test_kernels_beside_those_of_steps_have_files_of_their_own(compiled, tmp_path):
    """By dtypes, the number of dimensions, and all else that is compiled in."""
    single, double = np.dtype(np.float32), np.dtype(np.float64)
    kernels = [strided.copy(single, double, 1), strided.copy(double, single, 1), strided.copy(single, double, 2)]
    kernels += [strided.add(single), strided.first_steps(single), strided.numbers(8), strided.numbers(5)]
    kernels += [
        broadcast.sums("scale", single, None, single, True, 256, (1, 2)),
        broadcast.sums("bias", single, None, single, True, 256, (1, 2)),
        broadcast.sums("bias", single, single, single, True, 256, (1, 2)),
        broadcast.sums("bias", single, None, double, True, 256, (1, 2)),
        broadcast.sums("bias", single, None, single, False, 256, (1, 2)),
        broadcast.sums("bias", single, None, single, True, 128, (1, 2)),
        broadcast.sums("bias", single, None, single, True, 256, (2, 1)),
    ]
    for _ in range(2):
        compiling.function.cache_clear()
        for kernel in kernels:
            compiling.function(kernel, 0)
    assert len(compiled) == len(files(tmp_path)) == len(kernels)


def test_versions_are_those_of_all_that_compiles():
    found = " ".join(compiling._versions())
    for name in ("numba-cuda", "cuda-core", "nvidia-nvjitlink"):
        assert f"{name} " in found or f"{name}-cu" in found


def test_all_code_of_kernels_is_hashed():
    """What they are made from, and nothing of the host's."""
    having = {m for m in MODULES if is_in(m, "kernels.cuda") and "Kernel(" in MODULES[m].read_text()}
    assert {f"nbbn.{m}" for m in having} == {m.__name__ for m in compiling.KERNELS}
    made_of = {m for one in having for m in (*reachable(one), one) if not m.endswith("kernels.cuda")}
    assert {f"nbbn.{m}" for m in made_of if is_in(m, "kernels") or is_in(m, "core")} == set(compiling.SOURCES)
    assert cache.code_hash(compiling.SOURCES) is not None
