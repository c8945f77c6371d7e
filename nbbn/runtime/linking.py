"""Compiling functions that are only called by other compiled functions.

Numba optimizes every function and makes machine code of it, and then does so again wherever it is linked in. The first
time is for nothing here, and half of a kernel's compile time.
"""

from typing import Any

from llvmlite.binding import parse_bitcode
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering


class _LinkedLibrary(JITCodeLibrary):  # type: ignore[misc]  # Numba has no annotations
    """Code of one function, without those that it calls, that waits for the library that it will be part of."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def finalize(self) -> None:
        for function in self._final_module.functions:
            if not function.is_declaration:
                function.linkage = "linkonce_odr"  # several kernels have it, and each may drop what it has inlined
        self._bitcode = self._final_module.as_bitcode()
        self._final_module.close()
        self._finalized = True

    def _get_module_for_linking(self) -> Any:
        return parse_bitcode(self._bitcode)


@register_pass(mutates_CFG=True, analysis_only=False)
class _LinkedLowering(NativeLowering):  # type: ignore[misc]
    _name = "nbbn_linked_lowering"

    def run_pass(self, state: Any) -> bool:
        state.library = _LinkedLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)

        # The caller links all that is called from here, too, callers first: held once instead of in each of them, it
        # takes half of the memory.
        libraries = [state.library, *dict.fromkeys(state.library._linking_libraries)]
        entry: Any = [].append  # Numba wants a built-in function, and one per overload: it is the key, and never called
        state.targetctx.insert_user_function(entry, state["cr"].fndesc, libraries)
        state["cr"] = state["cr"]._replace(cfunc=entry)
        # What nobody asks for later, and would keep Numba's representation of every function alive.
        fndesc = state["cr"].fndesc
        fndesc.typemap = fndesc.calltypes = state.type_annotation = None
        return True


class LinkedCompiler(CompilerBase):  # type: ignore[misc]
    """For njit's pipeline_class."""

    def define_pipelines(self) -> list[Any]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.passes[:] = [(_LinkedLowering if p is NativeLowering else p, why) for p, why in passes.passes]
        passes.finalize()
        return [passes]
