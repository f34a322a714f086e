"""Writes tokenizer files as checkpoints have them: small ones, and real ones rebuilt from GGUF."""

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgellama.bpe import alphabet
from edgellama.errors import EdgeLlamaError, TokenizerError
from edgellama.quantize.pretokenizers import LLAMA3
from edgellama.quantize.vocabularies import tokenizer_metadata
from edgellama.tokenizer import Tokenizer, tokenizer_from_gguf
from edgellama.vocab import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

SPACE = "\u2581"
BYTES = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
WORDS = (SPACE, "a", "b", "c", SPACE + "a", "ab", SPACE + "ab", "abc", "bc", SPACE * 2, "\u00e9")
PIECES = [
    ("<unk>", 0.0, UNKNOWN),
    ("<s>", 0.0, CONTROL),
    ("</s>", 0.0, CONTROL),
    *BYTES,
    *((text, -float(i), NORMAL) for i, text in enumerate(WORDS)),
]
MERGES = ["a b", "b c", "ab c", "\u0120 a", "\u0120 \u0120", "1 2"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
CUTS: dict[str, Any] = {
    "gpt-2": BYTE_LEVEL | {"use_regex": True},
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            BYTE_LEVEL | {"use_regex": True},
        ],
    },
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": LLAMA3},
                "behavior": "Isolated",
                "invert": False,
            },
            BYTE_LEVEL | {"use_regex": False},
        ],
    },
}
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
FALLBACK = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def varint(value: int) -> bytes:
    value %= 2**64
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, value: int | float | bytes | str) -> bytes:
    """A field of a protobuf message, its wire type chosen by the value's type."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece(text: str | bytes, score: float = 0.0, kind: int = NORMAL) -> bytes:
    return field(1, field(1, text) + field(2, score) + field(3, kind))


def sentencepiece(
    pieces: Sequence[tuple[str, float, int]] = PIECES,
    trainer: Mapping[int, Any] | None = None,
    normalizer: Mapping[int, Any] | None = None,
) -> bytes:
    """A `tokenizer.model`; `trainer` and `normalizer` override fields by number, None: no field."""
    trainers = {3: 2, 35: 1, 40: 0, 41: 1, 42: 2, 43: -1} | dict(trainer or {})
    normalizers = {1: "identity", 2: b"", 3: 1, 4: 0, 5: 1} | dict(normalizer or {})
    data = b"".join(piece(*each) for each in pieces)
    for number, values in ((2, trainers), (3, normalizers)):
        fields = (field(n, value) for n, value in values.items() if value is not None)
        data += field(number, b"".join(fields))
    return data


def ranks(tokens: Sequence[bytes]) -> bytes:
    lines = (base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    return b"".join(lines)


def added(token: int, text: str, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": text, "special": special} | flags


def byte_level(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    """A byte-level tokenizer.json: 2 control tokens, 256 bytes, the results of MERGES, a tool."""
    results = [line.replace(" ", "") for line in MERGES]
    texts = ["<|im_start|>", "<|im_end|>", *alphabet().values(), *results]
    model = {
        "type": "BPE",
        "vocab": {text: i for i, text in enumerate(texts)},
        "merges": MERGES,
        "ignore_merges": pre == "llama-bpe",
    }
    tokens = [added(i, texts[i]) for i in range(2)] + [added(len(texts), "[TOOL]", False)]
    return document(model, CUTS[pre], None, BYTE_LEVEL, tokens) | changes


def byte_fallback(
    pieces: Sequence[tuple[str, float, int]] = PIECES, *, by_length: bool = False, **changes: Any
) -> dict[str, Any]:
    """The tokenizer.json that Hugging Face's library makes of a SentencePiece model.

    `by_length` sorts the merges of pieces with equal scores as its later versions do.
    """
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    merges = []
    for text, score, kind in pieces:
        for i in range(1, len(text)) if kind == NORMAL else ():
            left, right = text[:i], text[i:]
            if left in ids and right in ids:
                order = (-len(left), -len(right)) if by_length else (ids[text], ids[left])
                merges.append((-score, *order, [left, right]))
    merges.sort(key=lambda merge: merge[:3])
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": ids,
        "merges": [pair for *_, pair in merges],
    }
    tokens = [
        added(i, text) for i, (text, _, kind) in enumerate(pieces) if kind in (UNKNOWN, CONTROL)
    ]
    normalizer = {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}
    return document(model, None, normalizer, FALLBACK, tokens) | changes


def document(
    model: Any, pre_tokenizer: Any, normalizer: Any, decoder: Any, tokens: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "added_tokens": tokens,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def rebuilt(metadata: Mapping[str, Any]) -> tuple[str, bytes]:
    """(file name, bytes) of a checkpoint's tokenizer that has the vocabulary of GGUF metadata."""
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    typed = list(zip(keys["tokens"], keys["token_type"], strict=True))
    if keys["model"] == "llama":
        pieces = [
            (text, score, kind) for (text, kind), score in zip(typed, keys["scores"], strict=True)
        ]
        spaces = {
            3: int(keys.get("add_space_prefix", True)),
            4: int(keys.get("remove_extra_whitespaces", False)),
        }
        return "tokenizer.model", sentencepiece(pieces, normalizer=spaces)
    model = {
        "type": "BPE",
        "vocab": {text: i for i, (text, _) in enumerate(typed)},
        "merges": [line.split(" ") for line in keys["merges"]],
        "ignore_merges": keys["pre"] == "llama-bpe",
    }
    tokens = [
        added(i, text, kind == CONTROL)
        for i, (text, kind) in enumerate(typed)
        if kind in (CONTROL, USER_DEFINED)
    ]
    data = document(model, CUTS[keys["pre"]], None, BYTE_LEVEL, tokens)
    return "tokenizer.json", json.dumps(data).encode()


def write(folder: Path, **files: Any) -> Path:
    """Fill `folder`: keyword `tokenizer_json` is tokenizer.json, a dict is written as JSON."""
    folder.mkdir(exist_ok=True)
    for key, content in files.items():
        name = ".".join(key.rsplit("_", 1))
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(data)
    return folder


def tokenizer(folder: Path, rows: int, **files: Any) -> Tokenizer:
    """The tokenizer that a folder of these files gives a model of so many rows."""
    return tokenizer_from_gguf(tokenizer_metadata(write(folder, **files), rows, []))


def refusal(
    folder: Path, kind: type[EdgeLlamaError] = TokenizerError, rows: int = len(PIECES), **files: Any
) -> str:
    """The message with which a folder of these files is refused; the folder is emptied then."""
    write(folder, **files)
    with pytest.raises(kind) as caught:
        tokenizer_metadata(folder, rows, [])
    text = str(caught.value)
    assert text.isascii() and text.isprintable() and len(text) < 1500
    for file in folder.iterdir():
        file.unlink()
    return text
