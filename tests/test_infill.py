"""Code Llama's infilling: ids and their order, what ends it, and models that cannot do it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vocabs
from hypothesis import given, strategies as st
from tiny import tiny_config, vocabulary, write_tiny

import edgellama
from edgellama import Cancelled, CancelToken, ParameterError, Sampling, UnsupportedModelError
from edgellama.infill import InfillTokens, infill_ids, infill_tokens
from edgellama.tokenizer import Tokenizer, tokenizer_from_gguf

GOLDEN = json.loads((Path(__file__).parent / "data" / "chat_golden.json").read_text())["formats"]
NAMES = ["\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>"]
CONTROL, USER_DEFINED = 3, 4
PREFIX = "tokenizer.ggml."
SIZE = 288


def metadata(kind: int = CONTROL, **more: Any) -> dict[str, Any]:
    """The tiny vocabulary with the four tokens at its end."""
    pieces, scores, types = vocabulary(SIZE)
    keys: dict[str, Any] = {
        "model": "llama",
        "tokens": [*pieces[:-4], *NAMES],
        "scores": scores,
        "token_type": [*types[:-4], *[kind] * 4],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {PREFIX + key: value for key, value in (keys | more).items()}


def without_names(**more: Any) -> dict[str, Any]:
    return metadata(tokens=vocabulary(SIZE)[0], token_type=vocabulary(SIZE)[2], **more)


def prompt(keys: dict[str, Any], prefix: str, suffix: str, **options: bool) -> list[int]:
    tokenizer = tokenizer_from_gguf(keys)
    return infill_ids(infill_tokens(keys, tokenizer), tokenizer, prefix, suffix, **options)


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_ids_are_code_llamas(order: str, request: pytest.FixtureRequest) -> None:
    golden = GOLDEN[f"codellama-infill-{order}"]
    keys = vocabs.metadata("llama2+16", request)
    ids = prompt(keys, golden["prefix"], golden["suffix"], suffix_first=order == "spm")
    assert ids == golden["ids"]


def test_the_order_of_parts() -> None:
    before, behind, middle, _ = range(SIZE - 4, SIZE)
    tokenizer = tokenizer_from_gguf(metadata())
    prefix, suffix = tokenizer.encode("a b"), tokenizer.encode("c\n", continuing=True)
    assert prefix != tokenizer.encode("a b", continuing=True)
    assert prompt(metadata(), "a b", "c\n") == [1, before, *prefix, behind, *suffix, middle]
    other = prompt(metadata(), "a b", "c\n", suffix_first=True)
    assert other == [1, before, behind, *suffix, middle, *prefix]
    assert prompt(metadata(), "", "") == [1, before, behind, middle]


@given(st.text("ab \n\u2581é", max_size=8))
def test_a_text_that_goes_on_has_the_ids_it_has_behind_another(text: str) -> None:
    """Code Llama encodes a suffix behind a character that merges with nothing."""
    tokenizer = TINY
    anchor = tokenizer.encode("\u263a")
    assert tokenizer.encode("\u263a" + text) == anchor + tokenizer.encode(text, continuing=True)


TINY: Tokenizer = tokenizer_from_gguf(metadata())
TEXTS = st.lists(st.sampled_from(["<PRE>", " <PRE>", "\u2581<EOT>", "<SUF>", "a", " "]), max_size=4)


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED])
@given(TEXTS.map("".join), TEXTS.map("".join))
def test_code_cannot_write_the_tokens(kind: int, prefix: str, suffix: str) -> None:
    keys = metadata(kind)
    ids = prompt(keys, prefix, suffix)
    assert [i for i in ids if i >= SIZE - 4] == [SIZE - 4, SIZE - 3, SIZE - 2]
    at = ids.index(SIZE - 3)
    plain = tokenizer_from_gguf(keys)
    assert plain.decode(ids[2:at]) == prefix.replace("\u2581", " ")
    assert plain.decode(ids[at + 1 : -1], continuing=True) == suffix.replace("\u2581", " ")


def test_the_files_keys_name_the_tokens_too() -> None:
    old = {"prefix_token_id": 260, "suffix_token_id": 261, "middle_token_id": 262}
    new = {"fim_pre_token_id": 264, "fim_suf_token_id": 265, "fim_mid_token_id": 266}
    for ids, first in ((old, 260), (new, 264), (old | new, 264)):
        keys = without_names(**ids, eot_token_id=270)
        found = infill_tokens(keys, tokenizer_from_gguf(keys))
        assert found == InfillTokens(first, first + 1, first + 2, 270)


ALL = {"prefix_token_id": 260, "suffix_token_id": 261, "middle_token_id": 262, "eot_token_id": 7}


@pytest.mark.parametrize(
    "ids",
    [
        {},
        {key: value for key, value in ALL.items() if key != "eot_token_id"},
        ALL | {"eot_token_id": 260},
        ALL | {"prefix_token_id": -1},
        ALL | {"prefix_token_id": True},
        ALL | {"suffix_token_id": SIZE},
        ALL | {"middle_token_id": [1]},
        ALL | {"middle_token_id": "1"},
    ],
)
def test_models_that_cannot_fill_in_say_so(ids: dict[str, Any]) -> None:
    keys = without_names()
    tokenizer = tokenizer_from_gguf(keys)
    named = keys | {PREFIX + key: value for key, value in ids.items()}
    tokens = infill_tokens(named, tokenizer)
    assert tokens is None
    with pytest.raises(UnsupportedModelError, match=r"x\.gguf.*no infilling tokens.*Code Llama 7B"):
        infill_ids(tokens, tokenizer, "a", "b", path="/models/x.gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[edgellama.Model]:
    config = tiny_config(vocab_size=SIZE)
    path = write_tiny(tmp_path_factory.mktemp("infill") / "x.gguf", config, metadata=metadata())
    with edgellama.load(path, runtime="reference") as loaded:
        yield loaded


def forced(token: int) -> Sampling:
    """Always the same token."""
    return Sampling(temperature=0, logit_bias={token: 1000.0})


def test_filling_in(model: edgellama.Model) -> None:
    space_a = model.tokenizer.encode("a")[-1]
    text = model.infill("x", "y", forced(space_a), max_tokens=3)
    piece = model.tokenizer.decode([space_a], continuing=True)
    assert piece.startswith(" ") and text == piece * 3  # not stripped
    chunks = list(model.infill_chunks("x", "y", forced(space_a), max_tokens=3))
    assert chunks[-1].finish_reason == "length" and len(chunks) == 3
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == len(prompt(metadata(), "x", "y"))


@pytest.mark.parametrize("end", [SIZE - 1, 2])
def test_it_ends_at_eot_and_eos(model: edgellama.Model, end: int) -> None:
    assert model.infill("x", "y", forced(end)) == ""
    assert [c.finish_reason for c in model.infill_chunks("x", "y", forced(end))] == ["stop"]


def test_cancelling_and_wrong_arguments(model: edgellama.Model) -> None:
    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled):
        model.infill("x", "y", cancel=cancel)
    for prefix, suffix in ((1, "y"), ("x", None), (b"x", "y")):
        with pytest.raises(ParameterError, match=r"(prefix|suffix) is .*expected text"):
            model.infill(prefix, suffix)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="surrogate"):
        model.infill("\ud800", "y")
