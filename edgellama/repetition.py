"""What repetition costs a token: repetition, presence and frequency penalties, and DRY.

Ids in, lowered scores out; knows nothing about vocabularies but the bytes of a token, in which
DRY looks for breakers.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.intp]
Scores = NDArray[np.floating[Any]]

LARGEST_LOG = 88.7228391  # of float32: DRY's power grows no further


def penalized(
    scores: Scores, times: Scores, repetition: float, presence: float, frequency: float
) -> Scores:
    """The scores of tokens that stand `times` in the window; all arrays (tokens,)."""
    wide = scores.astype(np.float64)
    wide = np.where(wide > 0, wide / repetition, wide * repetition)
    lowered: Scores = wide - presence - frequency * times
    return lowered


def counted(recent: Iterable[int]) -> tuple[Ids, Scores]:
    """The different ids, and how often each occurs."""
    counts = Counter(recent)
    ids = np.fromiter(counts, np.intp, len(counts))
    return ids, np.fromiter(counts.values(), np.float64, len(counts))


def continuations(ids: Ids, shortest: int, longest: int) -> tuple[Ids, Ids]:
    """Tokens that would continue a repetition of the last tokens, and the length of the longest.

    `ids` (n,) end with the newest token. A repetition of `shortest`..`longest` tokens ends
    somewhere before with the same tokens as `ids` do; what came next there would continue it.
    """
    ends = np.flatnonzero(ids[:-1] == ids[-1])
    lengths = np.ones(len(ends), np.intp)
    alive, length = np.arange(len(ends)), 1
    while len(alive) and length < longest:
        back = ends[alive] - length
        alive = alive[(back >= 0) & (ids[back] == ids[-1 - length])]
        length += 1
        lengths[alive] = length
    enough = lengths >= shortest
    tokens, which = np.unique(ids[ends[enough] + 1], return_inverse=True)
    most = np.zeros(len(tokens), np.intp)
    np.maximum.at(most, which, lengths[enough])
    return tokens, most


class Dry:
    """DRY as its author p-e-w describes it, with llama.cpp's limits on power and breakers.

    Breakers are found in the text of the tokens, however it is cut into tokens.
    """

    def __init__(
        self,
        multiplier: float,
        base: float,
        allowed: int,
        breakers: Sequence[str],
        pieces: Callable[[int], bytes],
    ) -> None:
        """`allowed`: tokens that may be repeated freely; `pieces`: the bytes of a token."""
        self._multiplier, self._base, self._allowed = multiplier, base, allowed
        self._breakers = [breaker.encode() for breaker in breakers]
        self._piece = lru_cache(1 << 16)(pieces)
        self._most = int(LARGEST_LOG / math.log(base)) if base > 1.000001 else 0  # llama.cpp's

    def lowered(self, recent: Sequence[int]) -> tuple[Ids, Scores]:
        """Ids, and what each loses, after the tokens of `recent`, oldest first."""
        longest = min(self._allowed + self._most, self._unbroken(recent))
        if longest < self._allowed:
            return np.empty(0, np.intp), np.empty(0)
        ids = np.fromiter(recent, np.intp, len(recent))
        tokens, lengths = continuations(ids, self._allowed, longest)
        spared = [self._breaks(int(token)) for token in tokens]
        tokens, lengths = tokens[np.logical_not(spared)], lengths[np.logical_not(spared)]
        powers = (lengths - self._allowed).astype(np.float64)
        return tokens, self._multiplier * self._base**powers

    def _breaks(self, token: int) -> bool:
        piece = self._piece(token)
        return any(breaker in piece for breaker in self._breakers)

    def _unbroken(self, recent: Sequence[int]) -> int:
        """How many tokens follow the one in which the last breaker ends."""
        if not self._breakers:
            return len(recent)
        pieces = [self._piece(token) for token in recent]
        text = b"".join(pieces)
        ends = [text.rfind(each) + len(each) for each in self._breakers if each in text]
        end, start, count = max(ends, default=0), len(text), 0
        for piece in reversed(pieces):
            start -= len(piece)
            if start < end:
                break
            count += 1
        return count
