"""Tokenizers refuse damaged metadata, bad ids and bad text, naming what is wrong."""

import math
from array import array
from typing import Any

import pytest
from tinyvocabs import BOTH, GPT2, LLAMA, MAKERS, MERGES, both, gpt2, llama

from edgellama.bpe import split
from edgellama.errors import ParameterError, TokenizerError, UnsupportedModelError
from edgellama.tokenizer import Tokenizer, tokenizer_from_gguf


@both
@pytest.mark.parametrize("bad", [-1, 10**6, 2**64, True, 1.0, "1", None])
def test_bad_ids(tokenizer: Tokenizer, bad: Any) -> None:
    calls = (
        tokenizer.token_bytes,
        tokenizer.token_text,
        tokenizer.is_control,
        tokenizer.stream().push,
    )
    for call in (*calls, lambda token: tokenizer.decode([token])):
        with pytest.raises(ParameterError, match="token id") as caught:
            call(bad)
        assert caught.value.value is bad


def test_numpy_ids() -> None:
    numpy = pytest.importorskip("numpy")
    tokenizer = BOTH[GPT2]
    ids = tokenizer.encode("abc a")
    assert tokenizer.decode(numpy.array(ids, numpy.int32)) == "abc a"


@both
@pytest.mark.parametrize("bad", ["a\ud800", "\udcff", b"bytes", None, 3])
def test_bad_text(tokenizer: Tokenizer, bad: Any) -> None:
    with pytest.raises(ParameterError):
        tokenizer.encode(bad)


def swapped(values: list[Any], index: int, value: Any) -> list[Any]:
    return [*values[:index], value, *values[index + 1 :]]


def refusals() -> list[Any]:
    tokens, scores = llama()["tokenizer.ggml.tokens"], llama()["tokenizer.ggml.scores"]
    types, n = llama()["tokenizer.ggml.token_type"], len(llama()["tokenizer.ggml.tokens"])
    return [
        (LLAMA, "model", None, "missing"),
        (LLAMA, "model", 7, "llama, gpt2"),
        (LLAMA, "tokens", None, "missing"),
        (LLAMA, "tokens", [], "found 0 elements"),
        (LLAMA, "tokens", "abc", "found str"),
        (LLAMA, "tokens", swapped(tokens, 5, 5), "[5] is 5"),
        (LLAMA, "tokens", swapped(tokens, 5, b"x"), "[5] is"),
        (LLAMA, "tokens", swapped(tokens, 261, ""), "[261] is ''"),
        (LLAMA, "tokens", swapped(tokens, 261, "a" * 65_537), "[261] is"),
        (LLAMA, "tokens", swapped(tokens, 261, "\ud800"), "[261] is"),
        (LLAMA, "tokens", swapped(tokens, 261, "<s>"), "[261] is '<s>'"),
        *[
            (LLAMA, "tokens", swapped(tokens, 7, bad), f"[7] is '{bad}'")
            for bad in ("<0x-1>", "<0xZZ>", "<0x100>", "<0x0>", "<0xab>", "0xAB", "<0xAB> ")
        ],
        (LLAMA, "scores", None, "missing"),
        (LLAMA, "scores", scores[:-1], f"found {n - 1} elements; expected array of {n} floats"),
        (LLAMA, "scores", array("B", [0] * n), "[0] is 0; expected array of"),
        (LLAMA, "scores", swapped(scores, 3, math.nan), "[3] is nan"),
        (LLAMA, "scores", swapped(scores, 3, -math.inf), "[3] is -inf"),
        (LLAMA, "token_type", [*types, 1], f"found {n + 1} elements"),
        (LLAMA, "token_type", swapped(types, 9, 99), "[9] is 99; expected 1..6"),
        (LLAMA, "token_type", swapped(types, 9, -1), "[9] is -1"),
        (LLAMA, "token_type", swapped(types, 9, True), "[9] is True"),
        (LLAMA, "token_type", array("d", [1.0] * n), "[0] is 1.0"),
        *[
            (LLAMA, key, bad, f"integer 0..{n - 1}")
            for key in (
                "bos_token_id",
                "eos_token_id",
                "eot_token_id",
                "eom_token_id",
                "unknown_token_id",
            )
            for bad in (-1, n, 2**32 - 1, True, 1.0, "1")
        ],
        (LLAMA, "add_bos_token", 1, "a bool"),
        (LLAMA, "add_space_prefix", "yes", "a bool"),
        (LLAMA, "remove_extra_whitespaces", 0, "a bool"),
        (GPT2, "pre", 3, "a string"),
        (GPT2, "merges", None, "missing"),
        (GPT2, "merges", swapped(MERGES, 2, "abc"), "[2] is 'abc'"),
        (GPT2, "merges", swapped(MERGES, 2, "a b c"), "[2] is 'a b c'"),
        (GPT2, "merges", ["a b c", "b"], "[0] is 'a b c'"),
        (GPT2, "merges", ["b", "a b c"], "[0] is 'b'"),
        (GPT2, "merges", swapped(MERGES, 2, " ab"), "[2] is ' ab'"),
        (GPT2, "merges", swapped(MERGES, 2, "zz a"), "[2] is 'zz a'"),
        (GPT2, "merges", swapped(MERGES, 2, "c c"), "[2] is 'c c'"),
        (GPT2, "merges", swapped(MERGES, 2, "a b"), "[2] is 'a b'; expected every merge once"),
        (GPT2, "merges", swapped(MERGES, 2, 2), "[2] is 2"),
        (GPT2, "merges", {"a b": 0}, "found dict"),
    ]


@pytest.mark.parametrize(("model", "key", "value", "said"), refusals())
def test_damaged_metadata(model: str, key: str, value: Any, said: str) -> None:
    with pytest.raises((TokenizerError, UnsupportedModelError)) as caught:
        tokenizer_from_gguf(MAKERS[model](**{key: value}), path="/models/x.gguf")
    text = str(caught.value)
    assert text.startswith(f"x.gguf: key 'tokenizer.ggml.{key}': ")
    assert said in text
    assert caught.value.field == f"tokenizer.ggml.{key}"
    assert len(text) < 600 and text.isascii()


def test_far_merges_are_named_by_their_line() -> None:
    letters = [chr(0x4E00 + i) for i in range(80)]
    pairs = [(a, b) for a in letters for b in letters]
    tokens = [*letters, *(a + b for a, b in pairs)]
    merges = [f"{a} {b}" for a, b in pairs]
    changes = {"token_type": None, "tokens": tokens}
    assert tokenizer_from_gguf(gpt2(**changes, merges=merges)).vocab_size == len(tokens)
    with pytest.raises(TokenizerError, match=r"\[5000\] is 'aa'"):
        tokenizer_from_gguf(gpt2(**changes, merges=swapped(merges, 5000, "aa")))


@pytest.mark.parametrize("bad", ["bert", "LLAMA", "", "t5\x1b[31m"])
def test_an_unknown_model_or_pre_tokenizer_is_refused_by_name(bad: str) -> None:
    with pytest.raises(UnsupportedModelError, match="supported: llama, gpt2") as caught:
        tokenizer_from_gguf(gpt2(model=bad))
    assert ascii(bad) in str(caught.value)
    with pytest.raises(UnsupportedModelError, match="default, gpt-2, smollm, llama-bpe") as caught:
        tokenizer_from_gguf(gpt2(pre=bad), "x.gguf")
    assert str(caught.value).startswith(f"x.gguf: key 'tokenizer.ggml.pre': pre-tokenizer {bad!a}")
    with pytest.raises(UnsupportedModelError):
        split("a", bad)


def test_optional_keys_may_be_absent() -> None:
    assert tokenizer_from_gguf(gpt2(pre=None, token_type=None)).encode("12") != []
    assert tokenizer_from_gguf(llama(token_type=array("i", llama()["tokenizer.ggml.token_type"])))
