"""Kernels as machine code for a device, kept in the folder of the CPU's kernels."""

import sys
import threading
from functools import lru_cache
from importlib import metadata
from time import perf_counter
from typing import Any

import llvmlite
import numba

from nbbn.kernels.cuda import broadcast, steps, strided
from nbbn.kernels.cuda.kernel import Kernel
from nbbn.runtime import LOGGER, code_hash, compiling, kept_where, load_kernel, save_kernel
from nbbn.streams.driver import checked, driver

KERNELS = broadcast, steps, strided  # the modules that have any
# What these are made of: each of these modules, and what is in it.
SOURCES = (
    *("nbbn.core.rules", "nbbn.kernels.channel", "nbbn.kernels.conversions", "nbbn.kernels.epilogue"),
    *("nbbn.kernels.sums", "nbbn.kernels.cuda.apply", "nbbn.kernels.cuda.blocks", "nbbn.kernels.cuda.broadcast"),
    *("nbbn.kernels.cuda.channel", "nbbn.kernels.cuda.elements", "nbbn.kernels.cuda.kernel"),
    *("nbbn.kernels.cuda.memory", "nbbn.kernels.cuda.reduce", "nbbn.kernels.cuda.steps", "nbbn.kernels.cuda.strided"),
    *("nbbn.kernels.cuda.target", "nbbn.kernels.cuda.tasks"),
)
code_hash(SOURCES)  # of what is imported now: files may change
_COMPILERS = ("numba-cuda", "cuda-core", "cuda-bindings", "nvidia-nvvm", "nvidia-cuda-nvcc", "nvidia-nvjitlink")
_compiling = threading.Lock()
Machine = tuple[int, int]  # a compute capability


@lru_cache(maxsize=1024)
def function(kernel: Kernel, device: int) -> Any:
    """A kernel as the driver launches it, on any device of that kind. Its library stays loaded."""
    with _compiling:
        name, code = machine_code(kernel, _capability(device), device)
        (library,) = checked(driver().cuLibraryLoadData(code, [], [], 0, [], [], 0))
        (found,) = checked(driver().cuLibraryGetKernel(library, name))
    return driver().CUfunction(int(found))  # which a launch takes in the place of a function


def machine_code(kernel: Kernel, capability: Machine, device: int) -> tuple[bytes, bytes]:
    """The name of a kernel, and a cubin with it, from the cache or compiled."""
    own = kernel.name, kernel.dtypes, kernel.choices, str(kernel.signature)
    key = repr(("cubin", own, capability, code_hash(SOURCES), _versions()))
    found = load_kernel(key)
    if found is None:
        found = _compile(kernel, capability, device)
        save_kernel(key, found)
    name, _, code = found.partition(b"\0")
    return name, code


def _compile(kernel: Kernel, capability: Machine, device: int) -> bytes:
    """The name of a kernel, 0, and its cubin."""
    from cuda.core import Linker, LinkerOptions, ObjectCode
    from numba import cuda

    start, place = perf_counter(), kept_where()
    with compiling(place), cuda.gpus[device]:  # which functions that kernels call are compiled for
        text, _ = cuda.compile_ptx(kernel.build(), kernel.signature, cc=capability, debug=False, opt=True)
        options = LinkerOptions(arch="sm_{}{}".format(*capability))
        code = Linker(ObjectCode.from_ptx(text.encode()), options=options).link("cubin").code
    seconds = perf_counter() - start
    LOGGER.info("compiled %s (%s, on a GPU) in %.1f s; %s", kernel.name, kernel.dtypes, seconds, place)
    _, _, rest = text.partition(".entry ")
    name, _, _ = str(rest).partition("(")
    return name.strip().encode() + b"\0" + bytes(code)


@lru_cache(maxsize=64)
def _capability(device: int) -> Machine:
    (number,) = checked(driver().cuDeviceGet(device))
    kinds = driver().CUdevice_attribute
    major, minor = (
        checked(driver().cuDeviceGetAttribute(kind, number))[0]
        for kind in (
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return int(major), int(minor)


@lru_cache(maxsize=1)
def _versions() -> tuple[str, ...]:
    """Of all that has a part in compiling. NVIDIA's packages have the CUDA version in their names, or none."""
    from cuda.bindings import nvjitlink, nvrtc, nvvm

    found = [numba.__version__, llvmlite.__version__, str(sys.implementation.cache_tag)]
    for name in _COMPILERS:
        for suffix in ("", "-cu12", "-cu13"):
            try:
                found.append(f"{name}{suffix} {metadata.version(name + suffix)}")
            except metadata.PackageNotFoundError:
                continue
    return *found, *(f"{library.version()}" for library in (nvvm, nvjitlink)), f"{nvrtc.nvrtcVersion()[1:]}"
