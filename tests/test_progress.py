"""What is said while kernels are compiled: log lines, and a hint at a terminal."""

import io
import logging
import re
import time
from types import SimpleNamespace

import numba
import pytest

from nbbn.kernels.cpu.views import Data, Numbers
from nbbn.runtime import cache, progress


class Terminal(io.StringIO):
    def isatty(self):
        return not super().isatty()  # raises if it is closed


def use(monkeypatch, stream):
    """Have progress.py see `stream` as stderr, which pytest itself sets before each test."""
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))


@pytest.fixture
def terminal(monkeypatch):
    """stderr as a terminal, of a program without logging that has compiled nothing; nobody waits."""
    stream = Terminal()
    use(monkeypatch, stream)
    monkeypatch.setattr(progress.LOGGER, "hasHandlers", lambda: False)
    monkeypatch.setattr(progress, "_spent", 0.0)
    monkeypatch.setattr(progress, "_has_hinted", False)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    return stream


def compile_for(seconds, place="kept nowhere"):
    """A compilation that lasts until the hint is there, but no longer than `seconds`."""
    with progress.compiling(place):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end and not progress._has_hinted:
            time.sleep(0.001)


def test_the_hint_is_one_line_once(terminal):
    for _ in range(2):
        compile_for(20)
    assert terminal.getvalue().startswith("nbbn is compiling kernels, which takes some seconds; kept nowhere. ")
    assert terminal.getvalue().count("\n") == 1


def test_no_hint_before_its_time(terminal, monkeypatch):
    """Counted over all compilations of the process."""
    monkeypatch.setattr(progress, "PATIENCE", 1000.0)
    compile_for(0.01)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(progress, "_spent", 1000.0)
    compile_for(20)
    assert terminal.getvalue() != ""


@pytest.mark.parametrize(
    "stream", [io.StringIO(), None, object(), Terminal()], ids=["file", "none", "object", "closed"]
)
def test_no_hint_where_there_is_no_terminal(terminal, monkeypatch, stream):
    if isinstance(stream, Terminal):
        stream.close()
    use(monkeypatch, stream)
    compile_for(0.01)
    assert not progress._has_hinted


def test_no_hint_beside_logging(terminal, monkeypatch):
    """A NullHandler is enough: it is how the hint is switched off."""
    monkeypatch.undo()
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "_has_hinted", False)
    use(monkeypatch, terminal)
    handler = logging.NullHandler()
    progress.LOGGER.addHandler(handler)
    compile_for(0.01)
    progress.LOGGER.removeHandler(handler)
    assert terminal.getvalue() == ""


def test_a_line_for_each_kernel_that_is_compiled(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NBBN_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    cache.cache_folder.cache_clear()
    memory = [Data(numba.uint16), numba.types.Array(numba.int16, 1, "C")]
    rows, grid = [numba.types.Array(numba.float32, 1, "C")] * 2, Numbers(numba.types.int64, 3)
    signature = numba.void(*memory, *rows, grid, numba.types.none)
    with caplog.at_level(logging.INFO, logger="nbbn"):
        for _ in range(2):
            cache.compile_kernel(lambda x, y, mean, scale, grid, relu: None, "nothing", signature)
    cache.cache_folder.cache_clear()
    (line,) = [r.getMessage() for r in caplog.records if r.name == "nbbn"]
    kept = re.escape(f"kept in {tmp_path}")
    assert re.fullmatch(rf"compiled nothing \(float16 x; bfloat16 y; float32 mean, scale\) in \d+\.\d s; {kept}", line)
