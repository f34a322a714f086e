"""`edgellama run`: an answer to a prompt, or to each of a file; stdout gets the text alone."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.cli.prefill import ReadAhead
from edgellama.cli.reply import (
    Reply,
    Running,
    Wording,
    context_told,
    finish,
    load_model,
    show_reply,
)
from edgellama.cli.templates import Asked, asked_template, source_of, template_of
from edgellama.cli.terminal import Terminal
from edgellama.control import CancelToken
from edgellama.errors import EdgeLlamaError, ParameterError
from edgellama.regular_file import unreadable

if TYPE_CHECKING:
    import edgellama
    from edgellama.generate import Chunk

LONGEST_PROMPT = 16 << 20  # bytes; far beyond any context, and `yes |` never ends


@dataclass(frozen=True)
class Manner:
    """How prompts are to be answered: what the command line asks for."""

    how: Running
    wording: Wording
    raw: bool = False
    system: str | None = None
    template: str | None = None


@dataclass(frozen=True)
class Prompts:
    """Several prompts, and what stands between their replies."""

    texts: list[str]
    separator: str


def run_prompt(terminal: Terminal, name: str, prompt: str | None, manner: Manner) -> None:
    asked = _asked(manner)
    text = checked_prompt(stdin_text(terminal) if prompt in (None, "-") else prompt or "")
    with load_model(terminal, name, manner.how) as model:
        answering = _Answering(terminal, model, manner, asked)
        reply = answering.reply(text)
    finish(terminal, reply, answering.about)


def run_prompts(terminal: Terminal, name: str, prompts: Prompts, manner: Manner) -> None:
    """Each prompt is answered as if it were the only one."""
    asked, replies = _asked(manner), []
    with load_model(terminal, name, manner.how) as model:
        answering = _Answering(terminal, model, manner, asked)
        for number, text in enumerate(prompts.texts, 1):
            if number > 1 and not terminal.json:
                terminal.write(f"{prompts.separator}\n")
            try:
                reply = answering.reply(text)
            except EdgeLlamaError:
                terminal.note(f"prompt {number} of {len(prompts.texts)} failed:")
                raise
            replies.append({"prompt": text} | reply.document())
            terminal.note(f"prompt {number} of {len(prompts.texts)}: {reply.footer()}")
            if reply.interrupted:
                break
    if terminal.json:
        terminal.document(answering.about | {"replies": replies})
    if reply.interrupted:
        raise KeyboardInterrupt


_Reading = tuple[ReadAhead, Callable[[], Iterable["Chunk"]]]  # the prompt, and then the reply


class _Answering:
    """A loaded model, and how it is asked."""

    def __init__(
        self, terminal: Terminal, model: "edgellama.Model", manner: Manner, asked: Asked | None
    ) -> None:
        self.terminal, self.model, self.manner, self.asked = terminal, model, manner, asked
        self.params = manner.wording.params()
        self.chat = not manner.raw and (asked is not None or model.info.template is not None)
        if manner.system is not None and not self.chat:
            raise ParameterError("--system needs the chat template, which is not in use here")
        source = source_of(asked, model) if self.chat else None
        if self.chat:
            terminal.note(f"The chat template in use is {source}; --raw leaves it out.")
        elif not manner.raw:
            terminal.note("The file has no chat template: the model continues the text.")
        self.about: dict[str, Any] = {
            "model": str(model.info.path),
            "device": model.device,
            "chat": self.chat,
            "template_source": source,
        }

    def reply(self, text: str) -> Reply:
        cancel = CancelToken()
        ahead, chunks = (self._answer if self.chat else self._continuation)(text, cancel)
        with context_told(self.model):
            return ahead.counted(show_reply(self.terminal, chunks, cancel, before=ahead))

    def _answer(self, text: str, cancel: CancelToken) -> _Reading:
        model, system, session = self.model, self.manner.system, self.model.session()
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        template, limits = template_of(self.asked, model), self.manner.wording.limits(cancel)
        how: dict[str, Any] = {"template": template, "session": session, **limits}

        def ids() -> list[int]:
            return model.fitted(messages, template=template, overflow="error", cancel=cancel).ids

        return (
            ReadAhead(session, ids, cancel),
            lambda: model.chat(messages, self.params, **how),
        )

    def _continuation(self, text: str, cancel: CancelToken) -> _Reading:
        model, session, tokenizer = self.model, self.model.session(), self.model.tokenizer
        limits = self.manner.wording.limits(cancel)

        def ids() -> list[int]:
            return tokenizer.encode(text, bos=tokenizer.add_bos, cancel=cancel)

        return (
            ReadAhead(session, ids, cancel),
            lambda: model.generate(text, self.params, session=session, **limits),
        )


def _asked(manner: Manner) -> Asked | None:
    asked = asked_template(manner.template)
    if asked is not None and manner.raw:
        raise ParameterError("--template and --raw contradict each other")
    manner.wording.params()  # complains before a model is loaded
    return asked


# --- prompts --------------------------------------------------------------------------------------


def prompts_of(terminal: Terminal, file: Path, separator: str | None) -> Prompts:
    """The prompts in a file (`-`: stdin): one a line, or with a separator, what stands between
    lines that hold it alone. Empty ones are left out.
    """
    if file == Path("-"):
        text = stdin_text(terminal)
    else:
        try:
            with file.open("rb") as stream:  # it may be a pipe
                data = stream.read(LONGEST_PROMPT + 1)
        except OSError as error:
            raise unreadable(file, error) from error
        text = _decoded(data, f"--file {file.name}", EdgeLlamaError)
    lines = text.replace("\r\n", "\n").split("\n")
    texts = lines if separator is None else _blocks(lines, separator)
    kept = [checked_prompt(text) for text in texts if text.strip()]
    if not kept:
        raise EdgeLlamaError(f"--file {file.name} holds no prompt")
    return Prompts(kept, separator or "")


def _blocks(lines: list[str], separator: str) -> list[str]:
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line == separator:
            blocks.append([])
        else:
            blocks[-1].append(line)
    return ["\n".join(block).strip("\n") for block in blocks]


def stdin_text(terminal: Terminal) -> str:
    """All of stdin as one text, less its last line break. Raises ParameterError."""
    if sys.stdin is None or sys.stdin.closed:
        raise ParameterError("there is no prompt: none was given, and stdin is closed")
    if sys.stdin.isatty():
        terminal.note("Type the prompt; Ctrl-D on an empty line ends it.")
    text = _decoded(sys.stdin.buffer.read(LONGEST_PROMPT + 1), "the prompt on stdin")
    return text.removesuffix("\n").removesuffix("\r")


def _decoded(data: bytes, what: str, kind: type[EdgeLlamaError] = ParameterError) -> str:
    if len(data) > LONGEST_PROMPT:
        raise kind(f"{what} is longer than {LONGEST_PROMPT} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise kind(f"{what} is not UTF-8: {error}") from error


def checked_prompt(prompt: str, hint: str = "Give it as an argument or on stdin") -> str:
    """The prompt if it can be one, else ParameterError, with the hint for an empty one."""
    if not prompt:
        raise ParameterError("the prompt is empty", hint=hint)
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ParameterError("the prompt is not valid text in this terminal's encoding")
    return prompt
