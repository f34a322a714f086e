"""Protocol-buffer messages from strangers: the few wire types there are, every length checked.

Knows nothing about what the fields mean. Source: protobuf.dev/programming-guides/encoding.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from edgellama.errors import TokenizerError, shown

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # 3 and 4 are groups, which no schema uses any more
LONGEST_VARINT = 10  # bytes: 64 bits, 7 a byte


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its number, where its tag and its content stand, and a varint's value."""

    number: int
    wire: int
    at: int
    start: int
    end: int
    value: int = 0


class Message:
    """The bytes of a message; errors name file and byte."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path = data, path

    def refuse(self, problem: str, at: int, value: object = None) -> NoReturn:
        raise TokenizerError(problem, path=self.path, where=f"byte {at}", value=value)

    def fields(self, start: int = 0, end: int | None = None) -> Iterator[Field]:
        """The fields between two offsets, in order; groups and what runs over is refused."""
        at, end = start, len(self.data) if end is None else end
        while at < end:
            tag, content = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            if not 1 <= number < 2**29:
                self.refuse(f"field number {number} is not allowed", at, number)
            if wire == VARINT:
                value, stop = self._varint(content, end)
                yield Field(number, wire, at, content, stop, value)
            else:
                content, stop = self._extent(number, wire, at, content, end)
                yield Field(number, wire, at, content, stop)
            at = stop

    def _extent(self, number: int, wire: int, at: int, content: int, end: int) -> tuple[int, int]:
        """(start, end) of a content whose length is fixed or declared."""
        sizes = {FIXED64: 8, FIXED32: 4}
        if wire == BYTES:
            size, content = self._varint(content, end)
        elif wire in sizes:
            size = sizes[wire]
        else:
            self.refuse(f"field {number} has wire type {wire}, which is not allowed", at, wire)
        if size > end - content:
            problem = f"field {number} declares {size} bytes; {end - content} are left"
            self.refuse(problem, at, size)
        return content, content + size

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for i in range(min(LONGEST_VARINT, end - at)):
            byte = self.data[at + i]
            value |= (byte & 0x7F) << 7 * i
            if byte < 0x80:
                if value >= 2**64:
                    self.refuse("a varint of more than 64 bits", at, value)
                return value, at + i + 1
        self.refuse("a varint without an end", at)

    def _expect(self, field: Field, wire: int, name: str) -> None:
        if field.wire != wire:
            problem = f"{name} has wire type {field.wire}; expected {wire}"
            self.refuse(problem, field.at, field.wire)

    def text(self, field: Field, name: str, longest: int) -> str:
        """A string of at most `longest` bytes."""
        self._expect(field, BYTES, name)
        if field.end - field.start > longest:
            size = field.end - field.start
            self.refuse(f"{name} has {size} bytes; at most {longest} are allowed", field.at, size)
        raw = self.data[field.start : field.end]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.refuse(f"{name} is not UTF-8: {shown(raw)}", field.at, raw)

    def float32(self, field: Field, name: str) -> float:
        self._expect(field, FIXED32, name)
        (value,) = struct.unpack_from("<f", self.data, field.start)
        return float(value)

    def integer(self, field: Field, name: str) -> int:
        """A signed integer (int32 and enumerations take ten bytes when negative)."""
        self._expect(field, VARINT, name)
        return field.value - 2**64 if field.value >= 2**63 else field.value

    def flag(self, field: Field, name: str) -> bool:
        return self.integer(field, name) != 0

    def inner(self, field: Field, name: str) -> Iterator[Field]:
        """The fields of a message inside this one."""
        self._expect(field, BYTES, name)
        return self.fields(field.start, field.end)
