"""Models of published shapes with random weights: as large and as slow as the real ones.

    python benchmarks/synthetic.py SHAPE TYPE FILE.gguf [--seed N] [--vocabulary MODEL.gguf]

Every matrix has the type named (where a row does not divide into its blocks, the type llama.cpp
falls back to); blocks are random bits whose scales make the weights of a row spread as
1 / sqrt(columns), so that activations stay finite. The same arguments give the same bytes. Memory
stays bounded: tensors are made and written piece by piece. The vocabulary is bytes and fillers, or
another model's. Knows nothing about measuring.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import gguf
import numpy as np

from edgellama.config import ModelConfig, Rope
from edgellama.ggml import BY_NAME, FLOATS, HALVES, RUNNABLE
from edgellama.gguf import open_gguf
from edgellama.quantize.blocks import decode
from edgellama.weights import expected_shapes

VERSION = 1  # of the bytes that the same arguments give; part of a cached file's name
PIECE = 2**24  # bytes made at once
FALLBACKS = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# The second of two scales, over the first, that centres a block's values.
CENTRES = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}
UNKNOWN, CONTROL, NORMAL, BYTE = 2, 3, 1, 6  # token types of the GGUF specification


def _shape(
    dim: int,
    ffn: int,
    layers: int,
    heads: tuple[int, int],  # of queries, of keys and values
    vocab: int,
    context: int,
    theta: float = 1e4,
    tied: bool = False,
) -> ModelConfig:
    size = dim // heads[0]
    return ModelConfig(
        *(vocab, layers, dim, ffn, *heads, size, context, Rope(size, theta)), tied_output=tied
    )


SHAPES = {
    "tiny": _shape(256, 512, 2, (4, 2), 512, 2048, tied=True),
    "smollm2-135m": _shape(576, 1536, 30, (9, 3), 49152, 8192, 1e5, tied=True),
    "tinyllama-1.1b": _shape(2048, 5632, 22, (32, 4), 32000, 2048),
    "llama-3.2-1b": _shape(2048, 8192, 16, (32, 8), 128256, 131072, 5e5, tied=True),
    "llama-2-7b": _shape(4096, 11008, 32, (32, 32), 32000, 4096),
    "llama-3-8b": _shape(4096, 14336, 32, (32, 8), 128256, 8192, 5e5),
    "llama-2-13b": _shape(5120, 13824, 40, (40, 40), 32000, 4096),
}


def cached_path(folder: Path, shape: str, kind: str, vocabulary: Path | None = None) -> Path:
    """Where `cached` keeps this file."""
    own = "" if vocabulary is None else "-vocabulary"
    return folder / f"{shape}-{kind}{own}-v{VERSION}.gguf"


def cached(folder: Path, shape: str, kind: str, vocabulary: Path | None = None) -> Path:
    """The file of this shape and type in a folder; written if it is not there."""
    path = cached_path(folder, shape, kind, vocabulary)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(path, shape, kind, vocabulary=vocabulary)
    return path


def write(
    path: Path, shape: str, kind: str, *, seed: int = 0, vocabulary: Path | None = None
) -> Path:
    """Write a model; `path` appears when it is complete."""
    config = replace(SHAPES[shape], name=f"synthetic {shape} {kind}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    try:
        keys = _keys(config) | _vocabulary(config.vocab_size, vocabulary)
        _write_keys(writer, keys)
        tensors = {name: _type_of(s, kind) for name, s in expected_shapes(config).items()}
        _write_tensors(writer, expected_shapes(config), tensors, seed)
        writer.close()
        os.replace(temporary, path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return path


def _type_of(shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1:
        return "F32"
    return kind if shape[1] % BY_NAME[kind].block == 0 else FALLBACKS.get(kind, "F16")


def _write_tensors(
    writer: gguf.GGUFWriter, shapes: dict[str, tuple[int, ...]], types: dict[str, str], seed: int
) -> None:
    sizes = {}
    for name, shape in shapes.items():
        kind = BY_NAME[types[name]]
        row = shape[-1] // kind.block * kind.size
        sizes[name] = (*shape[:-1], row)
        raw = gguf.GGMLQuantizationType[kind.name]
        n_bytes = int(np.prod(sizes[name]))
        writer.add_tensor_info(name, sizes[name], np.dtype(np.uint8), n_bytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    for name, shape in shapes.items():
        for piece in pieces(name, types[name], shape, seed):
            file.write(piece.data)
        writer.write_padding(file, file.tell())


def pieces(name: str, kind: str, shape: tuple[int, ...], seed: int = 0) -> Iterator[np.ndarray]:
    """A tensor's bytes, some whole rows at a time."""
    if len(shape) == 1:  # a norm
        yield np.ones(shape, np.float32)
        return
    generator = np.random.Generator(np.random.SFC64([seed, crc32(name.encode())]))
    rows, columns = shape
    row_bytes = columns // BY_NAME[kind].block * BY_NAME[kind].size
    at_once = max(1, PIECE // row_bytes)
    for first in range(0, rows, at_once):
        n_bytes = (min(rows, first + at_once) - first) * row_bytes
        yield _random(generator, kind, n_bytes, columns)


def _random(generator: np.random.Generator, kind: str, n_bytes: int, columns: int) -> np.ndarray:
    """Legal bytes of a type, whose values have mean 0 and deviate by 1 / sqrt(columns)."""
    if kind in FLOATS:
        n = n_bytes // BY_NAME[kind].size
        values = (generator.random(n, np.float32) - np.float32(0.5)) * np.sqrt(12 / columns)
        return _as_float(kind, values.astype(np.float32))
    bits = generator.bit_generator.random_raw(-(-n_bytes // 8)).view(np.uint8)[:n_bytes]
    _set_scales(kind, bits, _spread(kind) ** -1 / columns**0.5)
    return bits


def _as_float(kind: str, values: np.ndarray) -> np.ndarray:
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16) if kind == "F16" else values


def _set_scales(kind: str, bits: np.ndarray, scale: float) -> None:
    blocks = bits.reshape(-1, BY_NAME[kind].size)
    for at, factor in zip(HALVES[kind], (1.0, CENTRES.get(kind, 1.0)), strict=False):
        blocks[:, at : at + 2] = np.array([scale * factor], np.float16).view(np.uint8)


@cache
def _spread(kind: str) -> float:
    """Standard deviation of random blocks whose scale is 1."""
    generator = np.random.Generator(np.random.SFC64(0))
    bits = generator.integers(0, 256, (64, 16 * BY_NAME[kind].size), np.uint8)
    _set_scales(kind, bits.reshape(-1), 1.0)
    return float(decode(kind, bits).std())


# --- metadata -----------------------------------------------------------------------------------


def _keys(config: ModelConfig) -> dict[str, Any]:
    return {
        "general.name": config.name,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.context_length,
        "llama.embedding_length": config.dim,
        "llama.block_count": config.n_layers,
        "llama.feed_forward_length": config.ffn_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.dimension_count": config.rope.dim,
        "llama.rope.freq_base": config.rope.freq_base,
    }


def _vocabulary(size: int, source: Path | None) -> dict[str, Any]:
    """Tokenizer keys: of another model, or 256 bytes, and fillers that no text holds."""
    if source is not None:
        with open_gguf(source) as file:
            own = {k: v for k, v in file.metadata.items() if k.startswith("tokenizer.")}
        if len(own["tokenizer.ggml.tokens"]) > size:  # type: ignore[arg-type]
            raise SystemExit(f"{source} has more tokens than the {size} of this shape")
        return own
    fillers = [f"<filler {i}>" for i in range(size - 259)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [
            *("<unk>", "<s>", "</s>"),
            *(f"<0x{byte:02X}>" for byte in range(256)),
            *fillers,
        ],
        "tokenizer.ggml.scores": [0.0] * 259 + [-1.0 - i for i in range(len(fillers))],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL]
        + [BYTE] * 256
        + [NORMAL] * len(fillers),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _write_keys(writer: gguf.GGUFWriter, keys: dict[str, Any]) -> None:
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, list(value))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model with random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", choices=RUNNABLE)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=Path, help="take the tokenizer of this model")
    given = parser.parse_args()
    write(given.file, given.shape, given.type, seed=given.seed, vocabulary=given.vocabulary)


if __name__ == "__main__":
    main()
