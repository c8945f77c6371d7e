"""What `python -m nbbn info` prints: everything about this machine and process that decides how nbbn runs."""

import importlib
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import llvmlite
import llvmlite.binding
import numba
import numpy as np

import nbbn
from nbbn.arrays import availability
from nbbn.kernels.cpu.floats import HALF_INSTRUCTIONS
from nbbn.runtime import find_cache, limit_in_words, start_pool

FEATURES = ("avx2", "avx512f", "f16c")


def lines() -> list[str]:
    """`name  value` for every fact, aligned; facts with several values take several lines."""
    facts: dict[str, Callable[[], str | list[str]]] = {
        "nbbn": lambda: f"{nbbn.__version__} ({Path(nbbn.__file__).parent})",
        "Python": lambda: f"{platform.python_version()} ({platform.python_implementation()}, {platform.platform()})",
        "NumPy": lambda: np.__version__,
        "Numba": lambda: numba.__version__,
        "llvmlite": lambda: f"{llvmlite.__version__} (LLVM {'.'.join(map(str, llvmlite.binding.llvm_version_info))})",
        "ml_dtypes": ml_dtypes,
        "CPU": cpu,
        "CPU features": cpu_features,
        "float16": lambda: f"converted by {'half instructions' if HALF_INSTRUCTIONS else 'integer arithmetic'}",
        "threading layer": threading_layer,
        "threads": limit_in_words,
        "kernel cache": kernel_cache,
        "GPU": gpus,
    }
    width = max(map(len, facts)) + 2
    found = []
    for name, fact in facts.items():
        values = _value_or_error(fact)
        found += [f"{label:{width}}{v}" for label, v in zip([name, *[""] * len(values)], values, strict=False)]
    return found


def _value_or_error(fact: Callable[[], str | list[str]]) -> list[str]:
    try:
        value = fact()
    except Exception as error:  # what is broken is what the reader wants to see, and the other facts as well
        return [f"error: {next(iter(str(error).strip().splitlines()), repr(error))}"]
    return [value] if isinstance(value, str) else value


def ml_dtypes() -> str:
    try:
        return str(importlib.import_module("ml_dtypes").__version__)
    except ImportError:
        return "not installed (for bfloat16: pip install nbbn[bfloat16])"


def cpu() -> str:
    """The name the maker gives it and the one LLVM has for it."""
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):  # where there is no /proc, or it has no such line
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line for line in info if line.startswith("model name")).partition(":")[2].strip()
    target = numba.config.CPU_NAME
    chosen = f"; NUMBA_CPU_NAME={target}" if target else ""
    return f"{name} ({llvmlite.binding.get_host_cpu_name()}{chosen})"


def cpu_features() -> str:
    has = llvmlite.binding.get_host_cpu_features()
    return ", ".join(f"{f} {'yes' if has.get(f) else 'no'}" for f in FEATURES)


def threading_layer() -> str:
    return start_pool() or "none: Numba can load no threading layer"


def kernel_cache() -> str:
    folder, why = find_cache()
    if folder is None:
        return f"none: {why}"
    sizes = [file.stat().st_size for file in folder.glob("*.kernel")]
    return f"{folder} ({', '.join(filter(None, [f'{len(sizes)} kernels, {sum(sizes) / 1e6:.1f} MB', why]))})"


def gpus() -> list[str]:
    """One line per GPU that Numba finds, or why there is none."""
    why = availability.missing()
    if why is not None:
        return [f"none: {why}"]
    from numba import cuda

    return [_describe(device) for device in cuda.gpus]


def _describe(device: object) -> str:
    name = getattr(device, "name", "simulator")  # that of NUMBA_ENABLE_CUDASIM has no name
    major, minor = getattr(device, "compute_capability", ("?", "?"))
    return f"{name} (compute capability {major}.{minor})"
