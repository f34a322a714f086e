"""Byte-level BPE, the tokenizer of GPT-2, LLaMA 3 and SmolLM.

Knows nothing about special tokens in text: `tokenizer.py` cuts those out first. The pieces are
strings over 256 printable characters, one for each byte value, as GPT-2 published them.
"""

import re
from functools import cache, cached_property
from pathlib import Path

from edgellama.control import CancelToken
from edgellama.errors import UnsupportedModelError, shown
from edgellama.matching import Matcher, merge
from edgellama.vocab import NORMAL, USER_DEFINED, Vocab

LONGEST_CACHED, MOST_CACHED = 64, 32_768  # characters of a word; words
WORDS = 1024  # between two looks at a cancel token

# `tokenizer.ggml.pre` -> the pattern that cuts text into words. Names: those that GGUF files use.
PRE_TOKENIZERS = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "smollm": "smollm",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
}
# Unicode 17 general categories Nl and No, in hexadecimal: what `re` calls \w but neither \p{L}
# nor \d. With them its classes give \p{L} and \p{N} without a table of all letters.
_NUMERALS = """
b2-b3 b9 bc-be 9f4-9f9 b72-b77 bf0-bf2 c78-c7e d58-d5e d70-d78 f2a-f33 1369-137c 16ee-16f0
17f0-17f9 19da 2070 2074-2079 2080-2089 2150-2182 2185-2189 2460-249b 24ea-24ff 2776-2793 2cfd
3007 3021-3029 3038-303a 3192-3195 3220-3229 3248-324f 3251-325f 3280-3289 32b1-32bf a6e6-a6ef
a830-a835 10107-10133 10140-10178 1018a-1018b 102e1-102fb 10320-10323 10341 1034a 103d1-103d5
10858-1085f 10879-1087f 108a7-108af 108fb-108ff 10916-1091b 109bc-109bd 109c0-109cf 109d2-109ff
10a40-10a48 10a7d-10a7e 10a9d-10a9f 10aeb-10aef 10b58-10b5f 10b78-10b7f 10ba9-10baf 10cfa-10cff
10e60-10e7e 10f1d-10f26 10f51-10f54 10fc5-10fcb 11052-11065 111e1-111f4 1173a-1173b 118ea-118f2
11c5a-11c6c 11fc0-11fd4 12400-1246f 12475-1247f 12550-12686 16b5b-16b61 16e80-16e96 16ff4-16ff6
1d2c0-1d2d3 1d2e0-1d2f3 1d360-1d378 1e8c7-1e8cf 1ec71-1ecab 1ecad-1ecaf 1ecb1-1ecb4 1ed01-1ed2d
1ed2f-1ed3d 1f100-1f10c
"""
# \s of the published patterns is Unicode's White_Space; Python's \s has four more characters.
_SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"


@cache
def _pattern(name: str) -> re.Pattern[str]:
    """The published patterns in the syntax of `re`.

    llama3: https://github.com/meta-llama/llama-models, tokenizer.py; gpt2: GPT-2's encoder.py;
    smollm: every digit alone, then as gpt2, here in one pass (a digit ends a run of spaces).
    """
    ranges = (ends.partition("-") for ends in _NUMERALS.split())
    more = "".join(chr(int(a, 16)) + dash + (b and chr(int(b, 16))) for a, dash, b in ranges)
    letter, number, space = rf"[^\W\d_{more}]", rf"[\d{more}]", f"[{_SPACES}]"
    marks = rf"(?:[^\w{_SPACES}]++|_++)++"  # neither space, letter nor number; \w has the "_"
    if name == "llama3":
        return re.compile(
            rf"(?i:{_CONTRACTIONS})|(?:[^\w\r\n]|_)?{letter}++|{number}{{1,3}}"
            rf"| ?{marks}[\r\n]*|{space}*[\r\n]+|{space}+(?![^{_SPACES}])|{space}+"
        )
    digits, stop = (number, rf"[^{_SPACES}\d{more}]")
    if name == "gpt2":
        digits, stop = rf" ?{number}++", f"[^{_SPACES}]"
    return re.compile(
        rf"{_CONTRACTIONS}| ?{letter}++|{digits}| ?{marks}|{space}+(?!{stop})|{space}+"
    )


def _pattern_of(name: str, path: str | Path | None = None) -> re.Pattern[str]:
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedModelError(
            f"pre-tokenizer {shown(name)} is not supported; supported: {known}",
            path=path,
            where="key 'tokenizer.ggml.pre'",
            field="tokenizer.ggml.pre",
            value=name,
            allowed=known,
        )
    return _pattern(PRE_TOKENIZERS[name])


def split(text: str, name: str) -> list[str]:
    """Cut `text` into the words that are merged on their own; joined they are the text again.

    `name` is a `tokenizer.ggml.pre`; raises UnsupportedModelError for an unknown one.
    """
    return _pattern_of(name).findall(text)


@cache
def alphabet() -> dict[int, str]:
    """Byte value -> character: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


@cache
def _byte_of() -> dict[str, bytes]:
    return {character: bytes([byte]) for byte, character in alphabet().items()}


class ByteLevelBPE:
    """Text to ids of one vocabulary, and ids to bytes.

    Merging is plain Python over the file's own merge lines, cached by word: measured for 49,000
    merges, 40 ms until ready where the `tokenizers` library takes 130, then 4 MB/s of source code.
    """

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._pattern = _pattern_of(vocab.pre, vocab.path)
        # LLaMA 3's rule: a word that is a token is taken whole, without asking the merges.
        self._whole_words = PRE_TOKENIZERS[vocab.pre] == "llama3"
        self._cache: dict[str, list[int]] = {}

    @cached_property
    def _user_defined(self) -> Matcher | None:
        tokens = self._vocab.of_type(USER_DEFINED)
        return Matcher(tokens) if tokens else None

    def encode(
        self, text: str, *, continuing: bool = False, cancel: CancelToken | None = None
    ) -> list[int]:
        """`continuing` makes no difference: nothing is ever put before a text. Raises Cancelled."""
        if not self._user_defined:
            return self._encode_between(text, cancel)
        ids, at = [], 0
        for start, end in self._user_defined.find(text):
            ids += self._encode_between(text[at:start], cancel)
            ids.append(self._vocab.specials[text[start:end]])
            at = end
        return ids + self._encode_between(text[at:], cancel)

    def _encode_between(self, text: str, cancel: CancelToken | None) -> list[int]:
        ids: list[int] = []
        for number, match in enumerate(self._pattern.finditer(text)):
            if cancel is not None and number % WORDS == 0:
                cancel.check("encode")
            word = match[0]
            found = self._cache.get(word)
            ids += self._encode_word(word, cancel) if found is None else found
        return ids

    def _encode_word(self, word: str, cancel: CancelToken | None) -> list[int]:
        known = self._vocab.ids
        text = word.encode().decode("latin-1").translate(alphabet())
        if self._whole_words and text in known:
            ids = [known[text]]
        else:
            symbols = [symbol for symbol in text if symbol in known]  # the others are dropped
            watched = cancel if len(word) > LONGEST_CACHED else None
            ids = [known[symbol] for symbol in merge(symbols, self._vocab.ranks, " ", watched)]
        if len(word) <= LONGEST_CACHED:
            if len(self._cache) >= MOST_CACHED:
                self._cache.clear()
            self._cache[word] = ids
        return ids

    def token_bytes(self, token: int) -> bytes:
        text = self._vocab.tokens[token]
        if self._vocab.types[token] != NORMAL:
            return text.encode()
        byte_of = _byte_of()
        return b"".join(byte_of.get(character) or character.encode() for character in text)
