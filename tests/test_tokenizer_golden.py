"""Token ids and texts must equal, exactly, those of the tokenizers the models were trained with."""

import json
from pathlib import Path
from typing import Any

import pytest
import vocabs

from edgellama.bpe import split
from edgellama.tokenizer import Tokenizer, tokenizer_from_gguf

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden.json").read_text())["cases"]
PRETOK = json.loads((DATA / "pretok_golden.json").read_text())["cases"]
DECODE = json.loads((DATA / "decode_golden.json").read_text())
PRE_TOKENIZERS = {"llama3": "llama-bpe", "smollm2": "smollm"}
MISSING_BYTES = bytes.fromhex("04 06 13 14 16 1d c0 c1 f1 f2 f5 f6 f7 f8 f9 fa fb fc fd fe ff")


def golden(name: str) -> list[tuple[str, str, dict[str, list[int]]]]:
    """(case, text, ids by kind) of one vocabulary; the two forms of llama3 share their ids."""
    key = name.removesuffix("_ranks")
    return [(case["name"], case["text"], case[key]) for case in GOLDEN if key in case]


@pytest.fixture(scope="module", params=[name for name in vocabs.FILES if golden(name)])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(name: str, request: pytest.FixtureRequest) -> Tokenizer:
    return tokenizer_from_gguf(vocabs.metadata(name, request))


def test_plain_ids(name: str, tokenizer: Tokenizer) -> None:
    expected = {case: ids["plain"] for case, _, ids in golden(name)}
    assert len(expected) == 120
    assert {case: tokenizer.encode(text) for case, text, _ in golden(name)} == expected


def test_ids_with_special_tokens(name: str, tokenizer: Tokenizer) -> None:
    names = [
        tokenizer.token_text(i) for i in range(tokenizer.vocab_size) if tokenizer.is_control(i)
    ]
    for case, text, ids in golden(name):
        if "special" in ids or not any(special in text for special in names):
            expected = ids.get("special", ids["plain"])
            assert tokenizer.encode(text, special=True) == expected, case


def test_texts_come_back(name: str, tokenizer: Tokenizer) -> None:
    """Except where the reference itself loses something, and then exactly as it does."""
    lossy = DECODE["not_round_tripping"].get(name, [])
    expected = {case: text for case, text, _ in golden(name)}
    expected |= {case["name"]: case["decoded"] for case in lossy}
    if name == "smollm2":
        dropped = {byte: None for byte in MISSING_BYTES if byte < 0x80}
        expected["ctrl_all"] = expected["ctrl_all"].translate(dropped)
    for case, text, ids in golden(name):
        assert tokenizer.decode(ids["plain"]) == expected[case], case
        assert streamed(tokenizer, ids["plain"]) == expected[case], case
        if "special" in ids:
            assert tokenizer.decode(ids["special"], special=True) == text, case


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join([stream.push(i) for i in ids] + [stream.flush()])


def test_decoding_single_pieces(request: pytest.FixtureRequest) -> None:
    tokenizer = tokenizer_from_gguf(vocabs.metadata("llama2", request))
    for case in DECODE["llama2_low_level"]:
        assert [tokenizer.token_text(i) for i in case["ids"]] == case["pieces"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        assert streamed(tokenizer, case["ids"]) == case["decoded"]


@pytest.mark.parametrize("model", PRE_TOKENIZERS)
def test_words_before_merging(model: str) -> None:
    texts = {case["name"]: case["text"] for case in GOLDEN}
    expected: dict[str, Any] = {case["name"]: case[model] for case in PRETOK}
    assert len(expected) == 120
    assert {case: split(texts[case], PRE_TOKENIZERS[model]) for case in expected} == expected


@pytest.mark.parametrize("name", ["mistral_v1", "mistral_v3", "openllama_v1"])
def test_sentencepiece_agrees(name: str, request: pytest.FixtureRequest) -> None:
    """The library itself on the same file, which knows user-defined pieces too (mistral_v3)."""
    path = vocabs.find(name)
    if path is None:
        pytest.skip(f"no file of {name}")
    sentencepiece = pytest.importorskip("sentencepiece")
    peer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = tokenizer_from_gguf(vocabs.metadata(name, request))
    texts = [case["text"] for case in GOLDEN]
    texts += [" ".join(texts[10:40]), "[INST] hi[/INST][TOOL_CALLS] x", "a[control_8]b\n\n\u2581"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == peer.encode(text)
        assert tokenizer.decode(ids) == peer.decode(ids)
