"""Finds real vocabularies for the tokenizer tests and turns them into GGUF metadata.

None is kept in the repository. Looked for: the folder EDGELLAMA_TEST_VOCABS, the folder
EDGELLAMA_TEST_VOCABS_EXTRA (see fetch_vocabs.py), installed packages, the default model's file.
"""

import base64
import json
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgellama.bpe import alphabet
from edgellama.gguf import open_gguf
from edgellama.vocab import CONTROL, NORMAL

FOLDERS = ("EDGELLAMA_TEST_VOCABS", "EDGELLAMA_TEST_VOCABS_EXTRA")
FILES = {  # vocabulary -> file names that hold it, and the same inside an installed package
    "llama2": ("ggml-vocab-llama-spm.gguf", "llama2.tokenizer.model"),
    "llama3": ("ggml-vocab-llama-bpe.gguf",),
    "llama3_ranks": ("llama3.tokenizer.model", "llama_models:llama3/tokenizer.model"),
    "smollm2": ("smollm2.vocab.json", "smollm2.tokenizer.json"),
    "mistral_v1": ("mistral_v1.tokenizer.model", "mistral_common:data/tokenizer.model.v1"),
    "mistral_v3": (
        "mistral_v3.tokenizer.model",
        "mistral_common:data/mistral_instruct_tokenizer_240323.model.v3",
    ),
    "openllama_v1": ("openllama_v1.tokenizer.model",),
    "openllama_v2": ("openllama_v2.tokenizer.model",),
}


def find(name: str) -> Path | None:
    """The file of a vocabulary, or None."""
    folders = [Path(os.environ[key]) for key in FOLDERS if os.environ.get(key)]
    for file in FILES[name]:
        package, _, inside = file.rpartition(":")
        spec = find_spec(package) if package else None
        places = (
            folders
            if not package
            else map(Path, spec.submodule_search_locations or ())
            if spec
            else ()
        )
        for place in places:
            if (place / inside).is_file():
                return place / inside
    return None


def metadata(name: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """GGUF metadata of a vocabulary; skips the test, saying why, where it is not at hand.

    "llama2+16" is Llama 2's with what Code Llama's has behind it.
    """
    if name == "llama2+16":
        return _with_code_llamas(metadata("llama2", request))
    path = find(name)
    if path is None and name == "smollm2":
        path = request.getfixturevalue("default_model")
    if path is None:
        pytest.skip(f"no {' or '.join(FILES[name])} in {' or '.join(FOLDERS)}")
    return _reader(name, path)(path)


def _with_code_llamas(llama2: dict[str, Any]) -> dict[str, Any]:
    named = {7: "\u2581<PRE>", 8: "\u2581<SUF>", 9: "\u2581<MID>", 10: "\u2581<EOT>", 15: "<step>"}
    more = {
        "tokens": [named.get(i, f"<unused {i}>") for i in range(16)],
        "scores": [0.0] * 16,
        "token_type": [CONTROL] * 16,
    }
    joined = {key: [*llama2[f"tokenizer.ggml.{key}"], *values] for key, values in more.items()}
    return llama2 | {f"tokenizer.ggml.{key}": values for key, values in joined.items()}


def _reader(name: str, path: Path) -> Callable[[Path], dict[str, Any]]:
    if path.suffix == ".gguf":
        return from_gguf
    if name == "llama3_ranks":
        return from_ranks
    if name == "smollm2":
        return from_vocab_json if path.name.endswith("vocab.json") else from_tokenizer_json
    return from_sentencepiece


def from_gguf(path: Path) -> dict[str, Any]:
    with open_gguf(path) as file:
        return dict(file.metadata)


def _keys(model: str, **values: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in ({"model": model} | values).items()}


def _smollm2(tokens: list[str], merges: list[str], control: set[int]) -> dict[str, Any]:
    return _keys(
        "gpt2",
        pre="smollm",
        tokens=tokens,
        merges=merges,
        token_type=[CONTROL if i in control else NORMAL for i in range(len(tokens))],
        bos_token_id=1,
        eos_token_id=2,
        add_bos_token=False,
    )


def from_vocab_json(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text())
    return _smollm2(data["tokens"], data["merges"], set(data["control_ids"]))


def from_tokenizer_json(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text())
    ids: dict[str, int] = dict(data["model"]["vocab"])
    control = {token["content"]: token["id"] for token in data["added_tokens"]}
    ids |= control
    lines = (m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"])
    return _smollm2(sorted(ids, key=ids.__getitem__), list(lines), set(control.values()))


def from_ranks(path: Path) -> dict[str, Any]:
    """LLaMA 3's ranks file: a merge for every way to halve a token, in the order of the tokens."""
    ranks = dict(map(_rank, path.read_text().splitlines()))
    letters = alphabet()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(ranks[a], ranks[b], a, b) for a, b in halves if a in ranks and b in ranks]
        merges += [f"{text(a)} {text(b)}" for _, _, a, b in sorted(known)]
    tokens = [text(token) for token in sorted(ranks, key=ranks.__getitem__)]
    names = list(_llama3_names())
    return _keys(
        "gpt2",
        pre="llama-bpe",
        tokens=tokens + names,
        merges=merges,
        token_type=[NORMAL] * len(tokens) + [CONTROL] * len(names),
        bos_token_id=len(tokens),
        eos_token_id=len(tokens) + 1,
    )


def _rank(line: str) -> tuple[bytes, int]:
    token, rank = line.split()
    return base64.b64decode(token), int(rank)


def _llama3_names() -> Iterator[str]:
    named = {
        0: "begin_of_text",
        1: "end_of_text",
        6: "start_header_id",
        7: "end_header_id",
        9: "eot_id",
    }
    reserved = 0
    for i in range(256):
        yield f"<|{named.get(i, f'reserved_special_token_{reserved}')}|>"
        reserved += i not in named


def from_sentencepiece(path: Path) -> dict[str, Any]:
    """A SentencePiece model, which is a protobuf message (field numbers: its ModelProto)."""
    pieces, normalizer = [], {}
    for field, value in _fields(path.read_bytes()):
        if field == 1:
            pieces.append(dict(_fields(value)))
        elif field == 3:
            normalizer = dict(_fields(value))
    return _keys(
        "llama",
        tokens=[piece[1].decode() for piece in pieces],
        scores=[piece.get(2, 0.0) for piece in pieces],
        token_type=[piece.get(3, NORMAL) for piece in pieces],
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        add_space_prefix=bool(normalizer.get(3, True)),
        remove_extra_whitespaces=bool(normalizer.get(4, True)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: varints, 32-bit floats, bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            value, at = _varint(data, at)
        elif tag & 7 == 5:
            value, at = memoryview(data[at : at + 4]).cast("f")[0], at + 4
        else:
            assert tag & 7 == 2
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        yield tag >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
