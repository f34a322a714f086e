"""Damaged, contradictory and unknown tokenizer files are refused by file, place and value."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizerfiles as files
from tokenizerfiles import PIECES, added, byte_fallback, byte_level, field, piece, tokenizer, varint

from edgellama.errors import EdgeLlamaError, ParameterError, TokenizerError, UnsupportedModelError
from edgellama.quantize.draft import tokens_by_id
from edgellama.quantize.vocabularies import tokenizer_metadata
from edgellama.vocab import BYTE, MOST_SPECIAL, NORMAL

ROWS = len(PIECES)
PATH = Path("tokenizer.model")
Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path) -> Refuse:
    return partial(files.refusal, tmp_path)


GOOD = files.sentencepiece()
GROUP = varint(7 << 3 | 3)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "byte 0: it holds no pieces"),
        (b"\x0a", "byte 1: a varint without an end"),
        (GOOD + b"\xff" * 3, f"byte {len(GOOD)}: a varint without an end"),
        (b"\x0a" + b"\xff" * 9 + b"\x01" + b"x", "declares 18446744073709551615 bytes; 1 are left"),
        (b"\x0a" + varint(2**63) + b"x", f"byte 0: field 1 declares {2**63} bytes; 1 are left"),
        (b"\x0a" + b"\x80" * 10 + b"\x01", "byte 1: a varint without an end"),
        (b"\x0a" + b"\xff" * 9 + b"\x7f", "byte 1: a varint of more than 64 bits"),
        (GROUP + GOOD, "byte 0: field 7 has wire type 3, which is not allowed"),
        (varint(7 << 3 | 6) + GOOD, "byte 0: field 7 has wire type 6"),
        (b"\x02\x00", "byte 0: field number 0 is not allowed"),
        (field(1, 5), "byte 0: piece 0 has wire type 0; expected 2"),
        (field(1, field(1, 1.0)), "byte 2: the text of piece 0 has wire type 5; expected 2"),
        (field(1, field(2, 1)), "byte 2: the score of piece 0 has wire type 0; expected 5"),
        (files.sentencepiece([]), "it holds no pieces"),
        (GOOD + b"PK\x03\x04" + bytes(40), f"byte {len(GOOD) + 2}: field number 0"),
    ],
)
def test_k1_protobuf(data: bytes, said: str, refuse: Refuse) -> None:
    text = refuse(tokenizer_model=data)
    assert text.startswith("tokenizer.model: byte ")
    assert said in text


def test_k1_too_many_pieces(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by building 4 Mi of them; the limit is the same for GGUF files."""
    monkeypatch.setattr("edgellama.quantize.sentencepiece.MOST_VOCAB", 1000)
    data = piece("x") * 1001 + GOOD
    assert "more than 1000 pieces" in refuse(tokenizer_model=data)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainer": {3: None}}, "a unigram model; supported: BPE"),
        ({"trainer": {3: 1}}, "a unigram model"),
        ({"trainer": {3: 4}}, "a char model"),
        ({"trainer": {3: 2**40}}, "of type 1099511627776"),
        ({"trainer": {24: 1}}, "treat_whitespace_as_suffix"),
        ({"normalizer": {1: "nmt_nfkc", 2: b"\1\2"}}, "'nmt_nfkc' is not supported"),
        ({"normalizer": {5: 0}}, "escape_whitespaces"),
    ],
)
def test_k1_switches_that_change_the_ids(
    changes: dict[str, Any], said: str, refuse: Refuse
) -> None:
    data = files.sentencepiece(**changes)
    assert said in refuse(UnsupportedModelError, tokenizer_model=data)


def test_k1_without_trainer_spec(refuse: Refuse) -> None:
    data = b"".join(piece(*each) for each in PIECES)
    assert "trainer_spec.model_type: a unigram model" in refuse(
        UnsupportedModelError, tokenizer_model=data
    )


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (piece("x", float("nan")), f"the score of piece {ROWS}, 'x', is nan"),
        (piece("x", float("-inf")), "is -inf"),
        (piece("abc"), f"[{ROWS}] is 'abc'; expected every token once"),
        (piece(""), f"piece {ROWS} has no text"),
        (field(1, b""), f"piece {ROWS} has no text"),
        (piece("x" * 10_000_000), "has 10000000 bytes; at most 65536 are allowed"),
        (piece(b"\xff\xfe"), "is not UTF-8"),
        (piece(b"\xed\xa0\x80"), "is not UTF-8"),
        (piece("x", 0.0, 0), f"piece {ROWS}, 'x', has type 0"),
        (piece("x", 0.0, 7), "has type 7"),
        (piece("x", 0.0, -1), "has type -1"),
    ],
)
def test_k2_pieces(bad: bytes, said: str, refuse: Refuse) -> None:
    text = refuse(rows=ROWS + 1, tokenizer_model=GOOD + bad)
    assert said in text
    assert text.startswith("tokenizer.model: ")


@pytest.mark.parametrize("bad", ["<0x-1>", "<0xZZ>", "<0x100>", "<0x0>", "<0xab>", "0xAB"])
def test_k3_byte_pieces(bad: str, refuse: Refuse, tmp_path: Path) -> None:
    pieces = [(bad if text == "<0x41>" else text, *rest) for text, *rest in PIECES]
    text = refuse(tokenizer_model=files.sentencepiece(pieces))
    assert f"piece 68, '{bad}', is no byte <0x00>..<0xFF>" in text
    data = byte_fallback()  # a tokenizer.json has no types: what does not match is a word
    data["model"]["vocab"][bad] = ROWS
    metadata = tokenizer_metadata(files.write(tmp_path, tokenizer_json=data), ROWS + 1, [])
    assert metadata["tokenizer.ggml.token_type"][ROWS] == NORMAL
    assert list(metadata["tokenizer.ggml.token_type"]).count(BYTE) == 256


def test_k3_fewer_bytes_and_doubles(refuse: Refuse, tmp_path: Path) -> None:
    fewer = [each for each in PIECES if each[0] != "<0x41>"]
    found = tokenizer(tmp_path, ROWS - 1, tokenizer_model=files.sentencepiece(fewer))
    assert found.encode("A")[1:] == [0]  # unknown, not another byte
    doubled = [*PIECES, ("<0x41>", 0.0, BYTE)]
    text = refuse(rows=ROWS + 1, tokenizer_model=files.sentencepiece(doubled))
    assert f"[{ROWS}] is '<0x41>'; expected every token once" in text


def test_k4_what_is_written_has_the_types_that_readers_expect(tmp_path: Path) -> None:
    """Element types of 4 bytes, one entry a token; wrong ones in GGUF files: tokenizer tests."""
    for content in ({"tokenizer_model": GOOD}, {"tokenizer_json": byte_fallback()}):
        metadata = tokenizer_metadata(files.write(tmp_path, **content), ROWS, [])
        tokens = metadata["tokenizer.ggml.tokens"]
        scores, types = (metadata[f"tokenizer.ggml.{name}"] for name in ("scores", "token_type"))
        assert (scores.typecode, types.typecode) == ("f", "i")
        assert len(tokens) == len(scores) == len(types) == ROWS
        assert set(map(type, tokens)) == {str}


def test_k5_sizes(refuse: Refuse, tmp_path: Path) -> None:
    assert "is not an object of tokens and ids" in refuse(
        tokenizer_json=byte_level(model={"vocab": {}, "merges": []})
    )
    with pytest.raises(TokenizerError, match="beyond 1 tokens"):
        tokens_by_id({"a": 4 * 2**20}, PATH, "model.vocab")
    for rows in (0, -1, 2**40, True, "3"):
        with pytest.raises(ParameterError, match="vocab_rows"):
            tokenizer_metadata(tmp_path, rows, [])  # type: ignore[arg-type]
    raw = json.dumps(byte_level()).encode().replace(b'"ab"', b'"\xff"')
    assert "not UTF-8" in refuse(rows=265, tokenizer_json=raw)


def lone_surrogate() -> dict[str, Any]:
    data = byte_level()
    data["model"]["vocab"]["\ud800"] = 265
    return data


def test_k5_lone_surrogates(refuse: Refuse) -> None:
    text = refuse(rows=266, tokenizer_json=lone_surrogate())
    assert "[265] is '\\ud800'; expected valid UTF-8" in text
    template = {"chat_template": "a\udc80"}
    text = refuse(rows=265, tokenizer_json=byte_level(), tokenizer_config_json=template)
    assert "lone surrogate" in text


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("a zz", "model.merges[2]: 'a zz' needs the token 'zz', which is not there"),
        ("ab", "model.merges[2]: 'ab' is not a pair of tokens"),
        ("a b c", "is not a pair of tokens"),
        (" ab", "needs the token ''"),
        ("a b", "model.merges[2]: 'a b' stands at [0] already"),
        ("c c", "needs the token 'cc'"),
        (["a", "b", "c"], "is not a pair of tokens"),
        (["a", 1], "is not a pair of tokens"),
        (7, "model.merges[2]: 7 is not a pair"),
        (None, "model.merges[2]: None is not a pair"),
    ],
)
def test_k6_merges(bad: Any, said: str, refuse: Refuse) -> None:
    data = byte_level()
    data["model"]["merges"] = [*files.MERGES[:2], bad, *files.MERGES[2:]]
    text = refuse(rows=265, tokenizer_json=data)
    assert text.startswith("tokenizer.json: ")
    assert said in text


def test_k6_lists(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in (None, {}, "a b", 5):
        data = byte_level()
        data["model"]["merges"] = bad
        assert "model.merges: " in refuse(rows=265, tokenizer_json=data)
    monkeypatch.setattr("edgellama.quantize.tokenizer_json.MOST_MERGES", 5)
    assert "6 is not a list of 0..5 merges" in refuse(rows=265, tokenizer_json=byte_level())


def test_k6_merges_that_no_sentencepiece_model_has(refuse: Refuse) -> None:
    data = byte_fallback()
    data["model"]["merges"].remove(["a", "bc"])
    text = refuse(UnsupportedModelError, tokenizer_json=data)
    assert "no merge joins 'a' and 'bc', though 'abc' is a token" in text


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    parts = [step | changes, files.BYTE_LEVEL | {"use_regex": False}]
    return {"type": "Sequence", "pretokenizers": parts}


@pytest.mark.parametrize(
    "step",
    [
        split("(a+)+$"),
        split("(x*)*y"),
        split("(?<=(a|aa)+)b"),
        split("x" * 1_000_000),
        split(files.LLAMA3 + "|"),
        split(files.LLAMA3.replace("{1,3}", "")),
        split(files.LLAMA3, behavior="Removed"),
        split(files.LLAMA3, invert=True),
        {"type": "Whitespace"},
        files.BYTE_LEVEL | {"add_prefix_space": True},
        {"type": "Digits", "individual_digits": True},
        {"type": "Metaspace", "replacement": "_", "split": False},
        {"type": "Metaspace", "replacement": files.SPACE},
        None,
    ],
)
def test_k7_unknown_pre_tokenizers(step: Any, refuse: Refuse) -> None:
    text = refuse(UnsupportedModelError, rows=265, tokenizer_json=byte_level(pre_tokenizer=step))
    assert text.startswith("tokenizer.json: pre_tokenizer: normalizer and pre-tokenizer are ")
    assert "supported: GPT-2's pattern ('gpt-2')" in text
    if step:
        kind = "Split" if "pretokenizers" in step else step["type"]
        assert kind in text


@pytest.mark.parametrize(
    ("tokens", "kind", "said"),
    [
        ([added(264, "")], TokenizerError, "the content is ''; expected 1..65536 characters"),
        ([added(264, "x" * 70_000)], TokenizerError, "expected 1..65536 characters"),
        ([added(264, "a<|im_end|>b<|im_start|>")], None, ""),
        ([added(265, "[FAR]")], TokenizerError, "token 265, '[FAR]', has no row"),
        ([added(2**40, "[FAR]")], TokenizerError, "the id is 1099511627776; expected 0..4194303"),
        ([added(-1, "x")], TokenizerError, "the id is -1"),
        ([added(True, "x")], TokenizerError, "the id is True"),
        ([added(4, "clash")], TokenizerError, "the id 4 of 'clash' is that of"),
        ([added(264, "x"), added(264, "y")], TokenizerError, "the id 264 is 'y' here and 'x'"),
        ([added(264, "<|im_end|>")], TokenizerError, "expected every token once"),
        ([added(264, "ab")], TokenizerError, "expected every token once"),
        (["x"], TokenizerError, "added_tokens[0]: 'x' is not an object"),
        ({}, TokenizerError, "added_tokens: {} is not a list"),
        ([added(264, "x", "yes")], TokenizerError, "special is 'yes'"),
    ],
)
def test_k8_added_tokens(
    tokens: Any, kind: type[EdgeLlamaError] | None, said: str, refuse: Refuse, tmp_path: Path
) -> None:
    data = byte_level(added_tokens=tokens)
    if kind is None:
        found = tokenizer(tmp_path, 265, tokenizer_json=data)
        whole = "a<|im_end|>b<|im_start|>"
        assert found.encode("ab" + whole, special=True) == [*found.encode("ab"), 264]
    else:
        text = refuse(kind, rows=265, tokenizer_json=data)
        assert text.startswith("tokenizer.json: ")
        assert said in text


def test_k8_many_added_tokens(refuse: Refuse, tmp_path: Path) -> None:
    """50,000 of them take no quadratic time; more text than a matcher may hold is refused."""
    many = {f"<extra{i}>": 265 + i for i in range(50_000)}
    content = {"tokenizer_json": byte_level(), "added_tokens_json": many}
    found = tokenizer(tmp_path, 50_265, **content)
    assert found.encode("ab<extra49999>") == [*found.encode("ab"), 50_264]
    long = {"x" * 60_000 + str(i): 265 + i for i in range(MOST_SPECIAL // 60_000 + 1)}
    text = refuse(rows=265 + len(long), tokenizer_json=byte_level(), added_tokens_json=long)
    assert "special tokens of more than" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decoder": []}, "decoder: [] is no component with a type"),
        ({"decoder": None}, "decoder '' is not supported"),
        ({"decoder": {"type": "WordPiece"}}, "decoder 'WordPiece' is not supported"),
        ({"decoder": {"type": 5}}, "is no component with a type"),
        ({"decoder": {"type": "Sequence", "decoders": 3}}, "decoder.decoders: a Sequence of 3"),
        ({"normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"normalizer": [1]}, "normalizer: [1] is no component with a type"),
        ({"normalizer": {"type": "Replace", "pattern": 7}}, "lacks what a 'Replace' needs"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {}}}, "lacks what a 'Split' needs"),
        ({"post_processor": {"type": "RobertaProcessing"}}, "'RobertaProcessing' is not supported"),
        ({"post_processor": 4}, "post_processor: found 4"),
        ({"post_processor": {"type": "TemplateProcessing"}}, "post_processor.single: found None"),
        ({"model": {"type": "Unigram", "vocab": []}}, "model.type: 'Unigram' is not supported"),
        ({"model": []}, "model: [] is no model"),
        ({"model": {"type": ["BPE"]}}, "model.type: ['BPE'] is not supported"),
    ],
)
def test_k9_unknown_parts(changes: dict[str, Any], said: str, refuse: Refuse) -> None:
    text = refuse(EdgeLlamaError, rows=265, tokenizer_json=byte_level(**changes))
    assert said in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dropout", 0.1),
        ("continuing_subword_prefix", "##"),
        ("end_of_word_suffix", "</w>"),
        ("byte_fallback", True),
        ("ignore_merges", True),
    ],
)
def test_k9_model_options_that_change_the_ids(key: str, value: Any, refuse: Refuse) -> None:
    data = byte_level()
    data["model"][key] = value
    text = refuse(UnsupportedModelError, rows=265, tokenizer_json=data)
    assert f"tokenizer.json: model.{key}: " in text


@pytest.mark.parametrize("bad", [ROWS, -1, 2**70, True, 1.0, "1", [ROWS], [[1]], {}])
@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_k10_ids_out_of_range(bad: Any, file: str, refuse: Refuse) -> None:
    content = {"tokenizer_model": GOOD, f"{file}_json": {"eos_token_id": bad}}
    text = refuse(**content)
    assert text.startswith(f"{file}.json: eos_token_id: found ")
    assert f"expected 0..{ROWS - 1}" in text


@pytest.mark.parametrize("field_number", [40, 41, 42, 43])
@pytest.mark.parametrize("bad", [ROWS, -2, 2**62])
def test_k10_ids_of_the_model_file(field_number: int, bad: int, refuse: Refuse) -> None:
    data = files.sentencepiece(trainer={field_number: bad})
    assert f"{bad} is not the id of one of {ROWS} pieces" in refuse(tokenizer_model=data)


def test_k10_names_without_ids(tmp_path: Path, refuse: Refuse) -> None:
    notes: list[str] = []
    content = {"tokenizer_model": GOOD, "tokenizer_config_json": {"pad_token": "[NOWHERE]"}}
    metadata = tokenizer_metadata(files.write(tmp_path, **content), ROWS, notes)
    assert "tokenizer.ggml.padding_token_id" not in metadata
    assert notes == ["tokenizer_config.json names '[NOWHERE]' as pad_token, which has no id"]
    for bad in (5, ["x"], {"content": 7}):
        content["tokenizer_config_json"] = {"eos_token": bad}
        assert "eos_token: found " in refuse(**content)
