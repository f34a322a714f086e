"""Which spaces decoding drops at a text's start: those that SentencePiece drops."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizerfiles as files
from tiny import _write_keys
from tinyvocabs import LLAMA, llama, streamed, texts_of

from edgellama.quantize.vocabularies import tokenizer_metadata
from edgellama.tokenizer import Tokenizer, tokenizer_from_gguf
from edgellama.vocab import CONTROL, NORMAL, UNUSED, USER_DEFINED

S = files.SPACE
MORE: list[tuple[str, float, int]] = [
    (S * 3, 0.0, USER_DEFINED),
    (S + "[TOOL]", 0.0, USER_DEFINED),
    (S + "b", -20.0, UNUSED),
    ("<|eot_id|>", 0.0, CONTROL),
    (S * 2 + "a", -21.0, NORMAL),
]
PIECES = [*files.PIECES, *MORE]
# Those that a decoder may treat differently; every order of three of them is decoded.
CHOSEN = ["<s>", "<unk>", "<0x20>", "<0x61>", S, "a", S + "a", S * 2, *(each[0] for each in MORE)]
SWITCHES = list(product((False, True), repeat=2))  # add_dummy_prefix, remove_extra_whitespaces


def model(prefix: bool, trims: bool) -> bytes:
    return files.sentencepiece(PIECES, normalizer={3: int(prefix), 4: int(trims)})


def converted(folder: Path, prefix: bool, trims: bool) -> Tokenizer:
    files.write(folder, tokenizer_model=model(prefix, trims))
    return tokenizer_from_gguf(tokenizer_metadata(folder, len(PIECES), []))


def ids_of(texts: Sequence[str]) -> list[int]:
    names = [text for text, _, _ in PIECES]
    return [names.index(text) for text in texts]


@pytest.mark.parametrize(("prefix", "trims"), SWITCHES)
def test_sentencepiece_decodes_the_same(tmp_path: Path, prefix: bool, trims: bool) -> None:
    library = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    peer = library.SentencePieceProcessor(model_proto=model(prefix, trims))
    tokenizer = converted(tmp_path, prefix, trims)
    for texts in product(CHOSEN, repeat=3):
        ids = ids_of(texts)
        assert tokenizer.decode(ids) == peer.decode(ids), texts


@pytest.mark.parametrize(
    ("texts", "neither", "trims", "prefix", "both"),  # as SentencePiece 0.2.3 decodes them
    [
        ([S * 3, "a"], "   a", "  a", "  a", "  a"),
        ([S + "[TOOL]"], " [TOOL]", "[TOOL]", "[TOOL]", "[TOOL]"),
        (["<s>", S, S + "a"], "  a", "a", " a", "a"),
        ([S + "b", S], " b ", "b ", "b ", "b "),
        ([S + "a", S + "a"], " a a", "a a", "a a", "a a"),
        (["<0x20>", S + "a"], "  a", "  a", "  a", "  a"),
    ],
)
def test_the_spaces_that_are_dropped(
    tmp_path: Path, texts: list[str], neither: str, trims: str, prefix: str, both: str
) -> None:
    for switches, expected in zip(SWITCHES, (neither, trims, prefix, both), strict=True):
        tokenizer = converted(tmp_path, *switches)
        assert tokenizer.decode(ids_of(texts)) == expected, switches
        assert streamed(tokenizer, ids_of(texts)) == expected, switches
        assert tokenizer.decode(ids_of(texts), continuing=True) == neither, switches


def spaced() -> dict[str, Any]:
    """A user-defined piece of two spaces and one with a space inside, as converters write them."""
    metadata = llama()
    for key, value in (("tokens", ["   ", "a b"]), ("token_type", [4, 4]), ("scores", [0.0, 0.0])):
        metadata[f"tokenizer.ggml.{key}"] = metadata[f"tokenizer.ggml.{key}"] + value
    return metadata


def test_user_defined_pieces_may_have_plain_spaces() -> None:
    """In a GGUF file they stand for U+2581 too; SentencePiece itself would never match them."""
    tokenizer = tokenizer_from_gguf(spaced())
    assert texts_of(tokenizer, tokenizer.encode("ca b")) == [S, "c", "a b"]
    for text in ("  ", "   x", "a b", " a b   "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert texts_of(tokenizer, tokenizer.encode("  a")) == ["   ", "a"]


def test_llama_cpp_matches_them_too(tmp_path: Path) -> None:
    peers = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", LLAMA)
    _write_keys(writer, spaced())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    peer = peers.Llama(str(tmp_path / "vocab.gguf"), vocab_only=True, verbose=False)
    tokenizer = tokenizer_from_gguf(spaced())
    for text in ("ca b", "c   c"):
        token = peer.tokenize(text.encode(), add_bos=False, special=False)[2]
        assert token in tokenizer.encode(text) and tokenizer.token_text(token) in text
    peer.close()
