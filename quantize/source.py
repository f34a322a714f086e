"""What the converter reads: a model's tensors by their GGUF names, and the metadata to write.

`open_source` recognises a Hugging Face folder, a folder as Meta publishes it, or a GGUF file.
Knows nothing about how a checkpoint stores its bytes, and nothing about what is written.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from edgellama.config import ModelConfig
from edgellama.errors import ModelFormatError
from edgellama.ggml import FLOATS
from edgellama.gguf import GGUF, TensorInfo, open_gguf
from edgellama.graph import decoder
from edgellama.quantize.blocks import decode
from edgellama.regular_file import unreadable
from edgellama.weights import ROPE_FACTORS, check_tensors, expected_shapes, model_config

Bits = NDArray[Any]
Floats = NDArray[np.float32]

_STORED: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_WRITERS = ("general.file_type", "general.quantization_version", "general.alignment")


@dataclass(frozen=True)
class SourceTensor:
    """One tensor under its GGUF name, read by ranges of rows (elements if one-dimensional).

    `shape` is (rows, columns); `type` the GGUF type of what is stored. Where `row_step` is above
    1, ranges begin and end at its multiples: `arrange` reorders rows within such groups, heads.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    fetch: Callable[[int, int], Floats] = field(repr=False, compare=False)
    fetch_bits: Callable[[int, int], Bits] = field(repr=False, compare=False)
    row_step: int = 1

    def read(self, first: int = 0, last: int | None = None) -> Floats:
        """Rows first..last-1 in float32, in the source's own order, (last - first, columns)."""
        return self.fetch(first, self._end(first, last))

    def read_bits(self, first: int = 0, last: int | None = None) -> Bits:
        """The same rows as stored: float32, float16, uint16 for BF16, uint8 blocks otherwise."""
        return self.fetch_bits(first, self._end(first, last))

    def arrange(self, rows: Bits) -> Bits:
        """The rows that `read` or `read_bits` gave, in GGUF's order.

        Hugging Face turns the dimensions i and i + d/2 of a head together, GGUF 2i and 2i + 1.
        """
        if self.row_step == 1:
            return rows
        halves = rows.reshape(-1, 2, self.row_step // 2, *rows.shape[1:])  # (heads, 2, d/2, k)
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)

    def _end(self, first: int, last: int | None) -> int:
        end = self.shape[0] if last is None else last
        assert 0 <= first <= end <= self.shape[0], (self.name, first, last)
        assert first % self.row_step == end % self.row_step == 0, (self.name, first, last)
        return end


@dataclass
class Source:
    """An open model to convert. A context manager; tensors may be read from any thread."""

    path: Path
    kind: str  # "safetensors", "pytorch", "meta" or "gguf"
    config: ModelConfig  # checked against metadata and tensors
    metadata: dict[str, Any]  # GGUF keys to write: general.*, llama.*, tokenizer.*
    tensors: dict[str, SourceTensor]  # by GGUF name, in the order to write: the graph's
    rope_convention: Literal["half", "interleaved"]  # of the rows as `read` gives them
    notes: list[str]  # for the user: what was chosen, guessed or left out
    close: Callable[[], None] = field(repr=False)
    kinds: Mapping[str, str] = field(default_factory=dict)  # GGUF only: how a key was stored

    def __post_init__(self) -> None:
        used = [name for name in decoder(self.config).weights if name in self.tensors]
        others = [name for name in self.tensors if name not in set(used)]
        self.tensors = {name: self.tensors[name] for name in (*others, *used)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(path: "str | os.PathLike[str]") -> Source:
    """Open what is to be converted, recognised by its content; only headers are read.

    Raises ModelFormatError, ModelConfigError, UnsupportedModelError, UnsafeModelError or
    TokenizerError for what a file holds, EdgeLlamaError with the system's reason if one cannot be
    read.
    """
    path = Path(path)
    _check_reachable(path)
    if not path.is_dir() and (_magic(path) == b"GGUF" or path.suffix.lower() == ".gguf"):
        return _open_gguf(path)  # what is none, but has the name, is refused there
    _refuse_folder_of_gguf(path)
    from edgellama.quantize.checkpoint_source import open_checkpoint_source

    return open_checkpoint_source(path)


def _check_reachable(path: Path) -> None:
    """What is not there the readers refuse; here it is what the system will not even look for."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return
    except OSError as error:
        raise unreadable(path, error) from error


def _magic(path: Path) -> bytes:
    """The first four bytes of a regular file; the readers refuse whatever else it may be."""
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise unreadable(path, error) from error


def _refuse_folder_of_gguf(path: Path) -> None:
    configs = ("config.json", "params.json")
    if not path.is_dir() or any((path / name).exists() for name in configs):
        return
    found = sorted(entry.name for entry in path.glob("*.gguf"))
    if found:
        hint = f"Give the file itself, {found[0]}"
        raise ModelFormatError("this is a folder of GGUF files", path=path, hint=hint)


def _open_gguf(path: Path) -> Source:
    file = open_gguf(path)
    try:
        config = model_config(file)
        notes = [*file.warnings, *check_tensors(file, config)]
        names = [n for n in file.tensors if n in expected_shapes(config) or n == ROPE_FACTORS]
        stored = {name: file.tensors[name].type.name for name in names}
        if quantized := sorted(set(stored.values()) - set(FLOATS)):
            types = ", ".join(quantized)
            notes.append(f"starts from quantized weights ({types}): what they lost stays lost")
        return Source(
            path=path,
            kind="gguf",
            config=config,
            metadata=_kept(file.metadata),
            tensors={name: _gguf_tensor(file, file.tensors[name]) for name in names},
            rope_convention="interleaved",
            notes=notes,
            close=file.close,
            kinds=_kept(file.kinds),
        )
    except BaseException:
        file.close()
        raise


def _kept(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that describe the file at hand, which the writer gives anew."""
    return {k: v for k, v in keys.items() if k not in _WRITERS and not k.startswith("split.")}


def _gguf_tensor(file: GGUF, info: TensorInfo) -> SourceTensor:
    def raw(first: int, last: int) -> NDArray[np.uint8]:
        """Whole rows; elements of a vector, which is never of a block type."""
        size = info.row_bytes if len(info.shape) > 1 else info.type.size
        rows = np.empty((last - first, size), np.uint8)
        if rows.size:
            file.read_into(info.name, rows.data, first * size)
        return rows

    def read(first: int, last: int) -> Floats:
        rows = decode(info.type.name, raw(first, last))
        return rows.reshape(last - first, *info.shape[1:])

    def read_bits(first: int, last: int) -> Bits:
        rows = raw(first, last)
        dtype = _STORED.get(info.type.name)
        if dtype is None:
            return rows
        return rows.view(dtype).reshape(last - first, *info.shape[1:])

    return SourceTensor(info.name, info.shape, info.type.name, read, read_bits)
