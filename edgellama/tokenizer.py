"""Text to token ids and back, for the tokenizer that a GGUF file carries.

Puts special tokens, plain text and half characters in order; `spm.py` and `bpe.py` do the rest.
Knows nothing about models or chat templates.
"""

import codecs
import operator
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from edgellama.bpe import ByteLevelBPE
from edgellama.control import CancelToken, require_token
from edgellama.errors import ParameterError, shown
from edgellama.matching import Matcher
from edgellama.spm import SentencePiece
from edgellama.vocab import CONTROL, UNKNOWN, USER_DEFINED, Vocab, vocab_from_gguf

_EACH_BYTE = "edgellama.each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """SentencePiece shows one U+FFFD for every invalid byte, not one for a cut character."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


def tokenizer_from_gguf(
    metadata: Mapping[str, Any],
    path: str | Path | None = None,
    *,
    cancel: CancelToken | None = None,
) -> "Tokenizer":
    """The tokenizer described by the GGUF keys `tokenizer.ggml.*`; `path` is for messages.

    `tokenizer.ggml.model` is "llama" (SentencePiece BPE) or "gpt2" (byte-level BPE); for the
    latter `tokenizer.ggml.pre` names the pre-tokenizer, absent: "default", which is GPT-2's.
    Special tokens that a "llama" file does not name have SentencePiece's ids: BOS 1, EOS 2,
    unknown 0.
    Raises UnsupportedModelError for other kinds, TokenizerError for damaged data, Cancelled.
    """
    return Tokenizer(vocab_from_gguf(metadata, path, cancel=cancel))


class Tokenizer:
    """One model's tokenizer; immutable, usable from any thread.

    `vocab_size` counts tokens; `bos` is the id that starts a text, or None; `eos` the ids that end
    a turn or a text; `add_bos` tells whether a text is to be given `bos` (the file's
    `add_bos_token`; absent: yes for "llama" and for LLaMA 3's kind of "gpt2", else no).
    """

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._text: SentencePiece | ByteLevelBPE
        self._text = SentencePiece(vocab) if vocab.model == "llama" else ByteLevelBPE(vocab)
        self._drop_all = vocab.remove_extra_whitespaces  # decoding trims the start, as encoding did
        self._drops = vocab.model == "llama" and (vocab.add_space_prefix or self._drop_all)
        self._errors = _EACH_BYTE if vocab.model == "llama" else "replace"
        self.vocab_size = len(vocab.tokens)
        self.bos, self.eos, self.add_bos = vocab.bos, vocab.eos, vocab.add_bos

    def __repr__(self) -> str:
        return f"<Tokenizer {self._vocab.model}, {self.vocab_size} tokens>"

    @property
    def bos_text(self) -> str:
        """The text of `bos`, "" where there is none: what chat templates call `bos_token`."""
        return "" if self.bos is None else self._vocab.tokens[self.bos]

    @property
    def eos_text(self) -> str:
        """The text of the first of `eos`, "" where there is none."""
        return self._vocab.tokens[self.eos[0]] if self.eos else ""

    @property
    def special_texts(self) -> frozenset[str]:
        """What `encode(special=True)` turns into control and unknown tokens."""
        return frozenset(self._vocab.of_type(CONTROL, UNKNOWN))

    @property
    def user_defined_texts(self) -> frozenset[str]:
        """What every text turns into a token of its own, whoever wrote it."""
        return frozenset(self._vocab.of_type(USER_DEFINED))

    @cached_property
    def _specials(self) -> Matcher:
        return Matcher(self._vocab.specials)

    def encode(
        self,
        text: str,
        *,
        special: bool = False,
        bos: bool = False,
        continuing: bool = False,
        cancel: CancelToken | None = None,
    ) -> list[int]:
        """Token ids of `text`; `bos=True` puts the BOS id in front.

        Text that looks like a control token stays plain text, so that nobody can slip in the end
        of a turn; `special=True` turns it into the token (the longest one that fits). User-defined
        tokens are always recognised, as the model was trained to see them.

        Bytes for which a byte-level vocabulary has no token are dropped: SmolLM2 lacks 21 of 256
        (control characters, and bytes of no or hardly any UTF-8 text).

        `continuing=True` says that the text goes on from tokens that stand before it: no space is
        put in front (SentencePiece; byte-level vocabularies never put one).

        Raises ParameterError if `text` is no str or holds a lone surrogate (as from
        `os.fsdecode`), or for `bos=True` without a BOS token; Cancelled, soon after the token of
        that name is set: a megabyte of one letter takes seconds.
        """
        parts = [(text, special)]
        return self.encode_parts(parts, bos=bos, continuing=continuing, cancel=cancel)

    def encode_parts(
        self,
        parts: Iterable[tuple[str, bool]],
        *,
        bos: bool = False,
        continuing: bool = False,
        cancel: CancelToken | None = None,
    ) -> list[int]:
        """Token ids of the parts joined, as `encode` gives them; each part is (text, special).

        Special tokens are recognised inside the parts that say so and nowhere else: a chat can
        mark its template's own text, and what users wrote stays text, without a seam in the ids.
        """
        require_token(cancel)
        parts = list(parts)
        for part, _ in parts:
            _check_text(part)
        if bos and self.bos is None:
            problem = "bos=True, but this tokenizer has no BOS token"
            raise ParameterError(problem, field="bos", value=True, allowed="False")
        ids = [self.bos] if bos and self.bos is not None else []
        text, at, passed = "".join(part for part, _ in parts), 0, 0
        for part, special in parts:
            for start, end, token in self._find_specials(part) if special else ():
                between = text[at : passed + start]
                ids += self._text.encode(between, continuing=continuing, cancel=cancel)
                ids.append(token)
                at, continuing = passed + end, False
            passed += len(part)
        return ids + self._text.encode(text[at:], continuing=continuing, cancel=cancel)

    def _find_specials(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, end, id); user-defined tokens are a part of the plain text around them."""
        for start, end in self._specials.find(text):
            token = self._vocab.specials[text[start:end]]
            if self._vocab.types[token] != USER_DEFINED:
                yield start, end, token

    def decode(self, ids: Iterable[int], *, special: bool = False, continuing: bool = False) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD.

        Control tokens vanish, or show their text with `special=True`. The space that encoding
        puts before a text is dropped, except with `continuing=True`, which says that the ids
        follow others. Raises ParameterError for an id outside the vocabulary.
        """
        stream = self.stream(special=special, continuing=continuing)
        try:
            tokens = iter(ids)
        except TypeError:
            problem, allowed = f"ids is {type(ids).__name__}", "a sequence of token ids"
            problem = f"{problem}; expected {allowed}"
            raise ParameterError(problem, field="ids", value=ids, allowed=allowed) from None
        return b"".join(map(stream.bytes_of, tokens)).decode("utf-8", self._errors)

    def stream(self, *, special: bool = False, continuing: bool = False) -> "Stream":
        """A decoder that takes one id at a time; the options are those of `decode`."""
        return Stream(self, special, self._drops and not continuing, self._errors)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that the token stands for; for a control token, those of its name."""
        return self._text.token_bytes(self._checked(token))

    def token_text(self, token: int) -> str:
        """The token as the vocabulary writes it, such as "\u2581the", "<0x0A>" or "<|im_end|>"."""
        return self._vocab.tokens[self._checked(token)]

    def token_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary writes so: what `token_text` gives, reversed.

        None for a byte token, and where there is none of that name.
        """
        if not isinstance(text, str):
            problem = f"text is {type(text).__name__}; expected str"
            raise ParameterError(problem, field="text", value=text, allowed="str")
        return self._vocab.specials.get(text, self._vocab.ids.get(text))

    def is_control(self, token: int) -> bool:
        """Whether the token steers the model and is no part of the text."""
        return self._vocab.types[self._checked(token)] == CONTROL

    def is_special(self, token: int) -> bool:
        """Whether plain text never becomes this token, though it has a name: control or unknown."""
        return self._vocab.types[self._checked(token)] in (CONTROL, UNKNOWN)

    def opens_with_space(self, token: int) -> bool:
        """Whether the first byte is a space that encoding may have added.

        User-defined pieces may have it unescaped: llama.cpp's converter writes them so.
        """
        kind, first = self._vocab.types[token], self._vocab.tokens[token][0]
        spaces = "\u2581 " if kind == USER_DEFINED else "\u2581"
        return kind not in (CONTROL, UNKNOWN) and first in spaces

    def _checked(self, token: int) -> int:
        allowed = f"integer 0..{self.vocab_size - 1}"
        try:
            index = -1 if isinstance(token, bool) else operator.index(token)
        except TypeError:
            index = -1
        if not 0 <= index < self.vocab_size:
            problem = f"token id {shown(token)} is not allowed; expected {allowed}"
            raise ParameterError(problem, field="token", value=token, allowed=allowed)
        return index


class Stream:
    """Decodes ids one by one; the pieces joined are what `decode` gives for all of them.

    Half a character is held back until the rest arrives, until it is certain that none can, or
    until `flush`, which shows U+FFFD for it.
    """

    def __init__(self, tokenizer: Tokenizer, special: bool, drop_space: bool, errors: str) -> None:
        self._tokenizer, self._special, self._drop_space = tokenizer, special, drop_space
        self._drops, self._drop_all = tokenizer._drops, tokenizer._drop_all
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token_id: int) -> str:
        """The text that is certain after this token, often ""."""
        return self._decoder.decode(self.bytes_of(token_id))

    def flush(self) -> str:
        """What is still held back; the stream can go on afterwards."""
        return self._decoder.decode(b"", final=True)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes this token adds, in the order of the calls."""
        tokenizer = self._tokenizer
        if self._special and tokenizer.is_special(token_id):
            self._drop_space = self._drops  # `encode` adds one after every special token
            return tokenizer.token_text(token_id).encode()
        if tokenizer.is_control(token_id):
            return b""
        data = tokenizer.token_bytes(token_id)
        if self._drop_space:
            data = data[tokenizer.opens_with_space(token_id) :]
            self._drop_space = self._drop_all and not data
        return data


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise ParameterError(
            f"text is {type(text).__name__}; expected str", field="text", value=text, allowed="str"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ParameterError(
            f"text holds a lone surrogate, {shown(text[error.start])}, at {error.start}",
            field="text",
            value=text[error.start],
            allowed="valid Unicode",
            hint="Decode file names and raw bytes with errors='replace' first",
        ) from None
