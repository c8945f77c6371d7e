"""A driver that loads what it is given, and a device of which Numba compiles for: there need not be a GPU."""

import hashlib
import re
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import numpy as np

from nbbn.kernels.cuda.blocks import Variant
from nbbn.kernels.cuda.steps import kernel
from nbbn.runtime import LOGGER
from nbbn.streams import compiling

CAPABILITY = 9, 0
VARIANT = Variant(np.dtype(np.float32), rows=True, width=4, sums=np.dtype(np.float32), threads=256)


class Driver:
    """What was loaded: names of kernels and the cubins in which they were looked for."""

    CUfunction = int
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=0, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=1
    )

    def __init__(self):
        self.loaded, self._libraries = [], []

    def cuDeviceGet(self, ordinal):
        return 0, ordinal

    def cuDeviceGetAttribute(self, kind, device):
        return 0, CAPABILITY[kind]

    def cuLibraryLoadData(self, code, *options):
        assert options == ([], [], 0, [], [], 0)
        self._libraries.append(code)
        return 0, len(self._libraries) - 1

    def cuLibraryGetKernel(self, library, name):
        self.loaded.append((name, self._libraries[library]))
        return 0, 4711


@contextmanager
def installed():
    """The Driver, in the place of CUDA's."""
    found, device = Driver(), SimpleNamespace(compute_capability=CAPABILITY)
    caches = compiling.function, compiling._capability
    for cache in caches:
        cache.cache_clear()
    with (
        mock.patch.object(compiling, "driver", return_value=found),
        mock.patch("numba.cuda.gpus", [nullcontext()]),
        mock.patch("numba.cuda.dispatcher.get_current_device", return_value=device),
    ):
        yield found
    for cache in caches:
        cache.cache_clear()


def main():
    """Load a kernel twice; print how often it was compiled, and what the driver was given."""
    compile_, compiled, said = compiling._compile, [], []
    LOGGER.setLevel("INFO")
    LOGGER.addFilter(lambda record: said.append(record.getMessage()))
    with (
        installed() as found,
        mock.patch.object(compiling, "_compile", lambda *a: compiled.append(a) or compile_(*a)),
    ):
        assert [compiling.function(kernel("infer", VARIANT), 0) for _ in range(2)] == [4711] * 2
    ((name, code),) = found.loaded
    assert code[:4] == b"\x7fELF"
    assert b"infer" in name
    assert name in code
    assert len(said) == len(compiled)
    assert all(re.match(r"compiled infer \(float32, on a GPU\) in .* s; kept in ", line) for line in said)
    print(len(compiled), name.decode(), len(code), hashlib.sha256(code).hexdigest())
