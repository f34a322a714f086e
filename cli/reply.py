"""What `run` and `chat` share: loading a model with a bar, and showing a reply as it comes."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import edgellama
from edgellama.cli.background import Background, in_background
from edgellama.cli.sampling import settings_of
from edgellama.cli.terminal import Terminal
from edgellama.control import CancelToken
from edgellama.paths import model_path

if TYPE_CHECKING:
    from edgellama.generate import Chunk, Usage


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
    text: str
    finish_reason: str | None
    usage: "Usage | None"
    interrupted: bool

    def document(self) -> dict[str, Any]:
        """The part of a --json document that is about one reply."""
        usage = dataclasses.asdict(self.usage) if self.usage is not None else None
        return {"text": self.text, "finish_reason": self.finish_reason, "usage": usage}

    def footer(self) -> str:
        """One line about speed: tokens, and tokens per second of each phase."""
        if self.usage is None:
            return ""
        use = self.usage
        kept = f", {use.reused_tokens} of them known" if use.reused_tokens else ""
        new = use.prompt_tokens - use.reused_tokens
        steps = use.completion_tokens - 1  # the first token is the prompt's doing
        parts = [
            f"prompt {use.prompt_tokens} tokens{kept}{_rate(new, use.prefill_seconds)}",
            f"reply {use.completion_tokens} tokens{_rate(steps, use.decode_seconds)}",
        ]
        reasons = {"length": "cut at --max-tokens", "context": "the context is full"}
        if self.finish_reason in reasons:
            parts.append(reasons[self.finish_reason])
        elif self.interrupted:
            parts.append("stopped")
        return "; ".join(parts)


def _rate(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:.1f} tokens/s" if seconds > 0 and tokens > 0 else ""


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
    return model


def show_reply(
    terminal: Terminal,
    chunks: Callable[[], Iterable["Chunk"]],
    cancel: CancelToken,
    *,
    whole_lines: bool = True,
) -> Reply:
    """Write a reply's text as it comes (with --json: not at all) and return the whole of it.

    `whole_lines` ends the last line where the text does not. Ctrl-C ends the reply early, not the
    program: see `interrupted`.
    """
    texts: list[str] = []
    last: Chunk | None = None
    with ExitStack() as waiting:
        display = waiting.enter_context(terminal.progress())
        display.update(0, 0, "reading the prompt")
        with Background(chunks, cancel, idle=display.remind) as running:
            for chunk in running:
                waiting.close()  # the bar leaves before the first word
                texts.append(chunk.text)
                if not terminal.json:
                    terminal.write(chunk.text)
                last = chunk
    if whole_lines and not terminal.json:
        terminal.end_line()
    reason = last.finish_reason if last is not None else None
    usage = last.usage if last is not None else None
    return Reply("".join(texts), reason, usage, running.interrupted)


def finish(terminal: Terminal, reply: Reply, about: dict[str, Any]) -> None:
    """What follows a single reply: its speed, or the --json document; 130 if it was stopped."""
    if terminal.json:
        terminal.document(about | reply.document())
    else:
        terminal.note(reply.footer())
    if reply.interrupted:
        raise KeyboardInterrupt
