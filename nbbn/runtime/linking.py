"""Compiling functions that are only called by other compiled functions.

Numba optimizes every function and makes machine code of it, and then does so again wherever it is linked in. The first
time is for nothing here, and half of a kernel's compile time.
"""

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering


class _LinkedLibrary(JITCodeLibrary):  # type: ignore[misc]  # Numba has no annotations
    """Code that waits for the library that it will be part of."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None: ...

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _LinkedLowering(NativeLowering):  # type: ignore[misc]
    _name = "nbbn_linked_lowering"

    def run_pass(self, state: Any) -> bool:
        state.library = _LinkedLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)

        entry: Any = [].append  # Numba wants a built-in function, and one per overload: it is the key, and never called
        state.targetctx.insert_user_function(entry, state["cr"].fndesc, [state.library])
        state["cr"] = state["cr"]._replace(cfunc=entry)
        return True


class LinkedCompiler(CompilerBase):  # type: ignore[misc]
    """For njit's pipeline_class."""

    def define_pipelines(self) -> list[Any]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.passes[:] = [(_LinkedLowering if p is NativeLowering else p, why) for p, why in passes.passes]
        passes.finalize()
        return [passes]
