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
from time import perf_counter
from types import CodeType
from typing import Any

import llvmlite
import numba
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.serialize import dumps

from nbbn.runtime.passes import KernelCompiler
from nbbn.runtime.plain import PLAIN
from nbbn.runtime.progress import LOGGER, compiling, in_short

_HASHED = ("nbbn.core.rules", "nbbn.kernels", "nbbn.runtime")


@lru_cache(maxsize=8)
def code_hash(modules: tuple[str, ...] = _HASHED) -> str | None:
    """A hash of all that the machine code of kernels is made from; None where it cannot be read.

    modules: the imported modules to hash, by what their names begin with.

    Taken when the kernels are imported, so that it describes the code that runs: a file may change later. Of the source
    where there is one, else of what the import system has in its place, as for .pyc files and frozen programs.
    """
    digest = hashlib.sha256()
    for name in sorted(n for n in sys.modules if n.startswith(modules)):
        try:
            loader: Any = sys.modules[name].__spec__.loader  # type: ignore[union-attr]
            source = loader.get_source(name)
            digest.update(f"{name}\0{_facts(loader.get_code(name)) if source is None else source}\0".encode())
        except (AttributeError, ImportError, OSError):
            return None
    return digest.hexdigest()


def _facts(code: CodeType) -> str:
    """What a code object does, without where it lies and in an order that every process sees."""
    constants = [
        _facts(c) if isinstance(c, CodeType) else repr(sorted(map(repr, c)) if isinstance(c, frozenset) else c)
        for c in code.co_consts
    ]
    names = code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    arguments = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    return repr((names, arguments, code.co_code, code.co_exceptiontable, constants))


@lru_cache(maxsize=1)
def cache_folder() -> Path | None:
    """The folder of compiled kernels, as find_cache() gives it at the first call. Warns where NBBN_CACHE_DIR names one
    that cannot be used."""
    folder, why = find_cache()
    named = os.environ.get("NBBN_CACHE_DIR")
    if folder is None and named and not PLAIN:
        consequence = "there is no kernel cache: every process compiles its kernels anew"
        warnings.warn(f"NBBN_CACHE_DIR={named!r}: {why}; {consequence}", RuntimeWarning, stacklevel=2)
    return folder


def find_cache() -> tuple[Path | None, str]:
    """The folder of compiled kernels, and what is wrong with it: NBBN_CACHE_DIR, else the user's cache folder; None
    where kernels cannot be loaded from it.

    The files are unpickled, so a folder that others own or can write to is not used; one of root's is as good as the
    user's own. Nothing is written to a folder that is read-only. NBBN_CACHE_DIR="" switches the cache off.
    """
    named = os.environ.get("NBBN_CACHE_DIR")
    if PLAIN or named == "":
        return None, "NUMBA_DISABLE_JIT is set" if PLAIN else "NBBN_CACHE_DIR is empty"
    if code_hash() is None:
        return None, "the code of the kernels, which the names of the files depend on, cannot be read here"
    try:
        folder = Path(named) if named else _user_cache() / "nbbn"
    except RuntimeError as error:  # there is no home folder
        return None, str(error)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fault = _fault(folder.stat())
    except OSError as error:
        return None, f"{folder} cannot be made or looked at: {error.strerror}"
    if fault is None and not os.access(folder, os.R_OK | os.X_OK):
        fault = "cannot be read by this user"
    if fault is not None:
        return None, f"{folder} {fault}"
    return folder, "" if os.access(folder, os.W_OK) else "read-only"


def _fault(status: os.stat_result) -> str | None:
    """Why the content of a file or folder cannot be trusted; None if it can."""
    if not hasattr(os, "getuid"):
        return None
    if status.st_uid not in (os.getuid(), 0):
        return f"belongs to user {status.st_uid}, neither to this one, {os.getuid()}, nor to root"
    if status.st_mode & 0o022:
        return f"can be written to by others than its owner (mode {status.st_mode & 0o777:o}; chmod go-w)"
    return None


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def load_kernel(key: str) -> bytes | None:
    """What save_kernel() has kept under this key; None where there is nothing, or a damaged file, or one of others."""
    path = _path(key)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            content = b"" if _fault(os.fstat(file.fileno())) else file.read()
    except OSError:
        return None
    if content[:64] != _seal(key, content[64:]):
        return None
    with contextlib.suppress(OSError):  # the folder may be read-only
        os.utime(path)  # _prune() deletes what nobody has used
    return content[64:]


def save_kernel(key: str, payload: bytes) -> None:
    """Keep a compiled kernel under a key, which must name all that it depends on.

    A full or vanished disk costs a compilation next time. Readers see the old file or the new one, never a part.
    """
    path = _path(key)
    if path is None:
        return
    new_file = tempfile.NamedTemporaryFile
    with contextlib.suppress(OSError), new_file(dir=path.parent, suffix=".kernel", delete=False) as file:
        try:
            file.write(_seal(key, payload) + payload)
            file.close()
            os.chmod(file.name, 0o644)  # for whoever can enter the folder: root may have filled it for a service
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
    _prune(path.parent)


def _path(key: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / f"{hashlib.sha256(key.encode()).hexdigest()}.kernel"


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
        payload = load_kernel(self._key(sig, target_context.codegen()))
        try:
            return None if payload is None else CompileResult._rebuild(target_context, *pickle.loads(payload))
        except Exception:  # a file that this Numba cannot read only costs a compilation
            return None

    def save_overload(self, sig: Any, data: CompileResult) -> None:
        if cache_folder() is not None and not data.library.has_dynamic_globals:
            save_kernel(self._key(sig, data.codegen), dumps(data._reduce()))

    def _key(self, sig: Any, codegen: Any) -> str:
        versions = code_hash(), numba.__version__, llvmlite.__version__, sys.implementation.cache_tag
        return repr((self._name, str(sig), codegen.magic_tuple(), versions, numba.config.BOUNDSCHECK))

    def enable(self) -> None: ...

    def disable(self) -> None: ...

    def flush(self) -> None: ...


def _forget_modules(kernel: CompileResult) -> None:
    """Free what Numba keeps for linking a kernel into others and for looking at its code, which nobody does: 2 MB, more
    than the machine code."""
    library = kernel.library
    library._shared_module = None
    with contextlib.suppress(AttributeError, RuntimeError):  # of another Numba, which keeps them in another way
        library.codegen._engine._ee.remove_module(library._final_module)  # the machine code stays
        del library._final_module


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


def compile_kernel(
    function: Callable[..., Any], name: str, signature: Any, caller: str = "python"
) -> Callable[..., Any]:
    """`function` compiled for exactly `signature`, or taken from the cache. `name` tells it from every other kernel.

    caller: who can call it: "python" or "c" and compiled functions of Numba's, or "numba", these alone. What leads to
    it from elsewhere is not compiled.
    """
    function.__qualname__ = name  # part of the symbol's name: two cached kernels must never share one
    apart = {"no_cpython_wrapper": caller != "python", "no_cfunc_wrapper": caller != "c"}
    options = {"nogil": True, "error_model": "numpy", **apart}
    if caller != "numba":  # what such functions call is plain code in many functions, which Numba has to inline
        options["pipeline_class"] = KernelCompiler
    dispatcher = numba.njit(**options)(function)
    dispatcher._cache = KernelCache(name)
    start, place = perf_counter(), kept_where()
    with _unique_symbols(), compiling(place):
        dispatcher.compile(signature)
        _forget_modules(*dispatcher.overloads.values())
    if not dispatcher.stats.cache_hits:
        seconds = perf_counter() - start
        LOGGER.info("compiled %s (%s) in %.1f s; %s", name, in_short(function, signature), seconds, place)
    dispatcher.disable_compile()
    return dispatcher  # type: ignore[no-any-return]


def kept_where() -> str:
    """Where a compiled kernel goes, for the reader of a message."""
    folder, why = find_cache()
    return f"kept in {folder}" if not why else f"not kept: {f'{folder} is read-only' if folder else why}"


@lru_cache(maxsize=1024)  # to look into what Numba keeps takes some 5 us
def entry_point(kernel: Any) -> Callable[..., Any]:
    """The compiled function behind a kernel: quicker, as it does not look at the types of its arguments.

    Only for arguments of the very types that the kernel is compiled for: others are misread, or end the process.
    """
    if PLAIN:
        return kernel  # type: ignore[no-any-return]
    (overload,) = kernel.overloads.values()
    return overload.entry_point  # type: ignore[no-any-return]
