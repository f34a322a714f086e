"""A Hugging Face folder of a published shape: sharded float16 safetensors with random weights.

    python benchmarks/synthetic_checkpoint.py SHAPE FOLDER [--shard-bytes N]

Weights are those of `synthetic.py` for the same shape. Memory stays bounded. The tokenizer is a
SentencePiece model of bytes and fillers.
"""

import argparse
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import synthetic

from edgellama.config import ModelConfig
from edgellama.quantize.names import own_name
from edgellama.weights import expected_shapes

SHARD_BYTES = 5_000_000_000  # as the hub's folders have it
INDEX = "model.safetensors.index.json"
Shapes = dict[str, tuple[int, ...]]


def write_checkpoint(folder: Path, shape: str, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the folder; its index, which makes it complete, comes last."""
    config = synthetic.SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(config), indent=1))
    (folder / "tokenizer.model").write_bytes(_sentencepiece(config.vocab_size))
    shards = list(_shards(expected_shapes(config), shard_bytes))
    where = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard)
        where |= dict.fromkeys(map(_own_name, shard), name)
    total = sum(2 * math.prod(size) for size in expected_shapes(config).values())
    document = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(document))
    return folder


def _shards(shapes: Shapes, shard_bytes: int) -> Iterator[Shapes]:
    shard: Shapes = {}
    size = 0
    for name, shape in shapes.items():
        if shard and size + 2 * math.prod(shape) > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += 2 * math.prod(shape)
    yield shard


def _own_name(name: str) -> str:
    return own_name(name, "safetensors")


def _write_shard(path: Path, shapes: Shapes) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[_own_name(name)] = {"dtype": "F16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for piece in synthetic.pieces(name, "F16", shape):
                file.write(piece.astype("<f2").data)  # norms come as float32


def _config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.freq_base,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": config.tied_output,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


# --- a SentencePiece model: protobuf messages, by field number ------------------------------------


def _sentencepiece(size: int) -> bytes:
    unknown, control, byte, normal = 2, 3, 6, 1
    pieces = [("<unk>", 0.0, unknown), ("<s>", 0.0, control), ("</s>", 0.0, control)]
    pieces += [(f"<0x{value:02X}>", 0.0, byte) for value in range(256)]
    pieces += [(f"<filler {i}>", -1.0 - i, normal) for i in range(size - len(pieces))]
    data = b"".join(
        _field(1, _field(1, text.encode()) + _real(2, score) + _field(3, kind))
        for text, score, kind in pieces
    )
    trainer = {3: 2, 35: 1, 40: 0, 41: 1, 42: 2}  # BPE, byte fallback, unk, bos, eos
    data += _field(2, b"".join(_field(*pair) for pair in trainer.items()))
    return data + _field(3, _field(1, b"identity") + _field(3, 1) + _field(4, 0) + _field(5, 1))


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _real(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint with random weights.")
    parser.add_argument("shape", choices=synthetic.SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    given = parser.parse_args()
    write_checkpoint(given.folder, given.shape, given.shard_bytes)


if __name__ == "__main__":
    main()
