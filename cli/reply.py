"""What `run` and `chat` share: loading a model with a bar, and showing a reply as it comes."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import edgellama
from edgellama.cli.background import Background, in_background
from edgellama.cli.sampling import settings_of
from edgellama.cli.spelling import plural
from edgellama.cli.terminal import Display, Terminal
from edgellama.control import CancelToken
from edgellama.errors import Cancelled, ContextOverflow, shown
from edgellama.paths import model_path

if TYPE_CHECKING:
    from edgellama.generate import Chunk, Usage

EVERY_TIME = "compiled at every start"  # in the warning of a cache that cannot be used
COMPILING, READING = "compiling kernels", "reading the prompt"  # what progress is told of


@dataclass(frozen=True)
class Running:
    """How a model is to be run: the options of that name."""

    runtime: str = "auto"
    device: str = "auto"
    threads: int | None = None
    context: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From a command's options by name."""
        return cls(*(values[name] for name in ("runtime", "device", "threads", "context")))


@dataclass(frozen=True)
class Wording:
    """How words are chosen, and when to stop; None leaves the library's default."""

    max_tokens: int | None = None
    stop: list[str] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From a command's options by name."""
        return cls(values["max_tokens"], values["stop"], settings_of(values))

    def params(self) -> "edgellama.Sampling":
        return edgellama.Sampling(**self.sampling)

    def limits(self, cancel: CancelToken) -> dict[str, Any]:
        """The arguments of `generate` and `chat` that end a reply."""
        return {"max_tokens": self.max_tokens, "stop": self.stop or (), "cancel": cancel}


@dataclass(frozen=True)
class Reply:
    """What a model answered; `usage` is None for one from a file."""

    text: str
    finish_reason: str | None = None
    usage: "Usage | None" = None
    interrupted: bool = False
    tokens: tuple[int, ...] = ()
    first_token_seconds: float | None = None  # from asking to the first token, all included

    def document(self) -> dict[str, Any]:
        """The part of a --json document that is about one reply."""
        usage = dataclasses.asdict(self.usage) if self.usage is not None else None
        return {"text": self.text, "finish_reason": self.finish_reason, "usage": usage}

    @property
    def position(self) -> int:
        """Tokens of the context that are taken, prompt and reply together."""
        return self.usage.prompt_tokens + self.usage.completion_tokens if self.usage else 0

    def footer(self, context: int | None = None) -> str:
        """One line: tokens, tokens per second of each phase, the context's share, why it ended."""
        if self.usage is None:
            return ""
        use = self.usage
        cached = f" ({use.reused_tokens} cached)" if use.reused_tokens else ""
        new = use.prompt_tokens - use.reused_tokens
        steps = use.completion_tokens - 1  # the first token is the prompt's doing
        parts = [
            f"prompt {plural(use.prompt_tokens, 'token')}{cached}{rate(new, use.prefill_seconds)}",
            f"reply {plural(use.completion_tokens, 'token')}{rate(steps, use.decode_seconds)}",
        ]
        if self.first_token_seconds is not None:
            parts.append(f"first token {self.first_token_seconds:.2f} s")
        if context is not None:
            parts.append(f"context {self.position}/{context}")
        if use.dropped_messages:
            parts.append(f"left out {plural(len(use.dropped_messages), 'message')}")
        elif use.dropped_tokens:
            parts.append(f"left out {plural(use.dropped_tokens, 'token')}")
        return " · ".join([*parts, *self._end()])

    def _end(self) -> list[str]:
        if self.interrupted:
            return ["stopped"]
        words = {"stop": "end of turn", "length": "cut at max_tokens"}
        words["context"] = "the context is full"
        if self.usage is not None and self.usage.stop_text is not None:
            words["stop"] = f"ended by the stop text {shown(self.usage.stop_text)}"
        return [words[self.finish_reason]] if self.finish_reason in words else []


def rate(tokens: int, seconds: float) -> str:
    """Speed, where there is any: " 45.1 t/s"."""
    if seconds <= 0 or tokens <= 0:
        return ""
    speed = tokens / seconds
    return f" {speed:.0f} t/s" if speed >= 100 else f" {speed:.1f} t/s"


def load_model(terminal: Terminal, name: str, how: Running) -> "edgellama.Model":
    """Load a model by path or name, showing what takes long; its warnings go to stderr."""
    path, cancel = model_path(name), CancelToken()
    with terminal.progress() as display:
        display.update(0, 0, "loading")
        model = in_background(
            lambda: edgellama.load(
                path,
                runtime=how.runtime,
                device=how.device,
                threads=how.threads,
                context=how.context,
                cancel=cancel,
                progress=display.update,
            ),
            cancel,
            idle=display.remind,
        )
    for warning in model.info.warnings:
        terminal.note(f"warning: {warning}")
    if COMPILING in display.took:
        terminal.note(compiled(display.took[COMPILING], model.info.warnings))
    return model


def compiled(seconds: float, warnings: Sequence[str]) -> str:
    """The remark on the compiler's work; whether it comes again, the model's warnings say."""
    once = "" if any(EVERY_TIME in text for text in warnings) else ", this once"
    return f"Compiled the kernels for this processor in {seconds:.1f} s{once}."


@contextlib.contextmanager
def context_told(model: "edgellama.Model") -> Iterator[None]:
    """A prompt that does not fit is refused in the words of the command line."""
    try:
        yield
    except ContextOverflow as error:
        more = error.have < model.info.model_context
        hint = f"Shorten it{', or give a larger --context' if more else ''}"
        raise ContextOverflow(error.need, error.have, hint) from error


def show_reply(
    terminal: Terminal,
    chunks: Callable[[], Iterable["Chunk"]],
    cancel: CancelToken,
    *,
    whole_lines: bool = True,
    before: Callable[[Display], None] | None = None,
    markdown: bool = False,
) -> Reply:
    """Write a reply's text as it comes (with --json: not at all) and return the whole of it.

    `whole_lines` ends the last line where the text does not. `before` is called ahead of `chunks`,
    with the display, to tell of reading the prompt; it may raise Cancelled. `markdown` sets the
    text as such, on a terminal. Ctrl-C ends the reply early, not the program: see `interrupted`.
    """
    heard = _Heard(terminal, markdown)
    with heard, ExitStack() as waiting:
        display = waiting.enter_context(terminal.progress())
        display.update(0, 0, READING)

        def work() -> "Iterable[Chunk]":
            if before is not None:
                with suppress(Cancelled):  # `chunks` has the same token, and ends with it
                    before(display)
            return chunks()

        with Background(work, cancel, idle=display.remind) as running:
            for chunk in running:
                waiting.close()  # the bar leaves before the first word
                heard.add(chunk)
    if whole_lines and not terminal.json:
        terminal.end_line()
    return heard.reply(running.interrupted)


class _Heard(ExitStack):
    """A reply as far as it has come; shown at once, but for --json."""

    def __init__(self, terminal: Terminal, markdown: bool) -> None:
        super().__init__()
        self._started, self._write = time.monotonic(), terminal.write
        self._shown, self._set = not terminal.json, markdown and sys.stdout.isatty()
        self._chunks: list[Chunk] = []
        self._first: float | None = None

    def add(self, chunk: "Chunk") -> None:
        if self._first is None and chunk.token is not None:
            self._first = time.monotonic() - self._started
        if self._shown and self._set and not self._chunks:
            from edgellama.cli.markdown import Page

            self._write = self.enter_context(Page()).write
        self._chunks.append(chunk)
        if self._shown:
            self._write(chunk.text)

    def reply(self, interrupted: bool) -> Reply:
        text = "".join(chunk.text for chunk in self._chunks)
        tokens = tuple(chunk.token for chunk in self._chunks if chunk.token is not None)
        last = self._chunks[-1] if self._chunks else None
        reason, usage = (last.finish_reason, last.usage) if last is not None else (None, None)
        return Reply(text, reason, usage, interrupted, tokens, self._first)


def finish(terminal: Terminal, reply: Reply, about: dict[str, Any]) -> None:
    """What follows a single reply: its speed, or the --json document; 130 if it was stopped."""
    if terminal.json:
        terminal.document(about | reply.document())
    else:
        terminal.note(reply.footer())
    if reply.interrupted:
        raise KeyboardInterrupt
