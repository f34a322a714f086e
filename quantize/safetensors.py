"""One .safetensors file: its header checked whole, its tensors read on demand.

The rules are those of the safetensors format: a bounded JSON header that begins with `{`, and
tensors that cover the data in order without hole or overlap. Knows nothing about models.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from edgellama.errors import EdgeLlamaError, ModelFormatError, shown
from edgellama.quantize.raw_file import RawFile
from edgellama.quantize.strict_json import parse_json
from edgellama.quantize.tensor import STORED, Bits, Tensor

LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
MOST_TENSORS = 65_536
MOST_DIMENSIONS = 8
LARGEST_DIMENSION = 2**31 - 1
MOST_ELEMENTS = 2**40
INCOMPLETE = "The download may be incomplete"

BITS = {name: 8 * kind.itemsize for name, kind in STORED.items()} | {
    "C64": 64,  # legal, and their sizes must be known to check the layout; none is read as floats
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the start of the data
    end: int


def read_safetensors(file: RawFile) -> dict[str, Tensor]:
    """The tensors of a file by name; only the header is read now.

    Raises ModelFormatError naming the tensor and the numbers if the file breaks the format,
    UnsupportedModelError for a type the format does not know.
    """
    header, start = _header(file)
    header.pop("__metadata__", None)
    if len(header) > MOST_TENSORS:
        problem = f"{len(header)} tensors; at most {MOST_TENSORS} are allowed"
        raise ModelFormatError(problem, path=file.path, where="header")
    entries = [_entry(file, name, value) for name, value in header.items()]
    _check_layout(file, entries, file.size - start)
    return {
        entry.name: Tensor(
            entry.name, entry.shape, entry.dtype, partial(_rows, file, start + entry.start, entry)
        )
        for entry in entries
    }


def _header(file: RawFile) -> tuple[dict[str, Any], int]:
    """The parsed header and the byte at which the data starts."""

    def refuse(problem: str, **more: Any) -> ModelFormatError:
        return ModelFormatError(problem, path=file.path, where="header", **more)

    if file.size < 8:
        raise refuse(f"the file has {file.size} bytes; the header's length alone takes 8")
    length = int.from_bytes(file.read(0, 8), "little")
    if not 2 <= length <= LONGEST_HEADER:
        problem = f"header length {length}; allowed: 2..{LONGEST_HEADER}"
        raise refuse(problem, field="header length", value=length)
    if length > file.size - 8:
        problem = f"header length {length} is past the end of the file ({file.size} bytes)"
        raise refuse(problem, field="header length", value=length, hint=INCOMPLETE)
    data = file.read(8, length)
    if data[:1] != b"{":
        raise refuse(f"byte 8 is {shown(data[:1])}; the header must begin with '{{'")
    header = parse_json(data, file.path, "header")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise refuse("__metadata__ must be an object", field="__metadata__")
    for key, value in metadata.items():
        if not isinstance(value, str):
            problem = f"__metadata__: the value of {shown(key)} is not a string"
            raise refuse(problem, field="__metadata__")
    return header, 8 + length


def _refuse(
    file: RawFile, name: str, problem: str, field: str | None = None, value: object = None
) -> EdgeLlamaError:
    return ModelFormatError(
        problem, path=file.path, where=f"tensor {shown(name)}", field=field, value=value
    )


def _entry(file: RawFile, name: str, value: object) -> _Entry:
    """One tensor's record, checked for itself."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _refuse(file, name, "its record must hold dtype, shape and data_offsets alone")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in BITS:
        problem = f"dtype {_brief(dtype)} is unknown; allowed: {', '.join(BITS)}"
        raise _refuse(file, name, problem, "dtype", dtype)
    shape = value["shape"]
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS:
        problem = f"shape must be a list of at most {MOST_DIMENSIONS} sizes"
        raise _refuse(file, name, problem, "shape")
    for size in shape:
        if type(size) is not int or not 0 <= size <= LARGEST_DIMENSION:
            problem = f"shape holds {_brief(size)}; allowed: 0..{LARGEST_DIMENSION}"
            raise _refuse(file, name, problem, "shape", size)
    offsets = value["data_offsets"]
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(at) is not int for at in offsets)
        or not 0 <= offsets[0] <= offsets[1]
    ):
        problem = "data_offsets must be two integers, 0 <= start <= end"
        raise _refuse(file, name, problem, "data_offsets")
    count = math.prod(shape)
    if count > MOST_ELEMENTS:
        raise _refuse(file, name, f"{count} elements; at most {MOST_ELEMENTS}", "shape")
    start, end = offsets
    if count * BITS[dtype] != 8 * (end - start):
        problem = f"{count} x {BITS[dtype]} bits do not fill data_offsets {start}..{shown(end)}"
        raise _refuse(file, name, problem, "data_offsets")
    return _Entry(name, dtype, tuple(shape), start, end)


def _brief(value: object) -> str:
    return shown(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def _check_layout(file: RawFile, entries: list[_Entry], size: int) -> None:
    """The tensors must cover the data exactly, without hole or overlap."""
    before: _Entry | None = None
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        expected = before.end if before else 0
        if entry.end > size:
            problem = f"data_offsets end at {entry.end}, past the end of the data ({size} bytes)"
            raise ModelFormatError(
                problem, path=file.path, where=f"tensor {shown(entry.name)}", hint=INCOMPLETE
            )
        if entry.start != expected:
            kind = "overlaps" if entry.start < expected else "leaves a hole after"
            other = f"tensor {shown(before.name)}" if before else "the header"
            problem = f"its data starts at {entry.start} and {kind} {other}, ending at {expected}"
            raise _refuse(file, entry.name, problem, "data_offsets", entry.start)
        before = entry
    covered = before.end if before else 0
    if covered != size:
        problem = f"the tensors end at byte {covered} of the data, which has {size} bytes"
        raise ModelFormatError(problem, path=file.path, where="header")


def _rows(file: RawFile, start: int, entry: _Entry, first: int, last: int) -> Bits:
    """Rows of a tensor as stored, flat."""
    kind = STORED.get(entry.dtype, np.dtype("u1"))
    row = math.prod(entry.shape[1:]) * BITS[entry.dtype] // 8 if entry.shape else entry.end
    size = (last - first) * row if entry.shape else entry.end - entry.start
    out = np.empty(size // kind.itemsize, kind)
    if size:
        file.read_into(start + first * row * bool(entry.shape), out, f"tensor {shown(entry.name)}")
    return out
