"""Numba's thread pool: which threading layer it has, and what a thread that has used it leaves behind.

Numba takes the first layer of tbb, omp, workqueue that it can load. OpenMP is the quickest, and its dangers are those
of nested and forked calls, which never reach it from here (threads.py). The pip wheel `tbb` puts its library into
<prefix>/lib, where neither the dynamic linker nor Numba looks; once that very file is loaded, Numba finds it by name.
So it is loaded only for who asks for it, or has no OpenMP.
"""

import contextlib
import ctypes
import importlib
import re
import sys
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import metadata

import numba
from llvmlite import binding
from numba.core.compiler_lock import global_compiler_lock
from numba.np.ufunc import parallel as numba_pool

# The names by which Numba asks for the library.
_TBB = {"win32": "tbb12.dll", "darwin": "libtbb.12.dylib"}.get(sys.platform, "libtbb.so.12")
# Settings of NUMBA_THREADING_LAYER that ask for TBB, and those that OpenMP satisfies as well.
_ASKS_FOR_TBB, _ADMITS_BOTH = ("tbb", "safe", "forksafe"), ("default", "threadsafe")
# Places among addresses().
PARALLEL_FOR, GET, SET, OPENMP, LIMIT = range(5)

_starter = threading.main_thread().ident  # who has started the pool, unless nbbn learns better
_is_missing = False  # no layer could be loaded, and to try takes 0.2 ms


def start_pool() -> str | None:
    """The name of the threading layer, started if need be: tbb, omp or workqueue; None if none can be loaded.

    The pool is the process's, whoever starts it: a choice made by NUMBA_THREADING_LAYER, numba.config or an earlier
    kernel stays.
    """
    global _starter, _is_missing
    if _is_missing:
        return None
    if not numba_pool._is_initialized:
        with global_compiler_lock:  # which a fork waits for
            if not numba_pool._is_initialized:
                _starter = threading.get_ident()
                _offer_tbb()
            try:
                numba.get_num_threads()
            except ValueError:
                _is_missing = True
                return None
    return str(numba_pool._threading_layer)


def likely_layer() -> str:
    """The layer that the pool has or, if it does not run yet, will have unless something is missing."""
    asked = str(numba.config.THREADING_LAYER).lower()
    if numba_pool._is_initialized or asked in ("tbb", "omp", "workqueue"):
        return str(numba_pool._threading_layer or asked)
    if asked in _ADMITS_BOTH and _has_openmp():
        return "omp"
    return "workqueue" if asked == "default" else "tbb"


def _offer_tbb() -> None:
    layer, first = str(numba.config.THREADING_LAYER).lower(), numba.config.THREADING_LAYER_PRIORITY[0]
    wanted = layer in _ADMITS_BOTH and (layer != "default" or first == "tbb") and not _has_openmp()
    if not (wanted or layer in _ASKS_FOR_TBB):
        return
    with contextlib.suppress(metadata.PackageNotFoundError, OSError):  # Numba then takes the next layer
        for file in metadata.files("tbb") or ():
            if re.fullmatch(re.escape(_TBB), file.name, re.IGNORECASE):
                ctypes.CDLL(str(file.locate()))


@lru_cache(maxsize=1)
def _has_openmp() -> bool:
    """Whether Numba's layer can be loaded: it needs the compiler's runtime library."""
    with global_compiler_lock:  # which a fork waits for
        try:
            importlib.import_module("numba.np.ufunc.omppool")
        except ImportError:
            return False
    return True


@cache  # kernels are given the place of what it returns
def addresses(limit: int) -> ctypes.Array[ctypes.c_int64]:
    """What a kernel needs to have its tasks run by the threads of the pool, which has been started: where Numba's
    functions are, and how many threads it may have at most.

    Numba tells OpenMP how many it wants, past the limits that threadpoolctl and others set; so kernels ask OpenMP, too,
    where there is any.
    """
    found = (ctypes.c_int64 * 5)()
    found[LIMIT] = limit
    for place, name in ((PARALLEL_FOR, "numba_parallel_for"), (GET, "get_num_threads"), (SET, "set_num_threads")):
        found[place] = binding.address_of_symbol(name)
    found[OPENMP] = _openmp_limit() or found[GET]
    return found


def _openmp_limit() -> int | None:
    """Where omp_get_max_threads() is, of the very runtime that Numba's layer is linked with, if it is omp: other
    libraries bring their own. Windows does not look there."""
    if numba_pool._threading_layer == "omp":
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.PyDLL(sys.modules["numba.np.ufunc.omppool"].__file__)
            return ctypes.cast(library.omp_get_max_threads, ctypes.c_void_p).value
    return None


def leave_pool() -> None:
    """To be called by a thread after its parallel kernel, where the layer is tbb: it gives up what TBB keeps for it.

    Before a fork Numba stops TBB, which fails as long as any thread but the pool's starter has TBB's data; it would
    say so on stdout, and the child might hang.
    """
    if threading.get_ident() != _starter:
        _detach_from_tbb()()


@lru_cache(maxsize=1)
def _detach_from_tbb() -> Callable[[], None]:
    """tbb::finalize() of a new task_scheduler_handle. TBB runs on, for Numba's own handle, but without this thread.

    Costs 3 us. The names are those that the C++ headers of oneTBB refer to.
    """
    try:
        library = ctypes.CDLL(_TBB)
        attach = library["_ZN3tbb6detail2r13getERNS0_2d121task_scheduler_handleE"]
        finalize = library["_ZN3tbb6detail2r18finalizeERNS0_2d121task_scheduler_handleEl"]
    except (OSError, AttributeError):  # Windows has other names, and no fork
        return lambda: None
    attach.restype, finalize.restype = None, ctypes.c_bool
    attach.argtypes, finalize.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_ssize_t]
    without_exceptions = 1

    def detach() -> None:
        handle = ctypes.c_void_p()
        attach(ctypes.byref(handle))
        finalize(ctypes.byref(handle), without_exceptions)

    return detach
