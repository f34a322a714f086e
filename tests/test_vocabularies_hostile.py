"""Odd and damaged folders of tokenizer files: nothing but our errors, and no guess."""

import json
import random
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizerfiles as files
from tokenizerfiles import PIECES, added, byte_fallback, byte_level, tokenizer

from edgellama.bpe import alphabet
from edgellama.errors import EdgeLlamaError, ParameterError, TokenizerError, UnsupportedModelError
from edgellama.quantize.tiktoken import draft_of_ranks, read_ranks
from edgellama.quantize.vocabularies import tokenizer_metadata
from edgellama.tokenizer import tokenizer_from_gguf
from edgellama.vocab import CONTROL

ROWS = len(PIECES)
PATH = Path("tokenizer.model")
Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path) -> Refuse:
    return partial(files.refusal, tmp_path)


GOOD = files.sentencepiece()


def test_k11_smallest_vocabularies(tmp_path: Path) -> None:
    found = tokenizer(
        tmp_path, 1, tokenizer_model=files.sentencepiece([("x", 0.0, 1)], {40: -1, 41: -1, 42: -1})
    )
    with pytest.raises(TokenizerError, match="no token for"):
        found.encode("y")
    pieces = [("<unk>", 0.0, 2), ("x", 0.0, 1)]
    content = {"tokenizer_model": files.sentencepiece(pieces, {41: -1, 42: -1})}
    assert tokenizer(tmp_path, 2, **content).encode("xyz") == [0, 1, 0]


@pytest.mark.parametrize("name", ["tokenizer_model", "tokenizer_json"])
def test_k12_k13_long_text_and_bad_ids(name: str, tmp_path: Path) -> None:
    """One letter or space 100,000 times, controls, all kinds of marks; ids out of range."""
    content = GOOD if name == "tokenizer_model" else byte_level()
    found = tokenizer(tmp_path, ROWS, **{name: content})
    for text in ("a" * 100_000, " " * 100_000, "ab" * 50_000, "\0\u202e\u200d\U0010ffff" * 999):
        ids = found.encode(text)
        assert found.decode(ids) == text
    for bad in ("\ud800", "a\udcff"):
        with pytest.raises(ParameterError, match="lone surrogate"):
            found.encode(bad)
    for token in (ROWS, -1, True, 1.0):
        with pytest.raises(ParameterError, match="token id"):
            found.decode([token])  # type: ignore[list-item]


def test_k14_control_tokens_in_plain_text_stay_text(tmp_path: Path) -> None:
    names = {"<|eot_id|>": 265, "[INST]": 266}
    decoder = {str(i): added(0, text) for text, i in names.items()}
    content = {
        "tokenizer_json": byte_level(),
        "tokenizer_config_json": {"added_tokens_decoder": decoder},
    }
    found = tokenizer(tmp_path, 267, **content)
    for text, token in names.items():
        assert token not in found.encode(f"a{text}b")
        assert found.decode(found.encode(f"a{text}b")) == f"a{text}b"
        assert found.encode(text, special=True) == [token]


def test_marked_as_no_special_but_named_like_one(tmp_path: Path) -> None:
    """As llama.cpp's converter: "<|...|>" steers the model, whatever the file says."""
    content = {"tokenizer_json": byte_level(), "added_tokens_json": {"<|eot_id|>": 265}}
    metadata = tokenizer_metadata(files.write(tmp_path, **content), 266, [])
    assert metadata["tokenizer.ggml.token_type"][265] == CONTROL


RANKS = [bytes([byte]) for byte in range(256)] + [b"ab"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (files.ranks(RANKS[:300])[:-3] + b"xx\n", "line 257: "),
        (files.ranks(RANKS) + b"YWI= 257\n", "line 258: b'ab' has the rank 256 already"),
        (files.ranks(RANKS) + b"YWM= 258\n", "line 258: rank 258; expected 257"),
        (files.ranks(RANKS) + b"YWM=\n", "is not base64, a space and a number"),
        (files.ranks(RANKS) + b"YWM 257\n", "line 258: "),
        (files.ranks(RANKS) + b"\n", "line 258: "),
        (files.ranks(RANKS[1:]), "no token for the byte 0x00"),
        (files.ranks([*RANKS, b"a" * 1025]), "line 258: a token of 1025 bytes; expected 1..1024"),
    ],
)
def test_ranks(data: bytes, said: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        read_ranks(data, PATH)
    assert str(caught.value).startswith("tokenizer.model: ")
    assert said in str(caught.value)


def test_ranks_of_another_model(refuse: Refuse) -> None:
    text = refuse(UnsupportedModelError, tokenizer_model=files.ranks(RANKS))
    assert "257 ranks; only LLaMA 3's 128000 are known" in text


def test_too_few_rows_and_missing_files(refuse: Refuse, tmp_path: Path) -> None:
    text = refuse(rows=ROWS - 1, tokenizer_model=GOOD)
    assert f"token {ROWS - 1}, '\\xe9', has no row: the embedding has {ROWS - 1}" in text
    assert "there is neither a tokenizer.model nor a tokenizer.json" in refuse()
    assert "tekken.json" in refuse(UnsupportedModelError, tekken_json={})
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(EdgeLlamaError, match="folder"):
        tokenizer_metadata(tmp_path, ROWS, [])


def test_two_files_that_disagree(refuse: Refuse, tmp_path: Path) -> None:
    data = byte_fallback()
    ids = data["model"]["vocab"]
    ids["ab"], ids["bc"] = ids["bc"], ids["ab"]
    text = refuse(tokenizer_model=GOOD, tokenizer_json=data)
    assert "'ab' has the id 267, and 264 in tokenizer.model" in text
    tokenizer(tmp_path, ROWS, tokenizer_model=GOOD, tokenizer_json=byte_fallback())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"add_bos_token": 1}, "add_bos_token: found 1; expected true or false"),
        ({"chat_template": 5}, "chat_template: found "),
        ({"chat_template": [{"name": "default"}]}, "chat_template[0]: found "),
        ({"chat_template": "x" * (2**20 + 1)}, "at most 1048576 are allowed"),
        ({"added_tokens_decoder": []}, None),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder: found [1]"),
        ({"added_tokens_decoder": {"-1": {}}}, "the key is no id"),
        ({"added_tokens_decoder": {"3": 4}}, "4 is not an object"),
    ],
)
def test_files_beside(config: Any, said: str | None, refuse: Refuse, tmp_path: Path) -> None:
    if said is None:
        tokenizer(tmp_path, ROWS, tokenizer_model=GOOD, tokenizer_config_json=config)
    else:
        text = refuse(tokenizer_model=GOOD, tokenizer_config_json=config)
        assert text.startswith("tokenizer_config.json: ") and said in text


ODD = [None, True, -1, 2**64, 0.5, "", "a", "\ud800", [], {}, [[]], {"type": "BPE"}, "<0x00>"]


def spoilt(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with one part, anywhere inside, replaced, removed or doubled."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        copy = dict(value)
        if draw.random() < 0.1:
            del copy[key]
        else:
            copy[key] = spoilt(value[key], draw)
        return copy
    if isinstance(value, list) and value and draw.random() < 0.9:
        i = draw.randrange(len(value))
        return [*value[:i], spoilt(value[i], draw), *value[i + draw.randrange(2) :]]
    return draw.choice(ODD)


def flipped(data: bytes, draw: random.Random) -> bytes:
    spoiled = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(spoiled))
        kind = draw.randrange(4)
        if kind == 0:
            spoiled[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del spoiled[at : at + draw.randrange(1, 9)]
        elif kind == 2:
            spoiled[at:at] = draw.choice([b"\xff" * 9, b"\0", b'"', struct.pack("<d", 1e308)])
        else:
            del spoiled[max(at, 1) :]
    return bytes(spoiled)


CONFIG = {
    "added_tokens_decoder": {str(ROWS): added(0, "<|x|>"), str(ROWS + 1): added(0, "[Y]", False)},
    "bos_token": "<s>",
    "eos_token": {"content": "</s>"},
    "additional_special_tokens": ["[Y]"],
    "add_bos_token": True,
    "chat_template": [{"name": "default", "template": "x"}],
}
ENDS = {"eos_token_id": [1, 2], "bos_token_id": 1}


@pytest.mark.parametrize("seed", range(4))
def test_nothing_but_our_errors(seed: int, tmp_path: Path) -> None:
    """Seeded damage to every kind of file: what is accepted makes a tokenizer, else refused."""
    draw = random.Random(seed)
    outcomes = {True: 0, False: 0}
    for _ in range(150):
        content: dict[str, Any] = {
            "tokenizer_config_json": CONFIG,
            "generation_config_json": ENDS,
        }
        if draw.random() < 0.4:
            content["tokenizer_model"] = flipped(GOOD, draw)
        else:
            good = draw.choice([byte_level(), byte_fallback(), byte_level("llama-bpe")])
            raw = draw.random() < 0.3
            bad = flipped(json.dumps(good).encode(), draw) if raw else spoilt(good, draw)
            content["tokenizer_json"] = bad
        for beside in ("tokenizer_config_json", "generation_config_json"):
            if draw.random() < 0.3:
                content[beside] = spoilt(content[beside], draw)
        for file in tmp_path.iterdir():
            file.unlink()
        files.write(tmp_path, **content)
        try:
            found = tokenizer_from_gguf(tokenizer_metadata(tmp_path, ROWS + 3, []))
            found.decode(found.encode("abc <s> [Y] \u00e9", special=True))
            outcomes[True] += 1
        except EdgeLlamaError as error:
            assert str(error)
            outcomes[False] += 1
    assert outcomes[False] > 20 and outcomes[True] > 4


@pytest.mark.parametrize("seed", range(2))
def test_nothing_but_our_errors_from_ranks(seed: int) -> None:
    draw, good = random.Random(seed), files.ranks(RANKS)
    for _ in range(100):
        data = flipped(good, draw)
        try:
            draft = draft_of_ranks(read_ranks(data, PATH), PATH)
            assert len(draft.tokens) > 256 and set(draft.tokens[:256]) <= set(alphabet().values())
        except TokenizerError as error:
            assert str(error).startswith("tokenizer.model: ")
