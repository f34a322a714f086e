"""Damaged checkpoints of every kind: only edgellama's own errors, whatever byte is wrong.

Short and seeded; EDGELLAMA_FUZZ multiplies the number of mutations.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchfiles import safetensors_file, torch_file, write

from edgellama import EdgeLlamaError
from edgellama.quantize.checkpoint import open_checkpoint

DATA = Path(__file__).parent / "data"
MUTATIONS = 300 * int(os.environ.get("EDGELLAMA_FUZZ", "1"))
A = np.arange(12, dtype=np.float32).reshape(3, 4)
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x28, 0x2E, 0x52, 0x5B, 0x63, 0x7B]


def packed() -> bytes:
    return (DATA / "bnb_4bit.safetensors").read_bytes()


SOURCES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "safetensors": ("model.safetensors", lambda: safetensors_file({"a.weight": A, "b.bias": A[0]})),
    "pytorch": ("pytorch_model.bin", lambda: torch_file({"a.weight": A, "b.bias": A[0]})),
    "written by PyTorch": ("pytorch_model.bin", (DATA / "torch_views.bin").read_bytes),
    "4 bits": ("model.safetensors", packed),
}


def opens_or_refuses(folder: Path) -> bool:
    """Whether it opens and reads whole; any exception but our own is the test's failure."""
    try:
        with open_checkpoint(folder) as checkpoint:
            for tensor in checkpoint.tensors.values():
                with np.errstate(all="ignore"):  # values are not what is tested
                    rows = tensor.read()
                assert rows.shape == tensor.shape and rows.dtype == np.float32
    except EdgeLlamaError as error:
        assert error.path is not None
        return False
    return True


def mutated(raw: bytes, draw: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(min(len(data), 4096)) * draw.choice((1, -1)) % len(data)
        match draw.randrange(5):
            case 0:
                data[at] = draw.choice(INTERESTING)
            case 1:
                data[at] ^= 1 << draw.randrange(8)
            case 2:
                del data[at : at + draw.randrange(1, 9)]
            case 3:
                data[at:at] = draw.randbytes(draw.randrange(1, 9))
            case 4:
                size = draw.choice((2, 4, 8))
                value = draw.choice((0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**62, 2**63))
                data[at : at + size] = value.to_bytes(8, "little")[:size]
        if not data:
            return b""
    return bytes(data)


@pytest.mark.parametrize("source", SOURCES)
def test_mutations(tmp_path: Path, source: str) -> None:
    name, made = SOURCES[source]
    raw, draw = made(), random.Random(source)
    folder = write(tmp_path, {name: raw, "config.json": "{}"})
    assert opens_or_refuses(folder)
    refused = 0
    for _ in range(MUTATIONS):
        (folder / name).write_bytes(mutated(raw, draw))
        refused += not opens_or_refuses(folder)
    assert refused > MUTATIONS // 4


@pytest.mark.parametrize("source", ["safetensors", "pytorch"])
def test_every_prefix_is_refused(tmp_path: Path, source: str) -> None:
    name, made = SOURCES[source]
    raw = made()
    folder = write(tmp_path, {name: raw, "config.json": "{}"})
    for end in range(0, len(raw), 1 if source == "safetensors" else 3):
        (folder / name).write_bytes(raw[:end])
        assert not opens_or_refuses(folder), end


def test_mutated_indexes(tmp_path: Path) -> None:
    listed = json.dumps({"weight_map": {"a.weight": "x.safetensors", "b.weight": "y.safetensors"}})
    name, draw = "model.safetensors.index.json", random.Random(7)
    shards = {f"{at}.safetensors": safetensors_file({f"{b}.weight": A}) for at, b in ("xa", "yb")}
    folder = write(tmp_path, {**shards, name: listed, "config.json": "{}"})
    assert opens_or_refuses(folder)
    for _ in range(MUTATIONS):
        (folder / name).write_bytes(mutated(listed.encode(), draw))
        opens_or_refuses(folder)


def test_opening_imports_nothing_heavy() -> None:
    program = """
import sys
import edgellama.quantize.checkpoint
heavy = {"numba", "llvmlite", "gguf", "torch", "pickle5", "safetensors", "tokenizers", "jinja2"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
