"""Opening a GGUF model: one file or the parts of a split one, checked before anything is used.

Reads with `read()` into the caller's buffers, never through a memory map: a file that is cut short
underneath must not kill the process. Needs the standard library only.

Knows nothing about which tensors a model has; `weights.py` compares them with the config.
"""

import os
import re
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Self

from edgellama.control import CancelToken
from edgellama.errors import ModelFormatError, shown
from edgellama.folders import not_a_model
from edgellama.gguf_parts import Part, TensorInfo, Value, parse_part
from edgellama.paths import absolute
from edgellama.regular_file import open_regular, unreadable

__all__ = ["GGUF", "TensorInfo", "Value", "open_gguf"]

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


class GGUF:
    """An open model file. A context manager; `read_into` may be called from any thread.

    `metadata` holds the values by key: numbers, strings, bools, lists of strings or bools, and
    `array.array` for numeric arrays. `kinds` says how each was stored: "u32", "array of f32".
    `path` is absolute, as are the `paths` of all parts.
    """

    def __init__(self, path: Path, parts: list[Part], files: ExitStack, raw: list[FileIO]) -> None:
        first = parts[0]
        self.path, self.version = path, first.version
        self.metadata: dict[str, Value] = first.metadata
        self.kinds: dict[str, str] = first.kinds
        self.tensors: dict[str, TensorInfo] = {}
        for part in parts:
            self.tensors.update(part.tensors)
        self.warnings: list[str] = [text for part in parts for text in part.warnings]
        self.n_bytes = sum(part.size for part in parts)
        self.paths = [part.path for part in parts]
        self._files, self._raw = files, raw
        self._lock = Lock()

    def read_into(self, name: str, buffer: "bytearray | memoryview", start: int = 0) -> None:
        """Fill the whole of a writable buffer from byte `start` of a tensor's data.

        Any object with a contiguous writable buffer will do, a NumPy array too. Raises
        ModelFormatError if the file has shrunk since it was opened, EdgeLlamaError with the
        system's reason if reading fails.
        """
        info = self.tensors[name]
        view = memoryview(buffer).cast("B")
        assert 0 <= start <= info.n_bytes - len(view), (name, start, len(view), info.n_bytes)
        file, done = self._raw[info.part], 0
        path, where = self.paths[info.part], f"tensor {shown(name)}"
        while done < len(view):
            try:
                with self._lock:
                    file.seek(info.offset + start + done)
                    got = file.readinto(view[done:])
            except OSError as error:
                raise unreadable(path, error, where) from error
            if not got:
                problem = "the file ends before the tensor does: it changed since it was opened"
                raise ModelFormatError(problem, path=path, where=where)
            done += got

    def close(self) -> None:
        """Close the files; doing so twice is harmless."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_gguf(path: "str | os.PathLike[str]", *, cancel: CancelToken | None = None) -> GGUF:
    """Open a GGUF file, or the first part of a split one together with the others beside it.

    Only the headers are read. Raises ModelFormatError if a file is damaged, is something else, or
    a part is missing; UnsupportedModelError for another version or byte order; EdgeLlamaError with
    the system's reason if a file cannot be opened; Cancelled.
    """
    with ExitStack() as files:
        raw = [_open(Path(path))]
        files.enter_context(raw[0])
        path = absolute(Path(path))
        parts = [_parse(raw[0], path, 0, cancel)]
        count = _part_count(parts[0])
        seen = dict.fromkeys(parts[0].tensors, path)
        for number in range(1, count):
            sibling = _sibling(path, number, count)
            raw.append(files.enter_context(_open_part(sibling, number, count)))
            parts.append(_parse(raw[-1], sibling, number, cancel))
            _check_part(parts[-1], number, count, seen)
        if count > 1:
            _check_total(parts)
        return GGUF(path, parts, files.pop_all(), raw)


def _open(path: Path) -> FileIO:
    if os.path.isdir(path):
        raise not_a_model(path)
    return open_regular(path, wanted="a GGUF file")


def _parse(file: FileIO, path: Path, index: int, cancel: CancelToken | None) -> Part:
    try:
        return parse_part(file, path, os.fstat(file.fileno()).st_size, index, cancel)
    except OSError as error:
        raise unreadable(path, error) from error


def _split_error(part: Part, key: str, value: object, problem: str, hint: str) -> ModelFormatError:
    return ModelFormatError(
        problem, path=part.path, where=f"key '{key}'", field=key, value=value, hint=hint
    )


def _split_number(part: Part, key: str, low: int, default: int | None = None) -> int:
    value = part.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= 65_535:
        problem = f"{shown(value)} is not allowed; expected an integer {low}..65535"
        raise _split_error(part, key, value, problem, "A part of a split model names its place")
    return value


def _part_count(first: Part) -> int:
    """How many files the model is split into; `first` must be the first of them."""
    count = _split_number(first, "split.count", 0, 0)
    if count <= 1:
        return 1
    number = _split_number(first, "split.no", 0)
    if number:
        problem = f"this is part {number + 1} of {count}"
        hint = f"Open the first part, {_sibling(first.path, 0, count).name}"
        raise _split_error(first, "split.no", number, problem, hint)
    return count


def _sibling(path: Path, number: int, count: int) -> Path:
    """The path of another part, counted from 0."""
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        problem = f"the file is one of {count} parts, but its name does not say so"
        hint = f"Name the parts <name>-00001-of-{count:05d}.gguf and so on, in one folder"
        raise ModelFormatError(problem, path=path, where="key 'split.count'", hint=hint)
    return path.with_name(f"{match['stem']}-{number + 1:05d}-of-{count:05d}.gguf")


def _open_part(path: Path, number: int, count: int) -> FileIO:
    if not path.exists():
        problem = f"part {number + 1} of {count} is missing"
        hint = "Download it into the same folder"
        raise ModelFormatError(problem, path=path, field="split.count", value=count, hint=hint)
    return _open(path)


def _check_part(part: Part, number: int, count: int, seen: dict[str, Path]) -> None:
    """A later part must be what its name says, and bring tensors that no other part has."""
    hint = "The parts are of different models or were renamed"
    for key, expected in (("split.count", count), ("split.no", number)):
        value = _split_number(part, key, 0)
        if value != expected:
            raise _split_error(part, key, value, f"{value}, expected {expected}", hint)
    for name in part.tensors:
        if name in seen:
            problem = f"the tensor is also in {seen[name].name}"
            raise ModelFormatError(problem, path=part.path, where=f"tensor {shown(name)}")
        seen[name] = part.path


def _check_total(parts: list[Part]) -> None:
    key, found = "split.tensors.count", sum(len(part.tensors) for part in parts)
    declared = parts[0].metadata.get(key, found)
    if declared != found:
        problem = f"{shown(declared)} tensors declared, but the parts hold {found}"
        raise _split_error(parts[0], key, declared, problem, "A part is of another model")
