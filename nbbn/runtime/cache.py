"""Compiled kernels on disk: one file per kernel, written whole, checked before use.

Numba's own cache keeps an index that concurrent writers can poison, raises on truncated files, and does not notice
that a callee in another file has changed. Here the file's name is a hash of everything the machine code depends on,
the content is verified, and whatever goes wrong means compiling again.
"""

import contextlib
import hashlib
import os
import pickle
import secrets
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.serialize import dumps

from nbbn.runtime.threadpool import start_pool


def _hash_sources() -> str | None:
    """A hash of all that kernels import, taken at import so that it describes the code that runs; None without."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    try:
        kernels, runtime = (package / "kernels").rglob("*.py"), (package / "runtime").rglob("*.py")
        for path in sorted([package / "core" / "rules.py", *kernels, *runtime]):
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    except OSError:
        return None
    return digest.hexdigest()


_SOURCES = _hash_sources()


@lru_cache(maxsize=1)
def cache_folder() -> Path | None:
    """The folder of compiled kernels: NBBN_CACHE_DIR, else the user's cache folder; None where it cannot be written.

    The files are unpickled, so a folder that somebody else owns or can write to is not used. NBBN_CACHE_DIR="" switches
    the cache off.
    """
    named = os.environ.get("NBBN_CACHE_DIR")
    if named == "" or _SOURCES is None:
        return None
    try:
        folder = Path(named) if named else _user_cache() / "nbbn"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _is_private(folder.stat()) and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        pass
    if named:
        warnings.warn(
            f"NBBN_CACHE_DIR={named!r} is not a folder that this user alone can write to: "
            "every process compiles its kernels anew",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def _is_private(status: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


class KernelCache(_Cache):  # type: ignore[misc]  # Numba's part has no annotations
    """What Numba's dispatcher asks for one kernel, by name and signature."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def cache_path(self) -> str | None:
        folder = cache_folder()
        return None if folder is None else str(folder)

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        target_context.refresh()
        entry = self._entry(sig, target_context.codegen())
        if entry is None:
            return None
        path, key = entry
        try:
            content = path.read_bytes()
            if content[:64] != _seal(key, content[64:]):
                return None
            os.utime(path)  # _prune() deletes what nobody has used
            found = CompileResult._rebuild(target_context, *pickle.loads(content[64:]))
            _forget_module(found)
            return found
        except Exception:  # a damaged file, or one that this Numba cannot read, only costs a compilation
            return None

    def save_overload(self, sig: Any, data: CompileResult) -> None:
        entry = self._entry(sig, data.codegen)
        if entry is None or data.library.has_dynamic_globals:
            return
        path, key = entry
        payload = dumps(data._reduce())
        _forget_module(data)
        # A full or vanished disk costs a compilation next time. Readers see the old file or the new one, never a part.
        new_file = tempfile.NamedTemporaryFile
        with contextlib.suppress(OSError), new_file(dir=path.parent, suffix=".kernel", delete=False) as file:
            try:
                file.write(_seal(key, payload) + payload)
                file.close()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
        _prune(path.parent)

    def _entry(self, sig: Any, codegen: Any) -> tuple[Path, str] | None:
        folder = cache_folder()
        if folder is None:
            return None
        versions = _SOURCES, numba.__version__, llvmlite.__version__, sys.implementation.cache_tag
        key = repr((self._name, str(sig), codegen.magic_tuple(), versions, numba.config.BOUNDSCHECK))
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.kernel", key

    def enable(self) -> None: ...

    def disable(self) -> None: ...

    def flush(self) -> None: ...


def _forget_module(kernel: CompileResult) -> None:
    """Free what Numba keeps for linking a kernel into others, which nobody does: 1 MB, more than its machine code."""
    kernel.library._shared_module = None


def _seal(key: str, payload: bytes) -> bytes:
    """64 bytes that bind the content to its key: a truncated, damaged or swapped file does not match."""
    return hashlib.sha256(key.encode() + payload).hexdigest().encode()


@lru_cache
def _prune(folder: Path) -> None:
    """Delete, once in a process, what other versions have left behind: kernels that nobody has loaded for 90 days.

    A process that wanted to load such a file at this very moment compiles.
    """
    for path in folder.glob("*.kernel"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 90 * 86400:
                path.unlink()


@contextmanager
def _unique_symbols() -> Iterator[None]:
    """Functions compiled here have names that no other process gives.

    Numba counts functions from 1, in every process, and puts the number into the symbol. Two closures of one factory
    can so share a symbol in two cached kernels; in the process that loads both, one would run in place of the other.
    """
    with global_compiler_lock:
        counted = FunctionIdentity._unique_ids
        FunctionIdentity._unique_ids = iter(lambda: secrets.randbits(62), None)  # forked children draw other numbers
        try:
            yield
        finally:
            FunctionIdentity._unique_ids = counted


def compile_kernel(function: Callable[..., Any], name: str, signature: Any, parallel: bool) -> Callable[..., Any]:
    """`function` compiled for exactly `signature`, or taken from the cache. `name` tells it from every other kernel."""
    if parallel:
        start_pool()  # or Numba does, without a look for TBB
    function.__qualname__ = name  # part of the symbol's name: two cached kernels must never share one
    dispatcher = numba.njit(nogil=True, error_model="numpy", parallel=parallel)(function)
    dispatcher._cache = KernelCache(name)
    with _unique_symbols():
        dispatcher.compile(signature)
    dispatcher.disable_compile()
    return dispatcher  # type: ignore[no-any-return]


def entry_point(kernel: Any) -> Callable[..., Any]:
    """The compiled function behind a kernel: quicker, as it does not look at the types of its arguments.

    Only for arguments of the very types that the kernel has been called with.
    """
    (overload,) = kernel.overloads.values()
    return overload.entry_point  # type: ignore[no-any-return]
