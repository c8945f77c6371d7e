"""How serial functions over elements are compiled for the CPU, those of kernels/tasks.py among them."""

import numba

from nbbn.kernels import tasks
from nbbn.runtime.linking import LinkedCompiler

# Sums may be reordered and contracted; NaN, infinity and zeros' order are left as IEEE has them. Functions without
# sums get no fast math.
SUMS = {"reassoc", "contract", "arcp", "nsz"}

# They are only called from other kernels: without wrappers for Python a step compiles in half the time.
INTERNAL = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

# fastmath is stated, or a function takes that of whichever caller comes first.
element = numba.njit(**INTERNAL, pipeline_class=LinkedCompiler, fastmath=False)
inlined = numba.njit(**INTERNAL, pipeline_class=LinkedCompiler, fastmath=False, forceinline=True)
summing = numba.njit(**INTERNAL, pipeline_class=LinkedCompiler, fastmath=SUMS)
# Where the source says in which order: kernels that reorder sums, each in its own way, would differ in the last bits.
adding = numba.njit(**INTERNAL, pipeline_class=LinkedCompiler, fastmath={"contract", "nsz"})

_functions = tasks.functions(element)
chunks_and_tiles, chunk_and_tile = _functions.chunks_and_tiles, _functions.chunk_and_tile
bounds_of = _functions.bounds_of
