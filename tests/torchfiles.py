"""PyTorch files from small specs, good and bad, written without PyTorch or `pickle`.

A pickle is bytes joined from the opcodes below; an archive's every field may lie.
"""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellama import EdgeLlamaError, ModelFormatError
from edgellama.quantize.raw_file import RawFile
from edgellama.quantize.torch_files import read_torch_file

CLASSES = {"<f4": "FloatStorage", "<f2": "HalfStorage", "<u2": "BFloat16Storage"}
CLASSES |= {"|u1": "ByteStorage", "<i8": "LongStorage", "<f8": "DoubleStorage"}

PROTO, STOP, MARK = b"\x80\x02", b".", b"("
EMPTY_DICT, EMPTY_TUPLE, EMPTY_LIST, NONE, TRUE, FALSE = b"}", b")", b"]", b"N", b"\x88", b"\x89"
TUPLE, REDUCE, BUILD, SETITEM, SETITEMS, PERSID = b"t", b"R", b"b", b"s", b"u", b"Q"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def many(*values: bytes) -> bytes:
    """A tuple."""
    return MARK + b"".join(values) + TUPLE


ORDERED = name("collections", "OrderedDict") + EMPTY_TUPLE + REDUCE
REBUILD = name("torch._utils", "_rebuild_tensor_v2")


def storage(key: str, kind: str, count: int) -> bytes:
    return (
        many(text("storage"), name("torch", kind), text(key), text("cpu"), number(count)) + PERSID
    )


def view(where: bytes, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A tensor of a storage."""
    sizes, strides = many(*map(number, size)), many(*map(number, stride))
    return REBUILD + many(where, number(offset), sizes, strides, FALSE, ORDERED) + REDUCE


def dictionary(items: dict[str, bytes]) -> bytes:
    return (
        EMPTY_DICT + MARK + b"".join(text(key) + value for key, value in items.items()) + SETITEMS
    )


def pickled(body: bytes) -> bytes:
    return PROTO + body + STOP


@dataclass
class Entry:
    """One entry of an archive; what is None is told truly."""

    name: str | bytes
    data: bytes
    method: int = 0
    flags: int = 0
    local_name: bytes | None = None
    local_size: int | None = None
    size: int | None = None
    packed: int | None = None
    header: int | None = None
    before: bytes = b""  # bytes in front of the local header
    extra: bytes = b""


@dataclass
class Archive:
    """A zip file."""

    entries: list[Entry] = field(default_factory=list)
    count: int | None = None
    comment: bytes = b""
    before_directory: bytes = b""
    align: int = 64

    def bytes(self) -> bytes:
        body, directory = b"", b""
        for entry in self.entries:
            raw = entry.name.encode() if isinstance(entry.name, str) else entry.name
            body += entry.before
            at, local_name = len(body), raw if entry.local_name is None else entry.local_name
            pad = -(at + 30 + len(local_name) + 4) % self.align
            extra = b"FB" + struct.pack("<H", pad) + b"Z" * pad
            size = len(entry.data)
            local = size if entry.local_size is None else entry.local_size
            fixed = (20, entry.flags, entry.method, 0, 0, 0)
            sizes = (local, local, len(local_name), len(extra))
            body += struct.pack("<4s5H3I2H", b"PK\3\4", *fixed, *sizes)
            body += local_name + extra + entry.data
            size = size if entry.size is None else entry.size
            packed = size if entry.packed is None else entry.packed
            header = at if entry.header is None else entry.header
            rest = (packed, size, len(raw), len(entry.extra), 0, 0, 0, 0, header)
            directory += (
                struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, *fixed, *rest) + raw + entry.extra
            )
        body += self.before_directory
        count = len(self.entries) if self.count is None else self.count
        end = (0, 0, count, count, len(directory), len(body), len(self.comment))
        return body + directory + struct.pack("<4s4H2IH", b"PK\5\6", *end) + self.comment


def archive(pickle: bytes, storages: dict[str, bytes], root: str = "m") -> Archive:
    """As PyTorch lays them out."""
    entries = [Entry(f"{root}/data.pkl", pickle), Entry(f"{root}/byteorder", b"little")]
    entries += [Entry(f"{root}/data/{key}", data) for key, data in storages.items()]
    return Archive([*entries, Entry(f"{root}/version", b"3\n")])


def torch_file(tensors: dict[str, "np.ndarray[Any, Any]"]) -> bytes:
    """A state dict of these arrays; uint16 stands for bfloat16."""
    items, storages = {}, {}
    for index, (title, array) in enumerate(tensors.items()):
        steps = [step // array.itemsize for step in np.ascontiguousarray(array).strides]
        kept = storage(str(index), CLASSES[array.dtype.str], array.size)
        items[title] = view(kept, 0, array.shape, tuple(steps))
        storages[str(index)] = array.tobytes()
    return archive(pickled(dictionary(items)), storages).bytes()


def safetensors_file(tensors: dict[str, "np.ndarray[Any, Any]"], **metadata: str) -> bytes:
    """The same as .safetensors."""
    kinds = {"<f4": "F32", "<f2": "F16", "<u2": "BF16", "|u1": "U8", "<i8": "I64", "|i1": "I8"}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for title, array in tensors.items():
        span = [len(data), len(data) + array.nbytes]
        kind = kinds[array.dtype.str]
        header[title] = {"dtype": kind, "shape": list(array.shape), "data_offsets": span}
        data += array.tobytes()
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for title, data in files.items():
        (folder / title).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


KEPT = storage("0", "FloatStorage", 6)
GOOD = view(KEPT, 0, (2, 3), (3, 1))


def refusal(
    tmp_path: Path, raw: bytes, kind: type[EdgeLlamaError] = ModelFormatError, exact: bool = True
) -> str:
    """The message with which a file of these bytes is refused."""
    path = tmp_path / "bad.bin"
    path.write_bytes(raw)
    with RawFile(path) as file, pytest.raises(kind) as caught:
        read_torch_file(file)
    assert type(caught.value) is kind or not exact
    assert caught.value.path == path
    return str(caught.value)


def refused_pickle(
    tmp_path: Path, raw: bytes, kind: type[EdgeLlamaError] = ModelFormatError
) -> str:
    return refusal(tmp_path, archive(raw, {"0": bytes(24)}).bytes(), kind)


def accepted(tmp_path: Path, raw: bytes) -> dict[str, Any]:
    path = tmp_path / "good.bin"
    path.write_bytes(raw)
    with RawFile(path) as file:
        return {key: tensor.read() for key, tensor in read_torch_file(file).items()}
