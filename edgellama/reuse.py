"""What a cache already holds of a prompt.

Knows nothing about sessions or runtimes: ids in, ids out.
"""

from collections.abc import Sequence
from typing import Protocol


class BytesOfTokens(Protocol):
    """The part of a tokenizer that comparing texts needs."""

    @property
    def user_defined_texts(self) -> frozenset[str]: ...
    def token_bytes(self, token: int, /) -> bytes: ...
    def token_text(self, token: int, /) -> str: ...
    def is_special(self, token: int, /) -> bool: ...


def shared_length(cached: Sequence[int], ids: Sequence[int]) -> int:
    """How many leading ids are the same in both."""
    n = 0
    for mine, theirs in zip(cached, ids, strict=False):
        if mine != theirs:
            break
        n += 1
    return n


def as_cached(cached: Sequence[int], ids: Sequence[int], tokenizer: BytesOfTokens) -> list[int]:
    """`ids`, with the cache's own tokens as far as they spell the same bytes.

    A model may write a word in other tokens than its tokenizer cuts it into. When the reply comes
    back as a message, its text is that of the cache, and so is what the model meant by it; only
    the ids would differ, and all behind them would be computed again. Tokens with a name, whether
    control or user-defined, are never taken for their text: both must have the same ones.
    """
    named: frozenset[str] | None = None
    i = j = 0  # as far as both agree: cached[:i] spells what ids[:j] does
    while i < len(cached) and j < len(ids):
        if cached[i] == ids[j]:
            i, j = i + 1, j + 1
            continue
        named = tokenizer.user_defined_texts if named is None else named
        steps = _same_bytes(cached, ids, i, j, tokenizer, named)
        if steps is None:
            break
        i, j = steps
    return [*cached[:i], *ids[j:]]


def _same_bytes(
    cached: Sequence[int],
    ids: Sequence[int],
    i: int,
    j: int,
    tokenizer: BytesOfTokens,
    named: frozenset[str],
) -> tuple[int, int] | None:
    """The next places behind i and j up to which both spell the same; None if they never do."""
    mine = theirs = b""
    while True:
        ours = len(mine) <= len(theirs)
        tokens, at = (cached, i) if ours else (ids, j)
        if at == len(tokens):
            return None
        token = tokens[at]
        if tokenizer.is_special(token) or tokenizer.token_text(token) in named:
            return None
        spelled = tokenizer.token_bytes(token)
        if not spelled:
            return None
        if ours:
            mine, i = mine + spelled, i + 1
        else:
            theirs, j = theirs + spelled, j + 1
        shorter = min(len(mine), len(theirs))
        if mine[:shorter] != theirs[:shorter]:
            return None
        if len(mine) == len(theirs):
            return i, j
