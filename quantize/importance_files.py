"""Importance matrices in files: llama.cpp's GGUF form, read and written, and its older `.dat`.

A GGUF of `general.type` "imatrix" holds for each weight the sums of its squared inputs by column,
`NAME.in_sum2`, and over how many tokens, `NAME.counts`; both F32. Other keys say what text they
are from. Source: llama.cpp's `imatrix.cpp` and `imatrix-loader.cpp`, version b10069.

Knows nothing about how the sums are collected or what they are used for.
"""

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgellama.errors import ModelFormatError, UnsupportedModelError, shown
from edgellama.gguf import GGUF, open_gguf
from edgellama.output import atomic_output
from edgellama.quantize.plan import PlannedTensor
from edgellama.quantize.writer import Writer
from edgellama.regular_file import read_start

Floats = NDArray[np.float32]
SUMS, COUNTS = ".in_sum2", ".counts"
LARGEST_DAT = 1 << 30  # bytes; a 70B model's takes 60 MB
MOST_COUNT = 1 << 53


@dataclass
class Importance:
    """Sums of squared inputs, by weight and column, and what they are of."""

    sums: dict[str, Floats]  # by tensor name, (columns,), or (matrices, columns) of experts
    counts: dict[str, Floats]  # tokens of each sum, (1,) or (matrices,)
    chunks: int = 0  # of the text, so far
    chunk_tokens: int = 0
    datasets: list[str] = field(default_factory=list)  # names of texts
    keys: dict[str, str] = field(default_factory=dict)  # `edgellama.*`: whose statistics they are

    def weights(self) -> dict[str, Floats]:
        """Mean squares by tensor name, float32, flat: what encoders weight errors by.

        Where nothing was counted every column weighs 1, as in llama-quantize.
        """
        found = {}
        for name, sums in self.sums.items():
            counts = self.counts[name][:, None]
            rows = sums.reshape(len(counts), -1)
            mean = np.divide(rows, counts, out=np.ones_like(rows), where=counts > 0)
            found[name] = mean.reshape(-1)
        return found


def read_importance(path: "str | os.PathLike[str]") -> Importance:
    """Read an importance matrix, GGUF or `.dat`.

    Raises ModelFormatError for a damaged file, UnsupportedModelError for a GGUF that is something
    else, EdgeLlamaError if it cannot be read.
    """
    path = Path(path)
    if read_start(path, 4, wanted="an importance matrix") != b"GGUF":
        return _read_dat(path)
    with open_gguf(path) as opened:
        return _read_gguf(opened)


def _read_gguf(file: GGUF) -> Importance:
    kind = file.metadata.get("general.type")
    if kind != "imatrix":
        raise UnsupportedModelError(
            f"this is no importance matrix: general.type is {shown(kind)}",
            path=file.path,
            where="key 'general.type'",
            field="general.type",
            value=kind,
            allowed="imatrix",
            hint="Make one with --calibrate, or with llama.cpp's llama-imatrix",
        )
    found = Importance({}, {}, _number(file, "chunk_count"), _number(file, "chunk_size"))
    datasets = file.metadata.get("imatrix.datasets", [])
    if isinstance(datasets, list):
        found.datasets = [name for name in datasets if isinstance(name, str)]
    found.keys = {
        key: value
        for key, value in file.metadata.items()
        if key.startswith("edgellama.") and isinstance(value, str)
    }
    for name in file.tensors:
        base, _, kind = name.rpartition(".")
        if f".{kind}" == SUMS:
            _read_pair(file, base, found)
        elif f".{kind}" == COUNTS and base + SUMS not in file.tensors:
            raise _damaged(file.path, name, f"it has no {shown(base + SUMS)} beside it")
    if not found.sums:
        raise ModelFormatError("it holds no statistics", path=file.path)
    return found


def _number(file: GGUF, name: str) -> int:
    """llama-quantize refuses a file without them."""
    key = f"imatrix.{name}"
    value = file.metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
        problem = "is missing" if value is None else f"{shown(value)} is not allowed"
        raise ModelFormatError(
            f"{problem}; expected an integer 0..4294967295",
            path=file.path,
            where=f"key '{key}'",
            field=key,
            value=value,
        )
    return value


def _read_pair(file: GGUF, name: str, found: Importance) -> None:
    """One weight's sums and counts, checked against each other."""
    if name + COUNTS not in file.tensors:
        raise _damaged(file.path, name + SUMS, f"it has no {shown(name + COUNTS)} beside it")
    sums, counts = (_floats(file, name + kind) for kind in (SUMS, COUNTS))
    if not counts.size or sums.size % counts.size or not sums.size:
        problem = f"{sums.size} sums do not go with {counts.size} counts"
        raise _damaged(file.path, name + SUMS, problem)
    if (counts != np.floor(counts)).any() or (counts > MOST_COUNT).any():
        raise _damaged(file.path, name + COUNTS, "a count is no whole number of tokens")
    shape = (counts.size, -1) if counts.size > 1 else (-1,)
    found.sums[name], found.counts[name] = sums.reshape(shape), counts.reshape(-1)


def _floats(file: GGUF, name: str) -> Floats:
    info = file.tensors[name]
    if info.type.name != "F32":
        raise _damaged(file.path, name, f"its type is {info.type.name}; expected F32")
    data = bytearray(info.n_bytes)
    file.read_into(name, data)
    return _checked(np.frombuffer(data, "<f4").astype(np.float32), file.path, name)


def _checked(values: Floats, path: Path, name: str) -> Floats:
    """Sums of squares and counts are finite and not negative."""
    if not (np.isfinite(values) & (values >= 0)).all():
        raise _damaged(path, name, "a value is negative or not finite")
    return values


def _damaged(path: Path, name: str, problem: str) -> ModelFormatError:
    hint = "Make it anew, with --calibrate or with llama.cpp's llama-imatrix"
    return ModelFormatError(problem, path=path, where=f"tensor {shown(name)}", hint=hint)


def write_importance(path: "str | os.PathLike[str]", importance: Importance) -> None:
    """Write the GGUF form, atomically; llama-quantize reads it too. Raises OutputError."""
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": importance.datasets,
        "imatrix.chunk_count": importance.chunks,
        "imatrix.chunk_size": importance.chunk_tokens,
        **importance.keys,
    }
    tensors: list[tuple[PlannedTensor, Floats]] = []
    for name in sorted(importance.sums):  # as llama.cpp orders them
        counts = importance.counts[name].reshape(-1, 1)
        sums = importance.sums[name].reshape(len(counts), -1)
        for values, kind in ((sums, SUMS), (counts, COUNTS)):
            planned = PlannedTensor(name + kind, values.shape, "F32", "F32", "")
            tensors.append((planned, values.astype("<f4")))
    with atomic_output(Path(path)) as file:
        writer = Writer(file, metadata, [planned for planned, _ in tensors])
        for planned, values in tensors:
            writer.write(values.tobytes())
            writer.end_tensor(planned)


# --- the older form ------------------------------------------------------------------------------


def _read_dat(path: Path) -> Importance:
    """llama.cpp's form before July 2025: entries of name, calls, and means times calls.

    int32 entries; each: int32 length, name, int32 calls, int32 values, float32 values. Then
    int32 calls in all, int32 length and name of the text, which may be missing.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not 4 <= size <= LARGEST_DAT:
            raise _no_dat(path, f"{size} bytes")
        found, entries = Importance({}, {}), _integer(file, path)
        for number in range(entries):  # each takes bytes, so the file's end bounds the loop
            _read_entry(file, path, number, found, size)
        if not found.sums:
            raise _no_dat(path, "no entries")
        rest = file.read(8)
        if len(rest) >= 4:
            found.chunks = max(0, struct.unpack("<i", rest[:4])[0])
        if len(rest) == 8:
            length = max(0, min(struct.unpack("<i", rest[4:])[0], size - file.tell()))
            found.datasets = [file.read(length).decode(errors="replace")] if length else []
    return found


def _read_entry(file: BinaryIO, path: Path, number: int, found: Importance, size: int) -> None:
    length = _integer(file, path)
    if not 0 < length <= size - file.tell():
        raise _no_dat(path, f"entry {number + 1} has a name of {length} bytes")
    name = file.read(length).decode(errors="replace")
    calls, n = _integer(file, path), _integer(file, path)
    if calls < 0 or not 0 < n <= (size - file.tell()) // 4:
        raise _no_dat(path, f"entry {number + 1} declares {n} values of {calls} calls")
    if name in found.sums:
        raise _no_dat(path, f"entry {number + 1} is there twice")
    values = np.frombuffer(file.read(4 * n), "<f4").astype(np.float32)
    found.sums[name] = _checked(values, path, name)
    found.counts[name] = np.array([calls or 1], np.float32)  # without calls, they are means


def _integer(file: BinaryIO, path: Path) -> int:
    data = file.read(4)
    if len(data) < 4:
        raise _no_dat(path, "it ends too early")
    return int(struct.unpack("<i", data)[0])


def _no_dat(path: Path, why: str) -> ModelFormatError:
    return ModelFormatError(
        f"this is no importance matrix, or a damaged one: {why}",
        path=path,
        hint="A GGUF of type imatrix is wanted, or llama.cpp's older .dat",
    )
