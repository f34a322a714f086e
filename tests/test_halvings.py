"""Merges of a SentencePiece vocabulary: every halving of a token into two tokens must be one."""

import random
import time
from pathlib import Path

import pytest

from edgellama.errors import UnsupportedModelError
from edgellama.quantize.draft import Draft
from edgellama.quantize.tokenizer_json import _check_every_halving
from edgellama.vocab import CONTROL, LONGEST_TOKEN, NORMAL

Merges = set[tuple[str, str]]


def checked(tokens: list[str], merges: Merges, added: set[str] | None = None) -> None:
    draft = Draft("llama", Path("tokenizer.json"), tokens, [NORMAL] * len(tokens))
    _check_every_halving(draft, merges, added or set())


def halvings(tokens: list[str]) -> Merges:
    """All of them, by trying every cut."""
    cuts = ((text[:i], text[i:]) for text in tokens for i in range(1, len(text)))
    return {(left, right) for left, right in cuts if left in tokens and right in tokens}


@pytest.mark.parametrize("seed", range(20))
def test_each_halving_is_looked_for(seed: int) -> None:
    rng = random.Random(seed)
    words = ("".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(30))
    tokens = sorted(set(words), key=lambda _: rng.random())
    merges = halvings(tokens)
    assert merges
    checked(tokens, merges)
    for missing in merges:
        with pytest.raises(UnsupportedModelError, match="no merge joins") as caught:
            checked(tokens, merges - {missing})
        assert caught.value.value == " ".join(missing)


def test_added_and_control_tokens_are_no_pieces() -> None:
    checked(["a", "b", "ab"], set(), added={"b"})
    draft = Draft("llama", Path("x"), ["a", "b", "ab"], [NORMAL, CONTROL, NORMAL])
    _check_every_halving(draft, set(), set())


def test_long_tokens() -> None:
    """Every cut of one of them was tried, in half a second."""
    one_each = [f"{i}" + "y" * (LONGEST_TOKEN - 9) for i in range(60)]
    nested = ["x" * n for n in range(1, 200)]
    merges = {("x" * n, "x" * (len(text) - n)) for text in nested for n in range(1, len(text))}
    started = time.perf_counter()
    checked([*one_each, *nested], merges)
    assert time.perf_counter() - started < 10  # it takes 0.1 s
