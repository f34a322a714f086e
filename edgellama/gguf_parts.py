"""One GGUF file, parsed strictly: its key-values, its tensor table, where the data lies.

Source: the GGUF specification, versions 2 and 3. All arithmetic on sizes is on Python ints, which
do not wrap.

Knows nothing about what keys and tensors mean, and nothing about split files: `gguf.py` joins the
parts and reads their data.
"""

import math
import sys
from array import array
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from struct import Struct
from typing import TypeAlias

from edgellama.control import CancelToken
from edgellama.errors import EdgeLlamaError, UnsupportedModelError, shown
from edgellama.ggml import BY_ID, TensorType
from edgellama.gguf_cursor import INCOMPLETE, LONGEST_STRING, Cursor, foreign

VERSIONS = (2, 3)
MOST_KEYS = MOST_TENSORS = 65_536
LONGEST_KEY = 65_535  # bytes
LONGEST_NAME = 64  # bytes
LONGEST_ARRAY = 16 * 2**20  # elements
MOST_DIMS = 4
LARGEST_DIM = 2**31 - 1
MOST_ELEMENTS = 2**40
SMALLEST_ALIGNMENT, DEFAULT_ALIGNMENT, LARGEST_ALIGNMENT = 8, 32, 65_536
SMALLEST_KEY_VALUE = 8 + 1 + 4 + 1  # bytes: a key of one byte, the value's type, a one-byte value
SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # bytes: a name of one byte, one dimension

# A numeric array is an `array.array`, whose typecode tells the stored type; other arrays are lists.
Value: TypeAlias = "bool | int | float | str | list[str] | list[bool] | array[int] | array[float]"

_NUMBERS = {  # value type: its name, its struct code (also the typecode of its arrays)
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
_BOOL, _STRING, _ARRAY, _LAST_TYPE = 7, 8, 9, 12
_STRUCTS = {kind: Struct("<" + code) for kind, (_, code) in _NUMBERS.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies, and what it looks like."""

    name: str
    shape: tuple[int, ...]  # slowest dimension first, as NumPy has it
    type: TensorType
    offset: int  # bytes from the start of its part
    n_bytes: int
    part: int  # which file it is in, counted from 0

    @property
    def n_rows(self) -> int:
        return self.n_bytes // self.row_bytes

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.block * self.type.size


@dataclass(slots=True)
class Part:
    """What one file declares."""

    path: Path
    size: int  # bytes
    version: int
    metadata: dict[str, Value]
    kinds: dict[str, str]  # stored type of each value: "u32", "string", "array of f32"
    tensors: dict[str, TensorInfo]
    warnings: list[str] = field(default_factory=list)


def parse_part(
    file: FileIO, path: Path, size: int, index: int, cancel: CancelToken | None = None
) -> Part:
    """Parse the header of an open file of `size` bytes; `index` becomes its tensors' `part`.

    Raises ModelFormatError for anything damaged, UnsupportedModelError for another version or
    byte order, Cancelled.
    """
    cursor = Cursor(file, path, size, cancel)
    version = _read_version(cursor)
    n_tensors = cursor.u64("n_tensors")
    _check_count(cursor, "n_tensors", n_tensors, MOST_TENSORS, SMALLEST_TENSOR, "the tensor table")
    n_keys = cursor.u64("n_kv")
    _check_count(cursor, "n_kv", n_keys, MOST_KEYS, SMALLEST_KEY_VALUE, "the keys")
    metadata, kinds = _read_metadata(cursor, n_keys)
    alignment = _alignment(cursor, metadata, kinds)
    tensors = _read_tensors(cursor, n_tensors, index)
    data = -(-cursor.position // alignment) * alignment
    placed, warnings = _place(cursor, tensors, data, alignment)
    return Part(path, size, version, metadata, kinds, placed, warnings)


def _read_version(cursor: Cursor) -> int:
    head = cursor.head()
    if not head:
        raise cursor.error("the file is empty", hint=INCOMPLETE)
    if not b"GGUF".startswith(head[:4]):
        raise foreign(cursor, head)
    cursor.take(4, "the magic")
    raw = cursor.take(4, "the version")
    version = int.from_bytes(raw, "little")
    supported = ", ".join(map(str, VERSIONS))
    if int.from_bytes(raw, "big") in VERSIONS:
        problem = "this is a big-endian GGUF; only little-endian ones are supported"
        raise cursor.error(problem, field="version", value=version, kind=UnsupportedModelError)
    if version not in VERSIONS:
        raise cursor.error(
            f"GGUF version {version}; supported: {supported}",
            field="version",
            value=version,
            allowed=supported,
            kind=UnsupportedModelError,
        )
    return version


def _check_count(
    cursor: Cursor, field: str, count: int, most: int, smallest: int, what: str
) -> None:
    """`count` things of at least `smallest` bytes each must be allowed, and fit the file."""
    fit = cursor.left // smallest
    if count > most:
        allowed = f"0..{most}, and at most {fit} fit in the {cursor.left} bytes left"
        raise cursor.out_of_range(field, count, allowed)
    if count > fit:
        raise cursor.too_many(what, f"{field} = {count}", fit, count)


def _read_metadata(cursor: Cursor, count: int) -> tuple[dict[str, Value], dict[str, str]]:
    metadata: dict[str, Value] = {}
    kinds: dict[str, str] = {}
    for index in range(count):
        cursor.where = f"key {index}"
        key = cursor.name("the key", LONGEST_KEY)
        cursor.where = f"key {shown(key)}"
        if key in metadata:
            first = list(metadata).index(key)
            problem = f"the key stands twice, as key {first} and key {index}"
            raise cursor.error(problem, field=key, value=index)
        metadata[key], kinds[key] = _read_value(cursor)
    cursor.where = None
    return metadata, kinds


def _read_value(cursor: Cursor) -> tuple[Value, str]:
    kind = cursor.u32("the value's type")
    if kind == _STRING:
        return cursor.text("the string", 0, LONGEST_STRING), "string"
    if kind == _BOOL:
        return _booleans(cursor, 1)[0], "bool"
    if kind == _ARRAY:
        return _read_array(cursor)
    if kind not in _NUMBERS:
        raise cursor.error(
            f"value type {kind}; allowed 0..{_LAST_TYPE}",
            field="value type",
            value=kind,
            allowed=f"0..{_LAST_TYPE}",
        )
    form = _STRUCTS[kind]
    value: int | float = form.unpack(cursor.take(form.size, "the value"))[0]
    return value, _NUMBERS[kind][0]


def _read_array(cursor: Cursor) -> tuple[Value, str]:
    kind = cursor.u32("the array's element type")
    count = cursor.u64("the array's length")
    if kind == _ARRAY:
        problem = "an array inside an array is not allowed"
        raise cursor.error(problem, field="element type", value=kind)
    if kind > _LAST_TYPE:
        allowed = f"0..{_LAST_TYPE} without {_ARRAY}"
        raise cursor.out_of_range("the array's element type", kind, allowed)
    size = {_STRING: 8, _BOOL: 1}.get(kind) or _STRUCTS[kind].size
    _check_count(cursor, "the array's length", count, LONGEST_ARRAY, size, "the array")
    if kind == _STRING:
        return cursor.strings(count), "array of string"
    if kind == _BOOL:
        return _booleans(cursor, count), "array of bool"
    return _numbers(cursor, kind, count), f"array of {_NUMBERS[kind][0]}"


def _booleans(cursor: Cursor, count: int) -> list[bool]:
    raw = cursor.take(count, "the boolean")
    if wrong := raw.strip(b"\0\1"):
        raise cursor.out_of_range("a boolean", wrong[0], "0 or 1")
    return [byte == 1 for byte in raw]


def _numbers(cursor: Cursor, kind: int, count: int) -> "array[int] | array[float]":
    code = _NUMBERS[kind][1]
    values: array[int] | array[float] = array(code)
    values.frombytes(cursor.take(count * _STRUCTS[kind].size, "the array's elements"))
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _alignment(cursor: Cursor, metadata: dict[str, Value], kinds: dict[str, str]) -> int:
    key = "general.alignment"
    value = metadata.get(key, DEFAULT_ALIGNMENT)
    kind = kinds.get(key, "u32")
    allowed = f"a power of two, {SMALLEST_ALIGNMENT}..{LARGEST_ALIGNMENT} (u32)"
    if kind != "u32" or not isinstance(value, int):
        raise cursor.out_of_range(key, f"{kind} {shown(value)}", allowed)
    if not SMALLEST_ALIGNMENT <= value <= LARGEST_ALIGNMENT or value & (value - 1):
        raise cursor.out_of_range(key, value, allowed)
    return value


def _read_tensors(cursor: Cursor, count: int, part: int) -> dict[str, TensorInfo]:
    """The tensor table; offsets are still relative to the data section."""
    tensors: dict[str, TensorInfo] = {}
    for index in range(count):
        cursor.where = f"tensor {index}"
        name = cursor.name("the name", LONGEST_NAME)
        cursor.where = f"tensor {shown(name)}"
        if name in tensors:
            first = list(tensors).index(name)
            problem = f"the name stands twice, as tensor {first} and tensor {index}"
            raise cursor.error(problem, field="name", value=name)
        shape = _read_shape(cursor)
        kind = _read_type(cursor)
        if shape[-1] % kind.block:
            raise cursor.error(
                f"row length {shape[-1]} is not a multiple of {kind.block} for {kind.name}",
                field="shape",
                value=shape,
                allowed=f"a multiple of {kind.block}",
            )
        n_bytes = math.prod(shape) // kind.block * kind.size
        tensors[name] = TensorInfo(name, shape, kind, cursor.u64("the offset"), n_bytes, part)
    cursor.where = None
    return tensors


def _read_shape(cursor: Cursor) -> tuple[int, ...]:
    n_dims = cursor.u32("n_dims")
    if not 1 <= n_dims <= MOST_DIMS:
        allowed = f"1..{MOST_DIMS}"
        problem = f"n_dims = {n_dims}; allowed {allowed}"
        raise cursor.error(problem, field="n_dims", value=n_dims, allowed=allowed)
    dims = [cursor.u64(f"dimension {i}") for i in range(n_dims)]
    elements = math.prod(dims)
    for i, dim in enumerate(dims):
        if not 1 <= dim <= LARGEST_DIM:
            size = f" ({elements:.3g} elements)" if dim else ""
            raise cursor.out_of_range(f"dimension {i}{size}", dim, f"1..{LARGEST_DIM}")
    if elements > MOST_ELEMENTS:
        problem = f"{elements:.3g} elements ({' x '.join(map(str, dims))}); allowed: 2**40"
        raise cursor.error(problem, field="shape", value=tuple(dims), allowed="2**40 elements")
    return tuple(reversed(dims))


def _read_type(cursor: Cursor) -> TensorType:
    number = cursor.u32("the type")
    if number in BY_ID:
        return BY_ID[number]
    raise cursor.error(
        f"type {number} is not a ggml tensor type",
        field="type",
        value=number,
        allowed=", ".join(f"{t.id} ({t.name})" for t in BY_ID.values()),
        hint="The file is damaged, or its types were removed or are newer than this version",
    )


def _place(
    cursor: Cursor, tensors: dict[str, TensorInfo], data: int, alignment: int
) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors with absolute offsets, once these are proven to tile the data section."""
    placed: dict[str, TensorInfo] = {}
    expected = 0  # offset in the data section
    for info in tensors.values():
        if info.offset != expected:
            raise _misplaced(cursor, info, expected, data, alignment)
        placed[info.name] = replace(info, offset=data + expected)
        expected += -(-info.n_bytes // alignment) * alignment
    if not placed:
        return placed, []
    cursor.where = None
    last = list(placed.values())[-1]
    end = last.offset + last.n_bytes
    if end > cursor.size:
        cut = next(t for t in placed.values() if t.offset + t.n_bytes > cursor.size)
        cursor.where = f"tensor {shown(cut.name)}"
        problem = f"the data ends at byte {cursor.size}, needed are {end}: the file is incomplete"
        raise cursor.error(problem, field="offset", value=cut.offset, hint=INCOMPLETE)
    extra = cursor.size - (data + expected)
    return placed, [f"{extra} bytes after the last tensor are ignored"] if extra > 0 else []


def _misplaced(
    cursor: Cursor, info: TensorInfo, expected: int, data: int, alignment: int
) -> EdgeLlamaError:
    """The error for a tensor whose offset is not the end of the tensor before it."""
    cursor.where = f"tensor {shown(info.name)}"
    hint = None
    if data + info.offset + info.n_bytes > cursor.size:
        problem = (
            f"offset {info.offset} + size {info.n_bytes} is past the end of the file"
            f" ({cursor.size} bytes)"
        )
        hint = INCOMPLETE
    elif info.offset % alignment:
        problem = f"offset {info.offset} is not a multiple of the alignment, {alignment}"
    elif info.offset < expected:
        problem = f"offset {info.offset} overlaps the tensors before it, which end at {expected}"
    else:
        gap = info.offset - expected
        problem = f"offset {info.offset} leaves a hole of {gap} bytes in the data"
    return cursor.error(
        problem, field="offset", value=info.offset, allowed=str(expected), hint=hint
    )
