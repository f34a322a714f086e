"""GGUF files from small specs, good and bad, serialised without any library's help.

A spec may lie: every count, length, type and offset can be replaced by what the test wants.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tiny import tiny_config, tiny_weights

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = dict(zip(range(13), "BbHhIif?\0\0QqdX", strict=False))
HUGE = 2**63


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A GGUF string; `length` declares another length than the true one."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def scalar(kind: int, value: float) -> bytes:
    return struct.pack("<I" + CODES[kind], kind, value)


def string(value: str | bytes, length: int | None = None) -> bytes:
    return struct.pack("<I", STRING) + text(value, length)


def array(kind: int, raw: bytes, count: int) -> bytes:
    """An array value of `count` declared elements, and the bytes that follow."""
    return struct.pack("<IIQ", ARRAY, kind, count) + raw


@dataclass
class Tensor:
    """One row of the tensor table, with its data; `offset` None is the right one."""

    name: str | bytes
    dims: tuple[int, ...]  # fastest first, as in the file
    data: bytes = b""
    type: int = 0
    offset: int | None = None
    n_dims: int | None = None
    name_length: int | None = None


@dataclass
class Spec:
    """A whole file. None means the right value."""

    keys: list[tuple[str | bytes, bytes]]
    tensors: list[Tensor]
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_kv: int | None = None
    alignment: int = 32
    trailing: bytes = b""
    key_lengths: dict[int, int] = field(default_factory=dict)

    def header(self) -> bytes:
        """Everything before the data, unpadded."""
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_kv = len(self.keys) if self.n_kv is None else self.n_kv
        parts = [self.magic, struct.pack("<IQQ", self.version, n_tensors, n_kv)]
        for i, (key, value) in enumerate(self.keys):
            parts += [text(key, self.key_lengths.get(i)), value]
        offset = 0
        for tensor in self.tensors:
            n_dims = len(tensor.dims) if tensor.n_dims is None else tensor.n_dims
            place = offset if tensor.offset is None else tensor.offset
            parts += [text(tensor.name, tensor.name_length), struct.pack("<I", n_dims)]
            parts.append(struct.pack(f"<{len(tensor.dims)}Q", *(d % 2**64 for d in tensor.dims)))
            parts.append(struct.pack("<IQ", tensor.type % 2**32, place % 2**64))
            offset += len(self._padded(tensor.data))
        return b"".join(parts)

    def _padded(self, raw: bytes) -> bytes:
        return raw + bytes(-len(raw) % self.alignment)

    def build(self) -> bytes:
        data = b"".join(self._padded(tensor.data) for tensor in self.tensors)
        return self._padded(self.header()) + data + self.trailing

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path

    def set(self, key: str, value: bytes | None) -> "Spec":
        """Replace, add or (None) drop a key."""
        self.keys = [pair for pair in self.keys if pair[0] != key]
        if value is not None:
            self.keys.append((key, value))
        return self

    def find(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name)


SMALL = tiny_config(
    dim=32, ffn_dim=32, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=40, tied_output=True
)


def good() -> Spec:
    """A legal model of one tiny layer, with a header of about 2 kB; a new one every time."""
    keys: list[tuple[str | bytes, bytes]] = [
        ("general.architecture", string("llama")),
        ("general.name", string("small")),
        ("general.quantized", scalar(BOOL, True)),
        ("llama.vocab_size", scalar(U32, SMALL.vocab_size)),
        ("llama.context_length", scalar(U32, 128)),
        ("llama.embedding_length", scalar(U32, SMALL.dim)),
        ("llama.block_count", scalar(U32, SMALL.n_layers)),
        ("llama.feed_forward_length", scalar(U32, SMALL.ffn_dim)),
        ("llama.attention.head_count", scalar(U32, SMALL.n_heads)),
        ("llama.attention.head_count_kv", scalar(U32, SMALL.n_kv_heads)),
        ("llama.attention.layer_norm_rms_epsilon", scalar(F32, 1e-5)),
        ("tokenizer.ggml.tokens", array(STRING, b"".join(text(f"t{i}") for i in range(40)), 40)),
        ("tokenizer.ggml.scores", array(F32, struct.pack("<40f", *range(40)), 40)),
        ("tokenizer.ggml.token_type", array(I32, struct.pack("<40i", *[1] * 40), 40)),
    ]
    tensors: list[Tensor] = [
        Tensor(name, tuple(reversed(values.shape)), values.astype("<f4").tobytes())
        for name, values in tiny_weights(SMALL).items()
    ]
    return Spec(keys, tensors)


def changed(change: Callable[[Spec], object]) -> Callable[[], bytes]:
    """A builder of the good file after `change`."""

    def build() -> bytes:
        spec = good()
        change(spec)
        return spec.build()

    return build


def with_key(key: str | bytes, value: bytes) -> Callable[[], bytes]:
    return changed(lambda spec: spec.keys.append((key, value)))


def with_tensor(**fields: object) -> Callable[[], bytes]:
    """The good file, with fields of its second tensor replaced."""

    def change(spec: Spec) -> None:
        for name, value in fields.items():
            setattr(spec.tensors[1], name, value)

    return changed(change)


def only(header: bytes) -> Callable[[], bytes]:
    """A file of nothing but the counts 0 tensors, 1 key, and these bytes."""
    return lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + header


def zeros(name: str, shape: tuple[int, ...]) -> Tensor:
    """An F32 tensor of zeros; `shape` slowest first."""
    return Tensor(name, tuple(reversed(shape)), bytes(4 * int(np.prod(shape))))
