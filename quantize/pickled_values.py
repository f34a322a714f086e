"""The few kinds of value that a pickled state dict needs, as inert data, and their checks.

Source: `torch._utils` for what rebuilds a tensor. Knows nothing about opcodes and files.
"""

import math
from dataclasses import dataclass
from typing import Any

from edgellama.errors import shown

MOST_DIMENSIONS = 8
LARGEST_NUMBER = 2**48  # of elements: offsets, sizes, strides

STORAGES = {  # torch's class -> type
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
REBUILD = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
TYPED = "torch._tensor._rebuild_from_type_v2"
ORDERED = "collections.OrderedDict"
CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
ALLOWED = {REBUILD, PARAMETER, TYPED, ORDERED, *CLASSES} | {f"torch.{s}" for s in STORAGES}


@dataclass(frozen=True)
class Global:
    """A name the pickle mentions; inert."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A run of `count` values of type `dtype`, kept elsewhere under `key`."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class View:
    """A tensor: `size` and `stride` in elements from `offset` of a storage, all in range."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class PickledDict(dict[Any, Any]):
    """A dict or OrderedDict of the pickle."""

    ordered = False


def kind_of(value: object) -> str:
    """A value's kind for a message: never its content, which may be exponentially long."""
    if isinstance(value, Global):
        return shown(value.name)
    names = {PickledDict: "a dict", View: "a tensor", Storage: "a storage", type(None): "None"}
    return names.get(type(value), f"a {type(value).__name__}")


def view_or_problem(arguments: tuple[Any, ...]) -> View | str:
    """The tensor that the arguments of `_rebuild_tensor_v2` describe, or what is wrong with them.

    Every element it names lies in its storage, and it has no more elements than the storage.
    """
    match arguments:
        case (
            Storage() as storage,
            offset,
            tuple(size),
            tuple(stride),
            bool(),
            PickledDict(),
            *more,
        ):
            pass
        case _:
            return f"{REBUILD} has arguments it does not take"
    if len(more) > 1 or len(size) != len(stride) or len(size) > MOST_DIMENSIONS:
        problem = f"a tensor of {len(size)} sizes and {len(stride)} strides"
        return f"{problem}; allowed: as many, at most {MOST_DIMENSIONS}"
    for name, values in (("storage offset", (offset,)), ("size", size), ("stride", stride)):
        for value in values:
            if type(value) is not int or not 0 <= value < LARGEST_NUMBER:
                text = shown(value) if isinstance(value, (int, float, str)) else kind_of(value)
                return f"{name} {text}; allowed: an integer 0..{LARGEST_NUMBER - 1}"
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > storage.count or (count and last >= storage.count) or offset > storage.count:
        problem = f"a tensor of {count} elements from offset {offset} to {last}"
        return f"{problem} does not fit its storage {shown(storage.key)} of {storage.count}"
    return View(storage, offset, size, stride)
