"""What a tokenizer does where its file is silent: as llama.cpp, which wrote most of the files."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny import _write_keys
from tinyvocabs import GPT2, LLAMA, MAKERS, gpt2, llama

from edgellama.gguf import open_gguf
from edgellama.tokenizer import Tokenizer, tokenizer_from_gguf
from edgellama.vocab import vocab_from_gguf

NAMELESS: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "unknown_token_id"))


def written(path: Path, metadata: dict[str, Any]) -> Path:
    """A file of a vocabulary alone, which llama.cpp reads with `vocab_only`."""
    writer = gguf.GGUFWriter(path, "llama")
    _write_keys(writer, metadata)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def read(path: Path) -> Tokenizer:
    with open_gguf(path) as file:
        return tokenizer_from_gguf(file.metadata)


@pytest.mark.parametrize(
    ("pre", "first"),
    [
        *[("llama-bpe", True), ("llama3", True), ("llama-v3", True)],
        *[("default", False), ("gpt-2", False), ("smollm", False), (None, False)],
    ],
)
def test_whether_bos_is_put_in_front(pre: str | None, first: bool) -> None:
    assert tokenizer_from_gguf(gpt2(pre=pre)).add_bos is first
    assert tokenizer_from_gguf(gpt2(pre=pre, add_bos_token=not first)).add_bos is not first
    assert not tokenizer_from_gguf(gpt2(pre=pre, bos_token_id=None)).add_bos


def special_ids(**changes: Any) -> tuple[int | None, int | None, int | None]:
    """(BOS, the first EOS, unknown) of a "llama" vocabulary without their keys."""
    vocab = vocab_from_gguf(llama(**NAMELESS | changes))
    return vocab.bos, vocab.eos[0] if vocab.eos else None, vocab.unk


def test_special_ids_that_are_not_named_are_the_usual_ones() -> None:
    assert special_ids() == special_ids(token_type=None) == (1, 2, 0)
    assert special_ids(bos_token_id=7, unknown_token_id=8) == (7, 2, 8)
    assert tokenizer_from_gguf(llama(**NAMELESS)).add_bos
    assert not tokenizer_from_gguf(llama(**NAMELESS, add_bos_token=False)).add_bos
    byte_level = vocab_from_gguf(gpt2(bos_token_id=None, eos_token_id=None))
    assert (byte_level.bos, byte_level.eos, byte_level.unk) == (None, (1,), None)


def test_another_token_in_the_usual_place_is_not_taken() -> None:
    """Trained without BOS: the piece that has its place must not open every text."""
    few = {"tokens": ["a", "b", "c", "\u2581"], "scores": [0.0] * 4, "token_type": [1] * 4}
    assert special_ids(**few) == (None, None, None)
    assert special_ids(**few | {"token_type": None}) == (1, 2, 0)
    assert special_ids(tokens=["<unk>"], scores=[0.0], token_type=[2]) == (None, None, 0)
    assert special_ids(eos_token_id=1) == (None, 1, 0)


SILENT: dict[str, tuple[str, dict[str, Any]]] = {
    **{str(pre): (GPT2, {"pre": pre}) for pre in ("llama-bpe", "llama3", "llama-v3")},
    **{str(pre): (GPT2, {"pre": pre}) for pre in ("default", "gpt-2", "smollm", None)},
}
SILENT |= {
    "llama": (LLAMA, NAMELESS),
    "llama, no types": (LLAMA, {**NAMELESS, "token_type": None}),
    "llama, eos named": (LLAMA, {**NAMELESS, "eos_token_id": 270}),
}


@pytest.mark.parametrize(("model", "changes"), SILENT.values(), ids=SILENT)
def test_llama_cpp_gives_the_same_ids(tmp_path: Path, model: str, changes: dict[str, Any]) -> None:
    peers = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path = written(tmp_path / "vocab.gguf", MAKERS[model](**changes))
    peer, tokenizer = peers.Llama(str(path), vocab_only=True, verbose=False), read(path)
    ids = tokenizer.encode("abc", bos=tokenizer.add_bos)
    assert ids == peer.tokenize(b"abc", add_bos=True, special=False)
    assert (tokenizer.bos, tokenizer.eos[0]) == (peer.token_bos(), peer.token_eos())
    peer.close()
