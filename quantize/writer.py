"""A GGUF file written as a stream: header first, then each tensor's bytes in the planned order.

Source: the GGUF specification, version 3, little-endian. The same keys, plan and bytes give the
same file. Knows nothing about where the bytes come from, nor how a file replaces another.
"""

import struct
from array import array
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np

from edgellama.errors import ModelFormatError, shown
from edgellama.ggml import BY_NAME
from edgellama.gguf_parts import DEFAULT_ALIGNMENT, LONGEST_NAME
from edgellama.quantize.plan import PlannedTensor

VERSION = 3
_CODES = {  # kind: its number in the file, its struct code
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "string": (8, ""),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
_ARRAY, _ARRAY_OF = 9, "array of "
_BY_DTYPE = {np.dtype(code).str[1:]: kind for kind, (_, code) in _CODES.items() if code}


class Writer:
    """Writes one file from its beginning to its end; `write` takes the data as it comes.

    `reserved` names a key whose string has so many bytes, blanks for now; `fill` sets it at last.
    """

    def __init__(
        self,
        file: BinaryIO,
        metadata: Mapping[str, Any],
        tensors: Iterable[PlannedTensor],
        *,
        kinds: Mapping[str, str] | None = None,
        reserved: tuple[str, int] | None = None,
    ) -> None:
        self._file = file
        tensors = tuple(tensors)
        keys = [_key(k, v, (kinds or {}).get(k)) for k, v in metadata.items()]
        head = b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(keys) + bool(reserved))
        head += b"".join(keys)
        if reserved is not None:
            name, size = reserved
            head += _key(name, " " * size, "string")
            self._place, self._room = len(head) - size, size
        head += _table(tensors)
        self.n_bytes = _padded(len(head))  # of the file, once all is written
        self.n_bytes += sum(_padded(tensor.n_bytes) for tensor in tensors)
        file.write(head.ljust(_padded(len(head)), b"\0"))

    def write(self, data: bytes | memoryview) -> None:
        """The next bytes of the tensor at hand."""
        self._file.write(data)

    def end_tensor(self, tensor: PlannedTensor) -> None:
        """Pad to where the next tensor begins."""
        self._file.write(bytes(_padded(tensor.n_bytes) - tensor.n_bytes))

    def fill(self, text: str) -> None:
        """Set the reserved key's string; blanks fill what it does not need."""
        data = text.encode()
        assert len(data) <= self._room, (len(data), self._room)
        end = self._file.tell()
        self._file.seek(self._place)
        self._file.write(data.ljust(self._room))
        self._file.seek(end)


def _padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _table(tensors: tuple[PlannedTensor, ...]) -> bytes:
    entries, offset = [], 0
    for tensor in tensors:
        name, kind = tensor.name, BY_NAME[tensor.type]
        assert 0 < len(name.encode()) <= LONGEST_NAME, name
        dims = tuple(reversed(tensor.shape))
        entries.append(_text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        entries.append(struct.pack("<IQ", kind.id, offset))
        offset += _padded(tensor.n_bytes)
    return b"".join(entries)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _key(name: str, value: Any, kind: str | None) -> bytes:
    """One key and its value; `kind` as the reader tells it ("u32"), or chosen by the value."""
    kind = kind or _kind(value)
    head = _text(name)
    try:
        if not kind.startswith(_ARRAY_OF):
            return head + struct.pack("<I", _CODES[kind][0]) + _scalar(value, kind)
        element = kind.removeprefix(_ARRAY_OF)
        number = _CODES[element][0]
        return head + struct.pack("<IIQ", _ARRAY, number, len(value)) + _elements(value, element)
    except (struct.error, OverflowError, ValueError, UnicodeEncodeError) as error:
        problem = f"{shown(value)} cannot be stored as {kind}: {error}"
        raise ModelFormatError(problem, where=f"key {shown(name)}", value=value) from error


def _scalar(value: Any, kind: str) -> bytes:
    return _text(value) if kind == "string" else struct.pack("<" + _CODES[kind][1], value)


def _elements(values: Any, kind: str) -> bytes:
    if kind == "string":
        return b"".join(map(_text, values))
    wanted = np.dtype(_CODES[kind][1]).newbyteorder("<")
    if isinstance(values, (array, np.ndarray)):
        given = np.asarray(values)
        if not np.can_cast(given.dtype, wanted, "same_kind"):
            raise ValueError(f"its numbers are {given.dtype.name}")
        values = given if np.can_cast(given.dtype, wanted) else given.tolist()
    return np.array(values, wanted).tobytes()  # checks the range of Python's integers


def _kind(value: Any) -> str:
    """How a Python value is stored: integers as u32 and reals as f32 where they fit."""
    match value:
        case bool():
            return "bool"
        case str():
            return "string"
        case int():
            return _integer_kind(value, value)
        case float():
            return "f32"
        case array():
            return _ARRAY_OF + _BY_DTYPE[np.dtype(value.typecode).str[1:]]
        case np.ndarray():
            return _ARRAY_OF + _BY_DTYPE[value.dtype.str[1:]]
    return _ARRAY_OF + _element_kind(value)


def _integer_kind(smallest: int, largest: int) -> str:
    """u32 for what is not negative, else the smallest of the others that fits."""
    if smallest >= 0:
        return "u32" if largest < 2**32 else "u64"
    return "i32" if smallest >= -(2**31) and largest < 2**31 else "i64"


def _element_kind(values: Any) -> str:
    if all(isinstance(value, str) for value in values):  # an empty list too
        return "string"
    if all(isinstance(value, bool) for value in values):
        return "bool"
    if all(isinstance(value, int) for value in values):
        return _integer_kind(-1, max(map(abs, values)))  # i32, as GGUF's own arrays of integers
    return "f32"
