"""How kernels that call kernels become one piece of machine code, at a third of the usual price.

numba compiles every function for itself: optimized, with machine code and a wrapper for Python, though a kernel that is
called by kernels is inlined into each of them and only their code ever runs. In a chain of calls, so, the same
instructions are optimized again at each level. Here a function that is called from a kernel is taken as far as LLVM's
intermediate form (*linked*), and the function that Python calls (the *entry*) gathers all of those it needs, directly
or not, and is optimized once. Compiling the conntrack stage, 190 functions, took 61 s of processor time before and 18 s
since.

This file, ``jit`` and ``devices/syscalls`` are the only ones that know numba. What is used here are the parts of its
compiler that it offers to replace: the pipeline, the lowering pass, the code library.
"""

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder, _LowerResult
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.typed_passes import NativeLowering


class _LinkedLibrary(JITCodeLibrary):  # type: ignore[misc]
    """The code of one linked function: never optimized as a whole, never made into machine code."""

    def finalize(self) -> None:
        """Take nothing in and make nothing of it: that is for the entry."""
        self._raise_if_finalized()
        self._finalize_dynamic_globals()
        self._finalized = True


class _EntryLibrary(JITCodeLibrary):  # type: ignore[misc]
    """The code of an entry and of all that it calls."""

    _linking_libraries: list[Any]

    def finalize(self) -> None:
        """Link all, optimize once, make machine code."""
        self._linking_libraries = list(_closure(self._linking_libraries))
        super().finalize()


def _closure(libraries: list[Any]) -> dict[Any, None]:
    """Return the libraries that are needed, directly or not, in a fixed order; a linked one holds only itself."""
    found: dict[Any, None] = {}
    waiting = list(reversed(libraries))
    while waiting:
        library = waiting.pop()
        if library not in found:
            found[library] = None
            if isinstance(library, _LinkedLibrary):
                waiting.extend(reversed(library._linking_libraries))
    return found


@register_pass(mutates_CFG=True, analysis_only=False)
class _LinkedLowering(NativeLowering):  # type: ignore[misc]
    """Lowering that ends with the intermediate form."""

    _name = "linked_lowering"

    def run_pass(self, state: Any) -> bool:
        """Lower one function."""
        state.library = _LinkedLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_cpython_wrapper = state.flags.no_compile = True
        super().run_pass(state)
        lowered = state["cr"]
        # What calls of this version are looked up by; usually the function object that Python would call.
        key = object()
        state.targetctx.insert_user_function(key, lowered.fndesc, [state.library])
        state["cr"] = _LowerResult(lowered.fndesc, lowered.call_helper, cfunc=key, env=lowered.env)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _EntryLowering(NativeLowering):  # type: ignore[misc]
    """Lowering into a library that gathers what it needs."""

    _name = "entry_lowering"

    def run_pass(self, state: Any) -> bool:
        """Lower one function, and compile it."""
        state.library = _EntryLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        super().run_pass(state)
        return True


class _Compiler(CompilerBase):  # type: ignore[misc]
    lowering: Any = NativeLowering

    def define_pipelines(self) -> list[Any]:
        """Return numba's own, with another lowering."""
        usual = DefaultPassBuilder.define_nopython_pipeline(self.state)
        own = PassManager(usual.pipeline_name)
        own.passes = [(self.lowering if each is NativeLowering else each, text) for each, text in usual.passes]
        own.finalize()
        return [own]


class Linked(_Compiler):
    """Compiles a function that kernels call."""

    lowering = _LinkedLowering


class Entry(_Compiler):
    """Compiles a function that Python calls."""

    lowering = _EntryLowering
