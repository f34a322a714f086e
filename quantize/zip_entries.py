"""Where the entries of a zip archive lie, for archives that only store.

Reads what `torch.save` writes: stored entries, zip64 or not, nothing before, between or after
them. Anything else is refused: compressed or encrypted entries, sizes that disagree, overlaps,
comments. Source: PKWARE's APPNOTE 6.3. Knows nothing about what the entries hold.
"""

import struct
from dataclasses import dataclass
from typing import Any

from edgellama.errors import EdgeLlamaError, ModelFormatError, UnsupportedModelError, shown
from edgellama.quantize.raw_file import RawFile

MOST_ENTRIES = 131_072
LONGEST_DIRECTORY = 64 * 2**20  # bytes
INCOMPLETE = "The download may be incomplete"

_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIBED, _ENCRYPTED = 1 << 3, 1 << 0 | 1 << 6 | 1 << 13
_DESCRIPTOR = (0, 12, 16, 20, 24)  # bytes after the data that may repeat its sizes
_NONE = 0xFFFF_FFFF


@dataclass(frozen=True)
class Entry:
    """The bytes `start` to `start + size` of the archive's file."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class _Record:
    """What the central directory says of an entry."""

    name: bytes
    flags: int
    size: int
    header: int  # where the local header lies


def _refuse(file: RawFile, problem: str, **more: Any) -> EdgeLlamaError:
    return ModelFormatError(problem, path=file.path, where="zip archive", **more)


def _shown(name: bytes) -> str:
    return shown(name.decode("utf-8", "backslashreplace"))


def zip_entries(file: RawFile) -> dict[str, Entry]:
    """The entries by name.

    Raises ModelFormatError if the archive is damaged or not laid out as `torch.save` does,
    UnsupportedModelError for compressed or encrypted entries.
    """
    count, start, size = _end(file)
    directory = file.read(start, size)
    records, at = [], 0
    for _ in range(count):
        record, at = _record(file, directory, at, start)
        records.append(record)
    if at != size:
        raise _refuse(file, f"{size - at} bytes follow the {count} entries of the directory")
    entries: dict[str, Entry] = {}
    end = 0
    for record in sorted(records, key=lambda record: record.header):
        entry = _located(file, record, end, start)
        if entry.name in entries:
            raise _refuse(file, f"two entries are named {shown(entry.name)}")
        entries[entry.name] = entry
        end = entry.start + entry.size
    if start - end not in _DESCRIPTOR:
        raise _refuse(file, f"{start - end} bytes lie between the entries and the directory")
    return entries


def _end(file: RawFile) -> tuple[int, int, int]:
    """Number of entries, start and size of the central directory."""
    tail = file.size - _END.size
    record = _END.unpack(file.read(tail, _END.size)) if tail >= 0 else (b"",)
    if record[0] != b"PK\x05\x06":
        raise _refuse(file, "the file does not end with a zip directory", hint=INCOMPLETE)
    _, disk, first_disk, here, count, size, start, comment = record
    if comment:
        raise _refuse(file, f"it ends with a comment of {comment} bytes; torch.save writes none")
    end = tail
    locator = tail - _LOCATOR.size
    if locator >= 0 and file.read(locator, 4) == b"PK\x06\x07":
        disk, first_disk, here, count, size, start, end = _end64(file, locator)
    if disk or first_disk or here != count:
        raise _refuse(file, "the archive is one part of several")
    if count > MOST_ENTRIES or size > LONGEST_DIRECTORY:
        problem = f"{count} entries in {size} bytes"
        raise _refuse(file, f"{problem}; at most {MOST_ENTRIES} in {LONGEST_DIRECTORY}")
    if start + size != end or count * _CENTRAL.size > size:
        problem = f"a directory of {count} entries in {size} bytes at {start}"
        raise _refuse(file, f"{problem} does not end at byte {end}", hint=INCOMPLETE)
    return count, start, size


def _end64(file: RawFile, locator: int) -> tuple[int, ...]:
    at, disks = _LOCATOR.unpack(file.read(locator, _LOCATOR.size))[2:]
    if disks > 1 or at + _END64.size != locator:
        raise _refuse(file, f"the zip64 record at {at} does not end at byte {locator}")
    record = _END64.unpack(file.read(at, _END64.size))
    if record[0] != b"PK\x06\x06" or record[1] != _END64.size - 12:
        raise _refuse(file, "the zip64 record is damaged")
    return (*record[4:], at)


def _record(file: RawFile, directory: bytes, at: int, limit: int) -> tuple[_Record, int]:
    """One entry of the central directory, and where the next begins."""
    if at + _CENTRAL.size > len(directory):
        raise _refuse(file, "the directory is cut short")
    fields = _CENTRAL.unpack_from(directory, at)
    flags, method, packed, size = fields[3], fields[4], fields[8], fields[9]
    name_size, extra_size, comment_size, header = *fields[10:13], fields[16]
    name_at = at + _CENTRAL.size
    extra_at = name_at + name_size
    end = extra_at + extra_size + comment_size
    if fields[0] != b"PK\x01\x02" or end > len(directory):
        raise _refuse(file, f"entry at byte {at} of the directory is damaged")
    name = directory[name_at:extra_at]
    extra = directory[extra_at : extra_at + extra_size]
    size, packed, header = _wide(file, name, extra, (size, packed, header))
    where = f"zip entry {_shown(name)}"
    if method or flags & _ENCRYPTED:
        problem = "the entry is encrypted" if flags & _ENCRYPTED else "the entry is compressed"
        hint = "torch.save writes neither; save the model again, best as safetensors"
        raise UnsupportedModelError(problem, path=file.path, where=where, hint=hint)
    if size != packed or header + _LOCAL.size + size > limit:
        problem = f"{size} bytes, {packed} stored, at {header} do not fit before byte {limit}"
        raise ModelFormatError(problem, path=file.path, where=where, hint=INCOMPLETE)
    return _Record(name, flags, size, header), end


def _wide(
    file: RawFile, name: bytes, extra: bytes, values: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Sizes and offset, taken from the zip64 field where 32 bits did not hold them."""
    found, at = b"", 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            found = extra[at + 4 : at + 4 + size]
        at += 4 + size
    wide, used = list(values), 0
    for index, value in enumerate(values):
        if value != _NONE:
            continue
        if used + 8 > len(found):
            raise _refuse(file, f"entry {_shown(name)} has no zip64 sizes")
        wide[index] = int.from_bytes(found[used : used + 8], "little")
        used += 8
    return wide[0], wide[1], wide[2]


def _located(file: RawFile, record: _Record, end: int, limit: int) -> Entry:
    """The entry's data, once its local header agrees and begins where the last entry ended."""
    where = f"zip entry {_shown(record.name)}"

    def refuse(problem: str) -> EdgeLlamaError:
        return ModelFormatError(problem, path=file.path, where=where)

    gap = record.header - end
    if gap < 0:
        raise refuse(f"it begins at {record.header}, inside the entry before it")
    if gap not in (_DESCRIPTOR if end else (0,)):
        raise refuse(f"{gap} bytes lie before it that belong to no entry")
    local = _LOCAL.unpack(file.read(record.header, _LOCAL.size))
    method, packed, size, name_size, extra_size = local[3], *local[7:]
    start = record.header + _LOCAL.size + name_size + extra_size
    if local[0] != b"PK\x03\x04" or start + record.size > limit:
        raise refuse(f"no local header at byte {record.header} that fits")
    if method or local[2] & _ENCRYPTED:
        raise refuse("its local header says that it is compressed or encrypted")
    if file.read(record.header + _LOCAL.size, name_size) != record.name:
        raise refuse("its local header has another name")
    deferred = local[2] & _DESCRIBED and size == packed == 0  # the sizes follow the data
    if not deferred and (size != packed or size not in (record.size, _NONE)):
        raise refuse(f"its local header says {size} bytes, the directory {record.size}")
    try:
        name = record.name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse("its name is not UTF-8 text") from error
    return Entry(name, start, record.size)
