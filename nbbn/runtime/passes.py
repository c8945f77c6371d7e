"""Which of LLVM's passes kernels go through, and how often they are prepared.

Numba sends each function through LLVM's passes for one function, and all of them together, with those that they call,
twice through the passes for modules, which inline and vectorize. A kernel's source says what is inlined and where its
vectors begin and end: the passes for one function find all there is to find, in two thirds of the time.
"""

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler


class _Library(JITCodeLibrary):  # type: ignore[misc]  # Numba's part has no annotations
    def _optimize_functions(self, ll_module: Any) -> None:
        """What Numba does with passes of its own for each function, external ones too. llvmlite 0.50 never frees them:
        16 kB each, half a megabyte for a kernel. Here all functions share them."""
        ll_module.data_layout = self._codegen._data_layout
        passes, builder = self._codegen._function_pass_manager()
        for function in ll_module.functions:
            if not function.is_declaration:
                passes.run(function, builder)

    def _optimize_final_module(self) -> None:
        """Nothing. A Numba that calls it by another name does for a kernel what it does for every function."""


class KernelCompiler(Compiler):  # type: ignore[misc]
    """Numba's compiler, without passes for modules; functions that a kernel calls are compiled as ever."""

    def compile_extra(self, func: Any) -> Any:
        self.state.library = _Library(self.state.targetctx.codegen(), func.__qualname__)
        self.state.library.enable_object_caching()  # so that it can be kept on disk
        return super().compile_extra(func)
