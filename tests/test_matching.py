"""Merging and matching against their definitions, and on texts made to be slow."""

import json
import subprocess
import sys
from itertools import pairwise

from hypothesis import given, settings, strategies as st
from tinyvocabs import gpt2, llama

from edgellama.matching import Matcher, merge


def plainly_merged(symbols: list[str], ranks: dict[str, int]) -> list[str]:
    """The definition: look for the lowest rank, the leftmost of those, and merge it."""
    symbols = list(symbols)
    while True:
        pairs = [
            (ranks[a + " " + b], i)
            for i, (a, b) in enumerate(pairwise(symbols))
            if a + " " + b in ranks
        ]
        if not pairs:
            return symbols
        i = min(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


@given(
    text=st.text("ab", max_size=40),
    lines=st.lists(
        st.tuples(st.text("ab", min_size=1, max_size=3), st.text("ab", min_size=1, max_size=3)),
        unique=True,
    ),
)
@settings(deadline=None)
def test_merging_follows_its_definition(text: str, lines: list[tuple[str, str]]) -> None:
    ranks = {f"{a} {b}": i for i, (a, b) in enumerate(lines)}
    assert merge(list(text), ranks, " ") == plainly_merged(list(text), ranks)


@given(text=st.text("ab", max_size=40), tokens=st.sets(st.text("ab", min_size=1, max_size=5)))
@settings(deadline=None)
def test_matching_follows_its_definition(text: str, tokens: set[str]) -> None:
    expected, at = [], 0
    while at < len(text):
        ends = [at + len(token) for token in tokens if text.startswith(token, at)]
        if ends:
            expected.append((at, max(ends)))
        at = max(ends, default=at + 1)
    assert list(Matcher(tokens).find(text)) == expected


LONG = {
    "letter": "a" * 30_000,
    "word": "abc" * 10_000,
    "spaces": " " * 30_000,
    "marks": "\u0301" * 30_000,
    "newlines": " \n" * 15_000,
    "signs": "_!" * 15_000,
    "digits": "1" * 30_000,
    "names": "<|im_" * 6_000,
}


def test_long_texts_take_no_quadratic_time() -> None:
    """A bound against hanging: these take about 2 s together."""
    code = (
        "import json, sys; from edgellama.tokenizer import tokenizer_from_gguf\n"
        "data = json.load(sys.stdin)\n"
        "for metadata in data['vocabularies']:\n"
        "    tokenizer = tokenizer_from_gguf(metadata)\n"
        "    for text in data['texts']:\n"
        "        ids = tokenizer.encode(text, special=True)\n"
        "        assert tokenizer.decode(ids, special=True) == text\n"
    )
    hostile = ["b" * i + "<|im_" for i in range(1, 1000)]
    tokens = [*gpt2()["tokenizer.ggml.tokens"], *hostile]
    types = [3, 3, 3, 4] + [1] * (len(tokens) - 4 - len(hostile)) + [3] * len(hostile)
    vocabularies = [llama(), gpt2(), gpt2(pre="llama3", tokens=tokens, token_type=types)]
    sent = json.dumps(
        {"vocabularies": vocabularies, "texts": [*LONG.values(), "b" * 30_000 + "<|im"]}
    )
    subprocess.run([sys.executable, "-c", code], input=sent, text=True, check=True, timeout=60)


def test_numpy_and_tokenizers_are_not_imported() -> None:
    code = "import sys, edgellama.tokenizer; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not {"numpy", "tokenizers", "numba", "jinja2"} & set(ran.stdout.split())
