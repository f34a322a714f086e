"""The models whose logits are kept: six tiny seeded ones, and the default model.

Knows nothing about torch or about how logits are made.
"""

import hashlib
from pathlib import Path

import gguf
import numpy as np
from accuracy import POSITIONS, TEXT
from tiny import tiny_config, write_tiny

from edgellama.config import ModelConfig, Rope
from edgellama.gguf import open_gguf
from edgellama.rope import llama3_factors
from edgellama.tokenizer import tokenizer_from_gguf

SEED = 5
LENGTH = 200  # tokens of a tiny model: more than any chunk of 64 or 128
ROWS = tuple(range(7, LENGTH, 12))  # positions kept of float32 weights: 17
FEWER = ROWS[1::2]  # and of other types
KINDS = ("F32", "F16", "Q4_0", "Q8_0")
LLAMA3 = (8.0, 1.0, 4.0, 64)  # factor, low and high frequency factors, original context


def _config(
    heads: int, kv_heads: int, head_dim: int, rope: Rope, tied: bool = False
) -> ModelConfig:
    return tiny_config(
        vocab_size=320,
        n_layers=3,
        dim=128,
        ffn_dim=256,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=512,
        rope=rope,
        tied_output=tied,
    )


TINY = {
    "mha": _config(4, 4, 32, Rope(32)),
    "gqa": _config(8, 2, 32, Rope(32)),
    "tied": _config(4, 2, 64, Rope(64), tied=True),
    "llama3": _config(4, 1, 64, Rope(64, 500_000.0)),
    "yarn": _config(4, 2, 32, Rope(32, scaling="yarn", factor=4.0, original_context=128)),
    "head128": _config(4, 2, 128, Rope(128)),
}


def write(folder: Path, name: str, kind: str) -> Path:
    """The file of a tiny model, written once."""
    path = folder / f"{name}-{kind}.gguf"
    if not path.exists():
        config = TINY[name]
        factors = llama3_factors(config.rope, *LLAMA3) if name == "llama3" else None
        write_tiny(path, config, kind, seed=SEED, rope_factors=factors)
    return path


def ids(name: str) -> list[int]:
    generator = np.random.default_rng([SEED, list(TINY).index(name)])
    return [int(i) for i in generator.integers(0, TINY[name].vocab_size, LENGTH)]


def rows(kind: str) -> tuple[int, ...]:
    return ROWS if kind == "F32" else FEWER


def text_ids(path: Path) -> list[int]:
    """The fixed English text as tokens of the default model."""
    with open_gguf(path) as file:
        tokenizer = tokenizer_from_gguf(file.metadata, path=path)
    return tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:POSITIONS]


def weights_sha256(path: Path) -> str:
    """Of the tensors alone, so that a file of other metadata has the same."""
    digest = hashlib.sha256()
    for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.name):
        shape = "x".join(str(int(n)) for n in tensor.shape)
        digest.update(f"{tensor.name} {tensor.tensor_type.name} {shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor.data).tobytes())
    return digest.hexdigest()
