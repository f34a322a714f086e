"""Vector types for Numba, and the means to add operations on them.

An operation is a function that writes LLVM instructions; kernels call it like any other function.
Knows no operation: see `simd.py` for arithmetic and `memory.py` for loads, stores and atomics.
Importing this module imports Numba: only the compiler does so.
"""

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _numba_intrinsic, models, register_model

# Numba does not type these; this is the one place where that is papered over.
_intrinsic: Callable[[Any], Any] = _numba_intrinsic
_insert_function: Callable[..., Any] = cgutils.get_or_insert_function
Emit = Callable[..., Any]

_ELEMENTS = {
    "i8": ir.IntType(8),
    "i16": ir.IntType(16),
    "i32": ir.IntType(32),
    "f32": ir.FloatType(),
    "f64": ir.DoubleType(),
}


class Vector(types.Type):
    """`lanes` elements of one kind, held in registers."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"{element}x{lanes}")

    @property
    def llvm(self) -> Any:
        return ir.VectorType(_ELEMENTS[self.element], self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Any) -> None:
        initialize: Any = super().__init__
        initialize(manager, vector, vector.llvm)


i8x16 = Vector("i8", 16)
i8x64 = Vector("i8", 64)
i16x16 = Vector("i16", 16)
i32x16 = Vector("i32", 16)
f32x16 = Vector("f32", 16)
f64x16 = Vector("f64", 16)
i64, i32, f32, f64, void = types.int64, types.int32, types.float32, types.float64, types.void


def operation(signature: Any) -> Callable[[Emit], Any]:
    """Make `emit(builder, *values)` callable from kernels, with this one signature."""

    def make(emit: Emit) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            value = emit(builder, *args)
            return context.get_dummy_value() if value is None else value

        def typing(_context: Any, *_args: Any) -> Any:
            return signature, codegen

        return _named(typing, emit)

    return make


def _named(typing: Any, emit: Emit) -> Any:
    """`typing` as an intrinsic with the name, documentation and parameters of `emit`."""
    typing.__name__, typing.__doc__ = emit.__name__, emit.__doc__
    typing.__signature__ = inspect.signature(emit)  # its first parameter stands for the context
    return _intrinsic(typing)


def same(emit: Emit) -> Any:
    """An operation whose operands and result all have one vector type, whichever it is."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return emit(builder, *args)

    def typing(_context: Any, *args: Any) -> Any:
        if not all(isinstance(a, Vector) and a == args[0] for a in args):
            return None
        return args[0](*args), codegen

    return _named(typing, emit)


def pointer(b: Any, address: Any, element: Any) -> Any:
    return b.inttoptr(address, element.as_pointer())


def read(b: Any, address: Any, element: Any, align: int) -> Any:
    value = b.load(pointer(b, address, element))
    value.align = align
    return value


def write(b: Any, address: Any, value: Any, align: int) -> None:
    b.store(value, pointer(b, address, value.type)).align = align


def splat(b: Any, value: Any, lanes: int = 16) -> Any:
    empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = b.insert_element(empty, value, ir.Constant(ir.IntType(32), 0))
    return b.shuffle_vector(first, empty, ir.Constant(ir.VectorType(ir.IntType(32), lanes), None))


def call(b: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    function = _insert_function(b.module, kind, name)
    return b.call(function, args)


def lanes_of(b: Any, value: Any, lanes: range) -> Any:
    index = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
    return b.shuffle_vector(value, value, index)
