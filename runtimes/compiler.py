"""From a kernel's Python to machine code that needs no Numba to run.

Numba translates the kernel to LLVM's language, `levels.py` adds the few functions that differ by
machine, LLVM optimizes for the level and gives an object file. Knows nothing about caching or
loading: see `kernel_cache.py`. The only module, with those it compiles, that imports Numba.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
import numba
from numba import types
from numba.core import registry

from edgellama.runtimes.levels import Level

_ENTRY = """
define void @{name}({parameters}) {{
  %result = alloca i64
  %error = alloca ptr
  %status = call i32 @"{inner}"(ptr %result, ptr %error, {arguments})
  ret void
}}
declare i32 @"{inner}"(ptr, ptr, {kinds})
"""
_EXTERNAL = (
    *("dot4", "dot4_small", "lookup", "fma", "from_f16", "to_f16", "to_bf16", "pause"),
    *("tile_begin", "tile_block", "tile_end"),
)


def inline(function: Callable[..., Any]) -> Any:
    """A piece of a kernel: always merged into its callers by LLVM."""
    njit: Any = numba.njit  # its types leave out the last two options
    plain = njit(
        error_model="numpy", forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True
    )
    return plain(function)


def object_code(
    name: str, function: Callable[..., Any], level: Level, triple: str | None = None
) -> bytes:
    """Compile `function` (int64 arguments, no result) as C function `name` for one level.

    `triple` names another 64-bit target than this process's own, LLVM's way.
    """
    n = len(inspect.signature(function).parameters)
    inner, source = _translate(function, n)
    machine = _machine(level, triple)
    module = llvm.parse_assembly(source)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    entry = _ENTRY.format(
        name=name,
        inner=inner,
        parameters=", ".join(f"i64 %a{i}" for i in range(n)),
        arguments=", ".join(f"i64 %a{i}" for i in range(n)),
        kinds=", ".join(["i64"] * n),
    )
    for text in (entry, level.source):
        part = llvm.parse_assembly(text)
        part.triple, part.data_layout = module.triple, module.data_layout
        module.link_in(part)
    for defined in (*module.functions, *module.global_variables):
        if not defined.is_declaration and defined.name != name:
            defined.linkage = "internal"  # so that unused ones are dropped
    _optimize(module, machine)
    return bytes(machine.emit_object(module))


def _translate(function: Callable[..., Any], n: int) -> tuple[str, str]:
    """(mangled name, LLVM source) of a kernel whose arguments are n int64."""
    _initialize()
    for name in _EXTERNAL:  # never run by Numba, which only insists that the names exist
        llvm.add_symbol(f"edgellama.{name}", llvm.address_of_symbol("abort") or 1)
    njit: Any = numba.njit  # its types leave out the last two options
    dispatcher = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
    signature = (types.int64,) * n
    with _code_generated_from_copies():
        dispatcher.compile(signature)
    compiled = dispatcher.overloads[signature]
    return compiled.fndesc.llvm_func_name, compiled.library.get_llvm_str()


@contextmanager
def _code_generated_from_copies() -> Iterator[None]:
    """Keep what Numba compiles as its optimizer left it.

    Generating machine code, which Numba does at once, rewrites a module in place for the machine
    at hand. That may no longer be optimized: an address is split into a base of integer 0 and an
    offset, and the optimizer takes a base of 0 for impossible.
    """
    codegen: Any = registry.cpu_target.target_context.codegen()
    add_module = codegen._add_module
    codegen._add_module = lambda module: add_module(module.clone())
    try:
        yield
    finally:
        del codegen._add_module  # the method of its class shows again


def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _machine(level: Level, triple: str | None) -> Any:
    if triple is None:
        target = llvm.Target.from_default_triple()
    else:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        target = llvm.Target.from_triple(triple)
    return target.create_target_machine(
        cpu=level.cpu, features=level.features, opt=3, reloc="pic", codemodel="default", jit=False
    )


def _optimize(module: Any, machine: Any) -> None:
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = False  # kernels are vectorized by hand
    options.slp_vectorization = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
