"""What the tests of saved sessions share: a tiny model, files of it, and files that lie."""

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
from tiny import tiny_config

import edgellama
from edgellama import Model
from edgellama.saved import DIGEST, HEADER

CONTEXT = 200
IDS = [int(i) for i in np.random.default_rng(0).integers(0, 288, CONTEXT)]
CONFIG = tiny_config(head_dim=24, dim=96, context_length=256)  # 24: padded for all kv_types
PLACES = {"magic": 0, "version": 8, "count": 12, "model": 16, "kind": 48, "origin": 80}


def load(path: Path, **options: Any) -> Model:
    return edgellama.load(path, **{"context": CONTEXT, "threads": 1} | options)


def saved(model: Model, to: Path, tokens: int) -> Path:
    with model.session() as session:
        if tokens:
            session.forward(IDS[:tokens])
        session.save(to)
    return to


def forged(path: Path, ids: dict[int, int] | None = None, **fields: Any) -> Path:
    """The file with other fields and ids, and checksums that are right for them."""
    data = bytearray(path.read_bytes())
    for name, value in fields.items():
        raw = struct.pack("<I", value) if isinstance(value, int) else value.ljust(32)[:32]
        data[PLACES[name] : PLACES[name] + len(raw)] = raw
    data[HEADER.size : HEADER.size + DIGEST] = hashlib.sha256(data[: HEADER.size]).digest()
    for place, token in (ids or {}).items():
        struct.pack_into("<I", data, HEADER.size + DIGEST + 4 * place, token)
    data[-DIGEST:] = hashlib.sha256(data[:-DIGEST]).digest()
    out = path.with_name("forged")
    out.write_bytes(data)
    return out
