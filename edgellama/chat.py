"""Conversations as the model was trained to see them: chat templates and their token ids.

Knows nothing about models or sessions. `sandbox.py` runs the template's code, on a budget.
"""

import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from edgellama.control import CancelToken
from edgellama.errors import EdgeLlamaError, ParameterError, TemplateError, shown
from edgellama.messages import checked_messages, roles_of

if TYPE_CHECKING:
    from edgellama.sandbox import Program

MOST_TEMPLATE = 2**20  # characters
MOST_CONTROL = 1024  # characters of a control token: 8 times the longest seen
FROM_FILE = "the file's own, which comes first"
NO_TEMPLATE = "none: the file has no chat template, as base models have none"
TURN_ENDS = ("<step>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_turn|>")
TAG = re.compile(r"<.+>|\[.+\]")  # spaces and line breaks may be user-defined tokens too
MARKERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # noncharacters, reserved for inner use


class ChatTokenizer(Protocol):
    """The part of a tokenizer that a conversation needs."""

    bos: int | None
    add_bos: bool

    @property
    def special_texts(self) -> frozenset[str]: ...
    @property
    def user_defined_texts(self) -> frozenset[str]: ...
    def token_id(self, text: str, /) -> int | None: ...
    def encode_parts(
        self,
        parts: Iterable[tuple[str, bool]],
        /,
        *,
        continuing: bool = False,
        cancel: CancelToken | None = None,
    ) -> list[int]: ...


class ChatTemplate:
    """A Jinja chat template, as files carry it. Usable from any thread.

    Nothing of `source` is looked at before the first rendering: a damaged template does not keep
    a model from continuing text.
    """

    stops: tuple[str, ...] = ()  # unlike the formats in code, nothing is known of its texts

    def __init__(
        self,
        source: str,
        *,
        bos: str = "",
        eos: str = "",
        path: str | Path | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`bos` and `eos` are the texts of those tokens, `clock` is what strftime_now shows."""
        self.source, self.bos, self.eos, self.path = source, bos, eos, path
        self._clock, self._lock = clock, threading.Lock()

    def __repr__(self) -> str:
        return f"<ChatTemplate {shown(self.source)}>"

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text.

        `messages` are dicts of plain JSON values with a `role` (system, user, assistant, tool)
        and a text `content`. Raises ParameterError for others, and for a system message that the
        template leaves out; TemplateError for a template that is damaged, unsafe, over its budget,
        or refuses the messages.
        """
        return self.render_checked(checked_messages(messages), add_generation_prompt)

    def render_checked(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """`render` for messages that `checked_messages` has returned."""
        text = self._rendered(messages, add_generation_prompt)
        for at, message in enumerate(messages):
            if message["role"] != "system" or message["content"].strip() in text:
                continue
            # Some templates change it, or take a switch out of it; then without it they differ.
            without = [*messages[:at], message | {"content": ""}, *messages[at + 1 :]]
            if self._rendered(without, add_generation_prompt) == text:
                raise ParameterError(
                    f"the chat template leaves the system message out; roles: {roles_of(messages)}",
                    path=self.path,
                    field="messages",
                    hint="Put its text into the first user message",
                )
        return text

    def _rendered(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        variables = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos,
            "eos_token": self.eos,
            "tools": None,
            "documents": None,
        }
        with self._lock:
            try:
                return self._program.render(variables, sum(map(len, _texts(messages))))
            except Exception as error:  # whatever a stranger's program may cause
                raise self._explained(error, messages) from None

    @cached_property
    def _program(self) -> "Program":
        if not isinstance(self.source, str):
            raise self.error(f"expected text, found {type(self.source).__name__}")
        if len(self.source) > MOST_TEMPLATE:
            raise self.error(f"{len(self.source)} characters; at most {MOST_TEMPLATE} are allowed")
        from edgellama.sandbox import Program

        return Program(self.source, self._clock)

    def encode(
        self,
        tokenizer: ChatTokenizer,
        messages: Sequence[Mapping[str, Any]],
        cancel: CancelToken | None = None,
    ) -> list[int]:
        """The ids of a conversation, up to where the model answers: see `encode_chat`."""
        return encode_chat(self, tokenizer, messages, cancel=cancel)

    def ends(self, tokenizer: ChatTokenizer) -> tuple[int, ...]:
        """The ids of tokens that the template writes behind a turn, beside `tokenizer.eos`."""
        written = (name for name in TURN_ENDS if name in self.source)
        return tuple(i for i in map(tokenizer.token_id, written) if i is not None)

    def _explained(self, error: Exception, messages: list[dict[str, Any]]) -> EdgeLlamaError:
        """The TemplateError for anything that compiling or rendering has raised."""
        from edgellama.sandbox import Refusal

        if isinstance(error, EdgeLlamaError):
            return error
        if isinstance(error, Refusal):
            hint = f"The roles were: {roles_of(messages)}"
            return self.error(f"it refuses the messages: {shown(error.args[0])}", hint)
        if isinstance(error, RecursionError | MemoryError):
            return self.error("it nests or calls itself too deeply")
        line = getattr(error, "lineno", None)
        where = f"line {line}: " if isinstance(line, int) else ""
        return self.error(f"{where}{type(error).__name__}: {shown(str(error))}")

    def error(self, problem: str, hint: str | None = None) -> TemplateError:
        """What is wrong with the template, told in the usual way."""
        return TemplateError(problem, path=self.path, where="chat template", hint=hint)


def template_from_gguf(
    metadata: Mapping[str, Any], path: str | Path | None = None
) -> ChatTemplate | None:
    """The template under the GGUF key `tokenizer.chat_template`, or None without one."""
    source = metadata.get("tokenizer.chat_template")
    if source is None:
        return None
    bos, eos = (_token_text(metadata, name) for name in ("bos", "eos"))
    return ChatTemplate(source, bos=bos, eos=eos, path=path)


def _token_text(metadata: Mapping[str, Any], name: str) -> str:
    """The text of a special token; "" where there is none (the tokenizer reports damage)."""
    index = metadata.get(f"tokenizer.ggml.{name}_token_id")
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(tokens):
        return ""
    return tokens[index] if isinstance(tokens[index], str) else ""


def encode_chat(
    template: ChatTemplate,
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    cancel: CancelToken | None = None,
) -> list[int]:
    """The ids of a conversation: control tokens where the template writes them, nowhere else.

    A message's text never becomes a control token, whatever it looks like, nor a user-defined one
    that the template writes: some files declare `<|im_end|>` so. The ids are those of
    the whole rendered text, BOS in front once, if the tokenizer wants it or the template wrote it.
    Raises what `ChatTemplate.render` raises, TemplateError for an empty prompt and for control
    tokens of more than 1,024 characters, and Cancelled.
    """
    checked = checked_messages(messages)
    lookalikes = _lookalikes(tokenizer, template.source)
    if lookalikes.longest > MOST_CONTROL:
        problem = f"the vocabulary has a control token of {lookalikes.longest} characters"
        raise template.error(problem, f"At most {MOST_CONTROL} can be told from messages' text")
    marker, roles = lookalikes.mark(checked, cancel), roles_of(checked)
    text = template.render_checked(checked, add_generation_prompt)
    if not text.replace(template.bos, "").strip():
        raise template.error("it writes nothing for these messages", f"The roles were: {roles}")
    runs = lookalikes.runs(text, marker)
    ids: list[int] = []
    for number, run in enumerate(runs):
        ids += tokenizer.encode_parts(run, continuing=number > 0, cancel=cancel)
    bos = tokenizer.bos
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    if tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
        ids.insert(0, bos)
    return ids


class _Lookalikes:
    """Finds what looks like a control token, and tells messages' text from the template's.

    A marker is put inside every look-alike of the messages before rendering: behind its first
    character, so that templates which trim or test the text's ends hardly notice. A control token
    found in the rendered text is the template's own.
    """

    def __init__(self, controls: frozenset[str], exposed: frozenset[str]) -> None:
        """`exposed` are the user-defined ones, which a tokenizer finds wherever they stand."""
        texts = controls | exposed
        self.exposed = re.compile("|".join(map(re.escape, sorted(exposed))) or "(?!)")
        ordered = sorted(texts, key=len, reverse=True)
        plain = "|".join(map(re.escape, ordered)) or "(?!)"
        self.start_of_any = re.compile(f"(?={plain})")
        # Nothing fits inside a single character, so its marker stands behind it.
        single = f"(?![{MARKERS[0]}-{MARKERS[-1]}])"
        own = [re.escape(text) + (single if len(text) == 1 else "") for text in ordered]
        self.any = re.compile("|".join(own) or "(?!)")
        self.sorted, self.mirrored = sorted(texts), sorted(text[::-1] for text in texts)
        self.longest = max(map(len, texts), default=1)

    def mark(self, messages: list[dict[str, Any]], cancel: CancelToken | None = None) -> str:
        """Mark all texts but the roles, in place; returns the marker, which no text held."""
        texts = "\0".join(_texts(messages))
        marker = next((char for char in MARKERS if char not in texts), "")
        if not marker:
            raise ParameterError("the messages hold all of Unicode's noncharacters U+FDD0..U+FDEF")
        for message in messages:
            if cancel:
                cancel.check("encode")
            for key in message.keys() - {"role"}:
                message[key] = self._marked(message[key], marker)
        return marker

    def _marked(self, value: Any, marker: str) -> Any:
        if isinstance(value, list):
            return [self._marked(item, marker) for item in value]
        if isinstance(value, dict):
            marked = {self._marked(key, marker): item for key, item in value.items()}
            return {key: self._marked(item, marker) for key, item in marked.items()}
        if not isinstance(value, str):
            return value
        places = {match.start() + 1 for match in self.start_of_any.finditer(value)}
        places |= self._at_the_ends(value)
        return marker.join(value[a:b] for a, b in pairwise([0, *sorted(places), len(value)]))

    def _at_the_ends(self, text: str) -> set[int]:
        """Where to mark halves that could become whole together with what stands next to them.

        Templates trim, so the ends without white space count too.
        """
        places = set()
        for end in {len(text), len(text.rstrip())}:
            starts = range(max(0, end - self.longest), end)
            places |= {at + 1 for at in starts if _has_longer(self.sorted, text[at:end])}
        for start in {0, len(text) - len(text.lstrip())}:
            ends = range(start + 1, min(len(text), start + self.longest) + 1)
            halves = (text[start:at][::-1] for at in ends)
            places |= {start for half in halves if _has_longer(self.mirrored, half)}
        return places

    def runs(self, text: str, marker: str) -> list[list[tuple[str, bool]]]:
        """The rendered text without markers, and whether control tokens in it are meant.

        Only what stands between two control tokens is ever apart from its surroundings, so cutting
        there changes no ids. A new run, to be encoded by itself, begins inside each look-alike of
        an exposed token.
        """
        if marker not in text:
            return [[(text, True)]]
        runs, meant, at = [[("", True)]], "", 0
        for match in [*self.any.finditer(text), None]:
            between = text[at : match.start() if match else len(text)]
            if marker in between:
                first, *others = self._cut(between, marker)
                runs[-1] += [(meant, True), (first, False)]
                runs += [[(part, False)] for part in others]
                meant = ""
            else:
                meant += between
            if match:
                meant, at = meant + match[0], match.end()
        runs[-1].append((meant, True))
        return runs

    def _cut(self, text: str, marker: str) -> list[str]:
        plain = text.replace(marker, "")
        return text.split(marker) if self.exposed.search(plain) else [plain]


def _has_longer(ordered: list[str], text: str) -> bool:
    """Whether one of the sorted texts begins so and goes on; it is the next one, if any."""
    following = bisect_right(ordered, text)
    return following < len(ordered) and ordered[following].startswith(text)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


_known: "WeakKeyDictionary[ChatTokenizer, dict[frozenset[str], _Lookalikes]]"
_known = WeakKeyDictionary()


def _lookalikes(tokenizer: ChatTokenizer, source: str) -> _Lookalikes:
    """Those of a tokenizer with a template: of its user-defined tokens, the tags it writes."""
    tags = filter(TAG.fullmatch, tokenizer.user_defined_texts)
    exposed = frozenset(tag for tag in tags if tag in str(source))
    known = _known.setdefault(tokenizer, {})
    if exposed not in known:
        known[exposed] = _Lookalikes(tokenizer.special_texts, exposed)
    return known[exposed]
