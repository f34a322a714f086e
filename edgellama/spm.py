"""SentencePiece's BPE with byte fallback, the tokenizer of LLaMA 1 and 2, Mistral and relatives.

Knows nothing about special tokens in text: `tokenizer.py` cuts those out first. Source: the
SentencePiece library (Kudo and Richardson, arXiv:1808.06226), whose ids it reproduces.
"""

import re
from functools import cached_property

from edgellama.control import CancelToken
from edgellama.errors import TokenizerError, shown
from edgellama.matching import Matcher, merge
from edgellama.vocab import BYTE, UNKNOWN, USER_DEFINED, Vocab

SPACE = "\u2581"  # stands for a space inside pieces; typed by a user it cannot be told from one
UNKNOWN_TEXT = " \u2047 "  # what SentencePiece decodes the unknown piece to
LONGEST_CACHED, MOST_CACHED = 64, 32_768  # characters of a word; words
WORDS = 1024  # between two looks at a cancel token
BARRIER = "\ud800"  # cannot occur in a checked token


class SentencePiece:
    """Text to ids of one vocabulary, and ids to bytes."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._cache: dict[str, list[int]] = {}

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        vocab = self._vocab
        typed = zip(vocab.tokens, vocab.types, strict=True)
        return {int(text[1:-1], 16): i for i, (text, kind) in enumerate(typed) if kind == BYTE}

    @cached_property
    def _user_defined(self) -> Matcher | None:
        """Pieces with plain spaces too: llama.cpp's converter writes "\u2581" so in these."""
        tokens = self._vocab.of_type(USER_DEFINED)
        return Matcher(text.replace(" ", SPACE) for text in tokens) if tokens else None

    @cached_property
    def _user_ids(self) -> dict[str, int]:
        tokens = self._vocab.of_type(USER_DEFINED)
        return {text.replace(" ", SPACE): i for text, i in tokens.items()}

    @cached_property
    def _word_start(self) -> re.Pattern[str]:
        """Where no piece reaches across, so that the text may be cut without changing a merge.

        In most vocabularies "\u2581" only opens a piece: every word stands alone and is cached.
        Characters that come before it inside some piece do not end a word.
        """
        inside = re.findall(f"([^{SPACE}{BARRIER}]){SPACE}", BARRIER.join(self._vocab.ranks))
        joined = "".join(map(re.escape, sorted(set(inside))))
        return re.compile(f"(?<=[^{SPACE}{joined}])(?={SPACE})")

    def encode(
        self, text: str, *, continuing: bool = False, cancel: CancelToken | None = None
    ) -> list[int]:
        """`continuing`: ids stand before, so no space is put in front. Raises Cancelled."""
        text = self._normalized(text, continuing)
        if not self._user_defined:
            return self._encode_between(text, cancel)
        ids, at = [], 0
        for start, end in self._user_defined.find(text):
            ids += self._encode_between(text[at:start], cancel)
            ids.append(self._user_ids[text[start:end]])
            at = end
        return ids + self._encode_between(text[at:], cancel)

    def _normalized(self, text: str, continuing: bool) -> str:
        if self._vocab.remove_extra_whitespaces:
            text = re.sub("  +", " ", text.strip(" "))
            text = text.rstrip(" " + SPACE)
        if text and self._vocab.add_space_prefix and not continuing:
            text = " " + text
        return text.replace(" ", SPACE)

    def _encode_between(self, text: str, cancel: CancelToken | None) -> list[int]:
        ids: list[int] = []
        if not text:
            return ids
        for number, word in enumerate(self._word_start.split(text)):
            if cancel is not None and number % WORDS == 0:
                cancel.check("encode")
            found = self._cache.get(word)
            if found is None:
                found = self._encode_word(word, cancel)
            if found and ids and found[0] == ids[-1] == self._vocab.unk:
                found = found[1:]  # as inside a word: a run of unknowns is one
            ids += found
        return ids

    def _encode_word(self, word: str, cancel: CancelToken | None) -> list[int]:
        ids: list[int] = []
        watched = cancel if len(word) > LONGEST_CACHED else None
        for symbol in merge(list(word), self._vocab.ranks, cancel=watched):
            found = self._vocab.ids.get(symbol)
            ids += self._fallback(symbol, ids) if found is None else [found]
        if len(word) <= LONGEST_CACHED:
            if len(self._cache) >= MOST_CACHED:
                self._cache.clear()
            self._cache[word] = ids
        return ids

    def _fallback(self, character: str, ids: list[int]) -> list[int]:
        """The character's UTF-8 bytes, or the unknown token, one for a run of unknowns."""
        try:
            return [self._byte_ids[byte] for byte in character.encode()]
        except KeyError:
            pass
        if self._vocab.unk is None:
            raise TokenizerError(
                f"no token for {shown(character)}, nor for its bytes, nor for unknowns",
                value=character,
            )
        return [] if ids and ids[-1] == self._vocab.unk else [self._vocab.unk]

    def token_bytes(self, token: int) -> bytes:
        text, kind = self._vocab.tokens[token], self._vocab.types[token]
        if kind == BYTE:
            return bytes([int(text[1:-1], 16)])
        if kind == UNKNOWN:
            return UNKNOWN_TEXT.encode()
        return text.replace(SPACE, " ").encode()
