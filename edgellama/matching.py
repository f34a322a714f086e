"""The two algorithms that both kinds of tokenizer share: merging symbols, and finding whole tokens.

Knows nothing about vocabularies' files, bytes or ids.
"""

from collections.abc import Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise

from edgellama.control import CancelToken

_POSITION_BITS = 40  # of a heap entry; the rank is above them
_PIECE = 2**16  # symbols between two looks at a cancel token


def merge(
    symbols: list[str],
    ranks: Mapping[str, int],
    glue: str = "",
    cancel: CancelToken | None = None,
) -> list[str]:
    """Byte-pair merging (Sennrich et al., arXiv:1508.07909): the lowest rank first, then leftmost.

    `ranks` maps `left + glue + right` to its rank. A heap over a linked list, O(n log n) in the
    number of symbols. A heap entry is one integer, rank and position, which a merge may leave
    stale; it counts if the pair that stands there when it comes up still has that rank. Raises
    Cancelled.
    """
    end = len(symbols)
    text, after, before = list(symbols), list(range(1, end + 1)), list(range(-1, end))
    heap = _heap(text, ranks, glue, cancel)
    while heap:
        if cancel is not None:
            cancel.check("encode")
        rank, i = divmod(heappop(heap), 1 << _POSITION_BITS)
        j = after[i]
        if j == end or ranks.get(text[i] + glue + text[j]) != rank:
            continue  # stale: one of the two was merged meanwhile
        text[i] += text[j]
        k = after[i] = after[j]
        before[k], after[j] = i, end  # a dead symbol has no neighbour
        for left, right in ((before[i], i), (i, k)):
            if left < 0 or right == end:
                continue
            new = ranks.get(text[left] + glue + text[right])
            if new is not None:
                heappush(heap, new << _POSITION_BITS | left)
    kept, i = [], 0
    while i < end:
        kept.append(text[i])
        i = after[i]
    return kept


def _heap(
    text: list[str], ranks: Mapping[str, int], glue: str, cancel: CancelToken | None
) -> list[int]:
    """The entries of all pairs that have a rank."""
    heap: list[int] = []
    for start in range(0, len(text), _PIECE):
        if cancel is not None:
            cancel.check("encode")
        pairs = map(glue.join, pairwise(text[start : start + _PIECE + 1]))
        found = enumerate(map(ranks.get, pairs), start)
        heap += [rank << _POSITION_BITS | i for i, rank in found if rank is not None]
    heapify(heap)
    return heap


class Matcher:
    """Finds whole tokens in a text: the leftmost first, the longest of those that start there.

    An Aho-Corasick automaton (Communications of the ACM 18:6, 1975) over the reversed tokens runs
    from the text's end to its start, which gives the longest token starting at every position
    in time linear in the text, whatever the tokens are.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self._children: list[dict[str, int]] = [{}]
        self._longest = [0]  # state -> length of the longest token it ends with, 0: none
        for token in tokens:
            self._add(token)
        self._fallback = [0] * len(self._children)
        self._link()
        self._finals = frozenset(self._children[0])

    def _add(self, token: str) -> None:
        state = 0
        for character in reversed(token):
            following = self._children[state].setdefault(character, len(self._children))
            if following == len(self._children):
                self._children.append({})
                self._longest.append(0)
            state = following
        self._longest[state] = len(token)

    def _link(self) -> None:
        """Breadth first, so that a state's fallback, which is shorter, is ready before it."""
        queue = list(self._children[0].values())
        for state in queue:
            for character, child in self._children[state].items():
                self._fallback[child] = self._step(self._fallback[state], character)
                queue.append(child)
            self._longest[state] = self._longest[state] or self._longest[self._fallback[state]]

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._children[state]:
            state = self._fallback[state]
        return self._children[state].get(character, 0)

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, end) of every token found, in order, never overlapping."""
        if self._finals.isdisjoint(text):
            return
        found, state = [], 0
        for i in range(len(text) - 1, -1, -1):
            state = self._step(state, text[i])
            if self._longest[state]:
                found.append((i, i + self._longest[state]))
        at = 0
        for start, end in reversed(found):
            if start >= at:
                yield start, end
                at = end
