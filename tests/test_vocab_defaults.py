"""What a tokenizer does where its file is silent: as llama.cpp, which wrote most of the files."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny import _write_keys
from tinyvocabs import GPT2, MAKERS, gpt2

from edgellama.gguf import open_gguf
from edgellama.tokenizer import Tokenizer, tokenizer_from_gguf


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


SILENT: dict[str, tuple[str, dict[str, Any]]] = {
    **{str(pre): (GPT2, {"pre": pre}) for pre in ("llama-bpe", "llama3", "llama-v3")},
    **{str(pre): (GPT2, {"pre": pre}) for pre in ("default", "gpt-2", "smollm", None)},
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
