"""SentencePiece's `tokenizer.model`, read without the library: pieces, scores, types, switches.

Knows nothing about the other files of a checkpoint. Source: sentencepiece_model.proto of the
SentencePiece library (field numbers and defaults).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgellama.config import MOST_VOCAB
from edgellama.errors import shown
from edgellama.quantize.draft import Draft, refuse, unsupported
from edgellama.quantize.protobuf import Field, Message
from edgellama.vocab import BYTE, BYTE_TOKEN, LONGEST_TOKEN, NORMAL

PIECE, TRAINER, NORMALIZER = 1, 2, 3  # ModelProto
MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
Reader = Callable[[Field, str], Any]


def read_sentencepiece(data: bytes, path: Path) -> Draft:
    """The vocabulary of a SentencePiece BPE model.

    Raises TokenizerError at the byte that is damaged; UnsupportedModelError, naming the switch,
    for what neither GGUF files nor this runtime express: unigram models, Unicode normalization,
    the space as a suffix.
    """
    message = Message(data, path)
    draft = Draft("llama", path, [], [])
    trainer: dict[str, Any] = {}
    normalizer: dict[str, Any] = {}
    for field in message.fields():
        if field.number == PIECE:
            _add_piece(message, field, draft)
        elif field.number == TRAINER:
            trainer |= _switches(message, field, "trainer_spec", _trainer_fields(message))
        elif field.number == NORMALIZER:
            normalizer |= _switches(message, field, "normalizer_spec", _normalizer_fields(message))
    if not draft.tokens:
        refuse("it holds no pieces", path, f"byte {len(data)}")
    _check_switches(trainer, normalizer, path)
    draft.special = _special_ids(trainer, len(draft.tokens), path)
    draft.add_space_prefix = normalizer.get("add_dummy_prefix", True)
    draft.remove_extra_whitespaces = normalizer.get("remove_extra_whitespaces", True)
    return draft


def _add_piece(message: Message, outer: Field, draft: Draft) -> None:
    i = len(draft.tokens)
    if i >= MOST_VOCAB:
        message.refuse(f"more than {MOST_VOCAB} pieces", outer.at)
    text, score, kind = "", 0.0, NORMAL
    for field in message.inner(outer, f"piece {i}"):
        if field.number == 1:
            text = message.text(field, f"the text of piece {i}", LONGEST_TOKEN)
        elif field.number == 2:
            score = message.float32(field, f"the score of piece {i}")
        elif field.number == 3:
            kind = message.integer(field, f"the type of piece {i}")
    if not text:
        message.refuse(f"piece {i} has no text", outer.at)
    if not math.isfinite(score):
        message.refuse(f"the score of piece {i}, {shown(text)}, is {score}", outer.at, score)
    if not NORMAL <= kind <= BYTE:  # the enumeration is that of GGUF
        message.refuse(f"piece {i}, {shown(text)}, has type {kind}", outer.at, kind)
    if kind == BYTE and not BYTE_TOKEN.fullmatch(text):
        message.refuse(f"piece {i}, {shown(text)}, is no byte <0x00>..<0xFF>", outer.at, text)
    draft.tokens.append(text)
    draft.scores.append(score)
    draft.types.append(kind)


def _trainer_fields(message: Message) -> dict[int, tuple[str, Reader]]:
    return {
        3: ("model_type", message.integer),
        24: ("treat_whitespace_as_suffix", message.flag),
        40: ("unk", message.integer),
        41: ("bos", message.integer),
        42: ("eos", message.integer),
        43: ("pad", message.integer),
    }


def _normalizer_fields(message: Message) -> dict[int, tuple[str, Reader]]:
    def text(field: Field, name: str) -> str:
        return message.text(field, name, LONGEST_TOKEN)

    def size(field: Field, name: str) -> int:
        return field.end - field.start

    return {
        1: ("name", text),
        2: ("charsmap", size),
        3: ("add_dummy_prefix", message.flag),
        4: ("remove_extra_whitespaces", message.flag),
        5: ("escape_whitespaces", message.flag),
    }


def _switches(
    message: Message, outer: Field, name: str, known: dict[int, tuple[str, Reader]]
) -> dict[str, Any]:
    found = {}
    for field in message.inner(outer, name):
        if field.number in known:
            key, reader = known[field.number]
            found[key] = reader(field, f"{name}.{key}")
    return found


def _check_switches(trainer: dict[str, Any], normalizer: dict[str, Any], path: Path) -> None:
    kind = trainer.get("model_type", 1)  # a file without trainer_spec is a unigram model
    if MODEL_TYPES.get(kind) != "BPE":
        name = MODEL_TYPES.get(kind, f"of type {kind}")
        unsupported(f"a {name} model; supported: BPE", path, "trainer_spec.model_type", kind)
    if normalizer.get("charsmap"):
        name = normalizer.get("name", "")
        problem = f"Unicode normalization {shown(name)} is not supported; supported: identity"
        unsupported(problem, path, "normalizer_spec.name", name)
    if trainer.get("treat_whitespace_as_suffix"):
        where = "trainer_spec.treat_whitespace_as_suffix"
        unsupported("spaces after words are not supported", path, where, True)
    if not normalizer.get("escape_whitespaces", True):
        where = "normalizer_spec.escape_whitespaces"
        unsupported("unescaped spaces are not supported", path, where, False)


def _special_ids(trainer: dict[str, Any], size: int, path: Path) -> dict[str, int]:
    found = {}
    for name, default in {"unk": 0, "bos": 1, "eos": 2, "pad": -1}.items():
        value = trainer.get(name, default)
        if not -1 <= value < size:  # -1 is SentencePiece's word for none
            problem = f"{shown(value)} is not the id of one of {size} pieces"
            refuse(problem, path, f"trainer_spec.{name}_id")
        if value >= 0:
            found[name] = value
    return found
