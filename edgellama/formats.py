"""A prompt format in code: turns a conversation into token ids, control tokens by id, not as text.

Knows what a format is made of, and no format: `formats_named.py` has those. Knows nothing about
Jinja, models or sessions.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edgellama.control import CancelToken
from edgellama.errors import ParameterError, shown
from edgellama.messages import checked_messages, roles_of

TURNS = ("user", "assistant")
SPACE = "\u2581"  # SentencePiece's mark for a space


class FormatTokenizer(Protocol):
    """The part of a tokenizer that a format needs."""

    bos: int | None
    eos: tuple[int, ...]
    add_bos: bool

    @property
    def special_texts(self) -> frozenset[str]: ...
    def token_id(self, text: str, /) -> int | None: ...
    def encode(
        self, text: str, /, *, continuing: bool = False, cancel: CancelToken | None = None
    ) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Token:
    """A token that a format writes by its id; `text` is the name it has in the vocabulary."""

    text: str


BOS, EOS = Token("<s>"), Token("</s>")  # the vocabulary's own, whatever their names
APART = Token("")  # no token: what follows is encoded by itself, as a text of its own
Piece = str | Token


@dataclass(frozen=True, slots=True)
class Talk:
    """A checked conversation, as a format's layout gets it."""

    system: str | None
    turns: list[tuple[str, str]]  # role and text, without the system message
    date: str  # of today, as "26 Jul 2024"
    context: str | None = None  # the last message's own "input" (Alpaca)

    @property
    def pairs(self) -> Iterator[tuple[str, str | None]]:
        """User text and its answer, None behind the last; for roles that alternate."""
        texts = [text for _, text in self.turns]
        for at in range(0, len(texts), 2):
            yield texts[at], texts[at + 1] if at + 1 < len(texts) else None


@dataclass(frozen=True)
class ChatFormat:
    """One of the named formats; see `formats_named.py` for what each is exact against."""

    name: str
    layout: Callable[[Talk], Iterable[Piece]]
    stops: tuple[str, ...] = ()  # texts that begin the next turn: a reply ends before them
    end_tokens: tuple[str, ...] = ()  # tokens that end a turn, beside the vocabulary's own
    tokens: tuple[str, ...] = ()  # all others that the layout may write
    tags: tuple[str, ...] = ()  # plain text that steers the model: refused in messages
    roles: tuple[str, ...] = ("system", *TURNS)
    alternating: bool = True  # user, assistant, ..., user
    single: bool = False  # made for one instruction and its answer
    bos: bool = True  # put in front where the vocabulary wants it and the layout wrote none
    clock: Callable[[], str] = lambda: ""  # today's date

    @property
    def source(self) -> str:
        """What `info` shows for a template: the name."""
        return self.name

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, bos: str = BOS.text, eos: str = EOS.text
    ) -> str:
        """The conversation as one text, for people; a model is to get the ids of `encode`."""
        names = {BOS: bos, EOS: eos}
        pieces = self.pieces(checked_messages(messages))
        return "".join(p if isinstance(p, str) else names.get(p, p.text) for p in pieces)

    def encode(
        self,
        tokenizer: FormatTokenizer,
        messages: Sequence[Mapping[str, Any]],
        cancel: CancelToken | None = None,
    ) -> list[int]:
        """The ids of a conversation, up to where the model answers.

        No text of a message becomes a token that the format writes, whatever it looks like.
        Raises ParameterError for messages that the format has no place for, and for a vocabulary
        without its tokens; Cancelled.
        """
        pieces = self.pieces(checked_messages(messages))
        encoder = _Encoder(self, tokenizer, cancel)
        ids = [i for piece in [*pieces, APART] for i in encoder.ids(piece)]
        if self.bos and tokenizer.add_bos and ids[:1] != [tokenizer.bos]:
            assert tokenizer.bos is not None
            ids.insert(0, tokenizer.bos)
        return ids

    def ends(self, tokenizer: FormatTokenizer) -> tuple[int, ...]:
        """The ids that end a turn, beside `tokenizer.eos`."""
        found = (tokenizer.token_id(text) for text in self.end_tokens)
        return tuple(i for i in found if i is not None)

    def pieces(self, messages: list[dict[str, Any]]) -> list[Piece]:
        """Texts and tokens of checked messages; ParameterError for those it has no place for."""
        turns = [(message["role"], message["content"]) for message in messages]
        system = turns.pop(0)[1] if turns[0][0] == "system" else None
        problem = self._problem(messages, [role for role, _ in turns])
        if problem:
            raise ParameterError(
                f"the format {self.name}: {problem}; roles: {roles_of(messages)}",
                field="messages",
                allowed=self._order(),
            )
        self._check_tags(messages)
        context = messages[-1].get("input")
        if context is not None and not isinstance(context, str):
            raise ParameterError(f"messages[-1]['input'] is {shown(context)}; expected text")
        return list(self.layout(Talk(system, turns, self.clock(), context)))

    def _problem(self, messages: list[dict[str, Any]], roles: list[str]) -> str | None:
        """What is wrong with the order of the messages; `roles` are without the system's."""
        for message in messages:
            if message["role"] not in self.roles:
                return f"it has no place for a {message['role']} message"
        if "system" in roles and self.alternating:
            return "a system message comes first, and once"
        if not roles or roles[-1] == "assistant":
            return "the last message must be the user's"
        if self.single and len(roles) > 1:
            return "it is made for a single instruction, without earlier turns"
        if self.alternating and roles != [TURNS[i % 2] for i in range(len(roles))]:
            return "user and assistant must take turns, the user first"
        return None

    def _order(self) -> str:
        system = "an optional system message, then " if "system" in self.roles else ""
        if self.single:
            return system + "one user message"
        if self.alternating:
            return system + "user, assistant, ..., user"
        return "messages of " + ", ".join(self.roles) + ", the last one not the assistant's"

    def _check_tags(self, messages: list[dict[str, Any]]) -> None:
        for index, message in enumerate(messages):
            tag = next((tag for tag in self.tags if tag in message["content"]), None)
            if tag is not None and message["role"] != "assistant":
                raise ParameterError(
                    f"messages[{index}]['content'] holds {shown(tag)}, which the format "
                    f"{self.name} writes itself and the model could not tell apart",
                    field=f"messages[{index}]['content']",
                    hint="Write it differently, with a space inside for example",
                )


class _Encoder:
    """Gathers text until a token parts it; then encodes it whole, as the tokenizer would."""

    def __init__(
        self, form: ChatFormat, tokenizer: FormatTokenizer, cancel: CancelToken | None
    ) -> None:
        self._form, self._tokenizer, self._text = form, tokenizer, ""
        self._guard = Guard(tokenizer, (*form.tokens, *form.end_tokens), cancel)

    def ids(self, piece: Piece) -> list[int]:
        if isinstance(piece, str):
            self._text += piece
            return []
        ids, self._text = self._guard.encode(self._text), ""
        return ids if piece is APART else [*ids, self._id_of(piece)]

    def _id_of(self, token: Token) -> int:
        tokenizer = self._tokenizer
        found = tokenizer.token_id(token.text)
        if token == BOS:
            found = tokenizer.bos
        elif token == EOS and token.text not in tokenizer.special_texts:
            found = next(iter(tokenizer.eos), None)
        if found is None:
            raise ParameterError(
                f"the format {self._form.name} needs the token {shown(token.text)}, which this "
                "model's vocabulary lacks",
                field="template",
                value=self._form.name,
                hint="Choose the format that the model was trained with",
            )
        return found


class Guard:
    """Encodes texts that must not turn into certain tokens, whatever they look like.

    Control tokens never come from plain text. Some files declare such tokens user-defined, and
    those do: their look-alikes are cut behind the first character, and both parts encoded.
    """

    def __init__(
        self, tokenizer: FormatTokenizer, names: Iterable[str], cancel: CancelToken | None = None
    ) -> None:
        self._tokenizer, self._cancel = tokenizer, cancel
        harmless = tokenizer.special_texts
        exposed = {
            name.lstrip(f" {SPACE}")
            for name in names
            if name not in harmless and tokenizer.token_id(name) is not None
        }
        plain = "|".join(map(re.escape, sorted(exposed)))
        self._lookalike = re.compile(f"(?={plain})") if plain else None

    def encode(self, text: str, *, continuing: bool = False) -> list[int]:
        ids, at = [], 0
        for match in self._lookalike.finditer(text) if self._lookalike else ():
            ids += self._encode(text[at : match.start() + 1], continuing)
            at, continuing = match.start() + 1, True
        return ids + self._encode(text[at:], continuing)

    def _encode(self, text: str, continuing: bool) -> list[int]:
        return self._tokenizer.encode(text, continuing=continuing, cancel=self._cancel)
