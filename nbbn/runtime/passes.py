"""Which of LLVM's passes kernels go through.

Numba sends each function through LLVM's passes for one function, and all of them together, with those that they call,
twice through the passes for modules, which inline and vectorize. A kernel's source says what is inlined and where its
vectors begin and end: the passes for one function find all there is to find, in two thirds of the time.
"""

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler


class _Library(JITCodeLibrary):  # type: ignore[misc]  # Numba's part has no annotations
    def _optimize_final_module(self) -> None:
        """Nothing. A Numba that calls it by another name does for a kernel what it does for every function."""


class KernelCompiler(Compiler):  # type: ignore[misc]
    """Numba's compiler, without passes for modules; functions that a kernel calls are compiled as ever."""

    def compile_extra(self, func: Any) -> Any:
        self.state.library = _Library(self.state.targetctx.codegen(), func.__qualname__)
        self.state.library.enable_object_caching()  # so that it can be kept on disk
        return super().compile_extra(func)
