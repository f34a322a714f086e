"""A loaded model, as an embedding app uses it: sessions, generate, chat.

Knows nothing about operators, formats of weights or terminals.
"""

import os
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypedDict, Unpack

from edgellama.chat import FROM_FILE, NO_TEMPLATE, ChatTemplate, template_from_gguf
from edgellama.control import CancelToken, require_token
from edgellama.errors import Cancelled, ForkedProcess, ParameterError, TemplateError
from edgellama.formats import ChatFormat
from edgellama.formats_named import chosen_template
from edgellama.generate import Chunk, cancelled
from edgellama.gguf import GGUF
from edgellama.graph import Graph
from edgellama.infill import infill_ids, infill_tokens
from edgellama.overflow import Fitted, Overflow, fitted
from edgellama.runtimes.base import Options, Runtime
from edgellama.sampling import Sampling
from edgellama.session import Session, restored
from edgellama.stop import checked_stops
from edgellama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgellama.asynchronous import AsyncChunks
    from edgellama.generate import Ids


# What every model.device has, also where a runtime says nothing of it.
DEVICE = ("runtime", "device", "providers", "threads", "isa", "reason")


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model is, and what it costs."""

    path: Path
    file_bytes: int
    architecture: str
    types: dict[str, int]  # tensors by type
    bits_per_weight: float
    parameters: int
    context: int  # tokens a session holds
    model_context: int  # tokens the model was made for
    template: str | None  # the chat template's text
    template_source: str  # where it is from, and why it was chosen
    memory: dict[str, int]  # bytes by purpose
    warnings: list[str] = field(default_factory=list)


class Model:
    """A loaded model. Safe to use from any thread; sessions take turns, step by step.

    A context manager: leaving it, or `close()`, frees the memory at once.
    """

    def __init__(
        self,
        file: GGUF,
        graph: Graph,
        tokenizer: Tokenizer,
        runtime: Runtime,
        options: Options,
        warnings: list[str],
    ) -> None:
        self.config, self.graph, self.tokenizer = graph.config, graph, tokenizer
        self.device: dict[str, Any] = dict.fromkeys(DEVICE)
        self.device |= {"providers": []} | runtime.describe()
        self._runtime: Runtime | None = runtime
        self._pid, self._paths = os.getpid(), file.paths
        self._deterministic = options.deterministic
        self._template = template_from_gguf(file.metadata, file.path)
        self._infill_tokens = infill_tokens(file.metadata, tokenizer)
        self.info = self._describe(file, options, [*warnings, *runtime.warnings])

    def _describe(self, file: GGUF, options: Options, warnings: list[str]) -> ModelInfo:
        assert self._runtime is not None
        n_bytes = sum(file.tensors[name].n_bytes for name in self.graph.weights)
        return ModelInfo(
            path=file.path,
            file_bytes=file.n_bytes,
            architecture=str(file.metadata["general.architecture"]),
            types=dict(Counter(info.type.name for info in file.tensors.values())),
            bits_per_weight=8 * n_bytes / self.config.n_parameters,
            parameters=self.config.n_parameters,
            context=options.context,
            model_context=self.config.context_length,
            template=self._template.source if self._template else None,
            template_source=FROM_FILE if self._template else NO_TEMPLATE,
            memory=self._runtime.memory(),
            warnings=warnings,
        )

    # --- life -----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model cannot be copied, nor sent to another process: load it there")

    def close(self) -> None:
        """Free the weights and the threads; calling it twice is harmless."""
        runtime = self._runtime
        if runtime is not None:
            runtime.close()
            self._runtime = None  # last: closing that a signal broke off can be done again

    def session(self) -> Session:
        """A new conversation: an empty key/value cache."""
        return Session(self, self._opened().session())

    def restore(
        self, path: "str | os.PathLike[str]", *, cancel: CancelToken | None = None
    ) -> Session:
        """A session that goes on where the one that `Session.save` wrote has stopped.

        Its next logits have the same bits (cpu runtime; with deterministic=True also those of a
        session that has just read the same ids). The file must be of this model, runtime and
        kv_type, and is checked before anything in it is used. Raises ModelFormatError,
        UnsupportedModelError, ParameterError, ContextOverflow, Cancelled, ForkedProcess.
        """
        exact = self._deterministic
        return restored(self, self._opened().session(), path, exact=exact, cancel=cancel)

    def _opened(self) -> Runtime:
        if os.getpid() != self._pid:
            raise ForkedProcess("the model was loaded before this process forked; load it here")
        if self._runtime is None:
            raise ParameterError("the model is closed")
        return self._runtime

    # --- text -----------------------------------------------------------------------------------

    def generate(
        self,
        prompt: "str | Ids",
        params: Sampling | None = None,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
        cancel: CancelToken | None = None,
        special: bool = False,
    ) -> Generator[Chunk, None, None]:
        """Continue a prompt; one Chunk a token.

        A string gets BOS iff the file says so, and its look-alikes of special tokens stay text
        unless `special`; ids are taken as they are. With a `session` whose tokens begin the
        prompt, only the rest is computed. max_tokens None: to the end of the text or of the
        context. Raises ContextOverflow, ParameterError, NonFiniteError.
        """
        own = self._own(session, cancel)
        if isinstance(prompt, str):
            try:
                prompt = self.tokenizer.encode(
                    prompt, special=special, bos=self.tokenizer.add_bos, cancel=cancel
                )
            except Cancelled:
                return cancelled()
        elif not isinstance(prompt, Iterable) or isinstance(prompt, bytes | bytearray):
            raise ParameterError(
                f"prompt is {type(prompt).__name__}; expected text or token ids",
                field="prompt",
                value=prompt,
                allowed="a str or a sequence of ids",
            )
        return own.generate(prompt, params, max_tokens=max_tokens, stop=stop, cancel=cancel)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: Sampling | None = None,
        *,
        template: str | ChatTemplate | ChatFormat | None = None,
        overflow: Overflow = "error",
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
        cancel: CancelToken | None = None,
    ) -> Generator[Chunk, None, None]:
        """Answer the last message of a conversation; one Chunk a token.

        messages: dicts with `role` and `content`. template, instead of the file's: the name of a
        format, such as "llama-2" (all: `edgellama.formats_named.FORMATS`), or Jinja text. A
        format's own stop texts end the reply as `stop` does. Pass the same `session` for the next
        turn, and only new tokens are computed. overflow: what to do with a conversation that is too
        long, see `fitted`; the last chunk's usage says what was left out. Raises what `generate`
        raises, and TemplateError if there is no template or it refuses.
        """
        own, chosen = self._own(session, cancel), self._chosen(template)
        try:
            fitting = self.fitted(
                messages, template=chosen, overflow=overflow, max_tokens=max_tokens, cancel=cancel
            )
        except Cancelled:
            return cancelled()
        return own.generate(
            fitting.ids,
            params,
            max_tokens=max_tokens,
            stop=[*checked_stops(stop), *chosen.stops],
            cancel=cancel,
            continuing=False,
            ends=chosen.ends(self.tokenizer),
            same_text=True,
            dropped=fitting.dropped_tokens,
            dropped_messages=fitting.dropped_messages,
        )

    def fitted(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | ChatTemplate | ChatFormat | None = None,
        overflow: Overflow = "shift",
        max_tokens: int | None = None,
        cancel: CancelToken | None = None,
    ) -> Fitted:
        """What `chat` would give the model: the ids, and which messages it would leave out.

        overflow: "error" leaves nothing out; "shift" leaves out as many of the oldest turns as
        have no room, and keeps the system message; "drop-oldest" begins with that. Whole turns
        only, and never the last. A quarter of the context, or max_tokens if that is less, is kept
        free for the reply. Raises ContextOverflow if that does not help; Cancelled.
        """
        require_token(cancel)
        chosen = self._chosen(template)
        return fitted(
            messages,
            lambda some: chosen.encode(self.tokenizer, some, cancel),
            overflow=overflow,
            context=self.info.context,
            max_tokens=max_tokens,
        )

    def _own(self, session: Session | None, cancel: CancelToken | None) -> Session:
        """The session given, or a new one; another model's holds other keys and values."""
        require_token(cancel)
        if session is None:
            return self.session()
        if not isinstance(session, Session):
            allowed = "a Session or None"
            problem = f"session is {type(session).__name__}; allowed: {allowed}"
            raise ParameterError(problem, field="session", value=session, allowed=allowed)
        if session.model is not self:
            problem, allowed = "the session belongs to another model", "a session of this one"
            raise ParameterError(problem, field="session", value=session, allowed=allowed)
        return session

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | ChatTemplate | ChatFormat | None = None,
    ) -> list[int]:
        """The ids of a conversation, ready for the model's next answer."""
        return self._chosen(template).encode(self.tokenizer, messages)

    def _chosen(
        self, template: str | ChatTemplate | ChatFormat | None
    ) -> ChatTemplate | ChatFormat:
        """What was asked for, else the file's own; nothing is guessed."""
        if template is not None:
            return chosen_template(template, self.tokenizer)
        if self._template is None:
            raise TemplateError(
                "the file has no chat template: this is a base model, made to continue text",
                path=self.info.path,
                hint="Use generate (or `edgellama run --raw`), or pass template= the format that "
                "it was trained with",
            )
        return self._template

    def infill(
        self,
        prefix: str,
        suffix: str,
        params: Sampling | None = None,
        *,
        suffix_first: bool = False,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        cancel: CancelToken | None = None,
    ) -> str:
        """The text between prefix and suffix, as it is to be inserted; Code Llama can do that.

        suffix_first puts the suffix before the prefix in the prompt. Raises UnsupportedModelError
        for a model without infilling tokens, Cancelled, and what `generate` raises.
        """
        chunks = list(
            self.infill_chunks(
                prefix,
                suffix,
                params,
                suffix_first=suffix_first,
                max_tokens=max_tokens,
                stop=stop,
                cancel=cancel,
            )
        )
        if chunks[-1].finish_reason == "cancelled":
            raise Cancelled("infill was cancelled")
        return "".join(chunk.text for chunk in chunks)

    def infill_chunks(
        self,
        prefix: str,
        suffix: str,
        params: Sampling | None = None,
        *,
        suffix_first: bool = False,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
        cancel: CancelToken | None = None,
    ) -> Generator[Chunk, None, None]:
        """`infill` as it comes, one Chunk a token; the last one says why it ended."""
        tokens, own = self._infill_tokens, self._own(session, cancel)
        try:
            ids = infill_ids(
                tokens,
                self.tokenizer,
                prefix,
                suffix,
                suffix_first=suffix_first,
                path=self.info.path,
                cancel=cancel,
            )
        except Cancelled:
            return cancelled()
        assert tokens is not None
        return own.generate(
            ids, params, max_tokens=max_tokens, stop=stop, cancel=cancel, ends=[tokens.end]
        )

    def agenerate(
        self,
        prompt: "str | Ids",
        params: Sampling | None = None,
        **options: "Unpack[GenerateOptions]",
    ) -> "AsyncChunks":
        """`generate` for asyncio, with its options; the event loop is never blocked.

        What `generate` raises at once, this raises at the first step.
        """
        from edgellama.asynchronous import AsyncChunks

        def start(cancel: CancelToken) -> Generator[Chunk, None, None]:
            options["cancel"] = cancel
            return self.generate(prompt, params, **options)

        return AsyncChunks(start, options.get("cancel"))

    def achat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: Sampling | None = None,
        **options: "Unpack[ChatOptions]",
    ) -> "AsyncChunks":
        """`chat` for asyncio, with its options; see `agenerate`."""
        from edgellama.asynchronous import AsyncChunks

        def start(cancel: CancelToken) -> Generator[Chunk, None, None]:
            options["cancel"] = cancel
            return self.chat(messages, params, **options)

        return AsyncChunks(start, options.get("cancel"))


class GenerateOptions(TypedDict, total=False):
    """The options of `Model.generate`."""

    max_tokens: int | None
    stop: Sequence[str]
    session: Session | None
    cancel: CancelToken | None
    special: bool


class ChatOptions(TypedDict, total=False):
    """The options of `Model.chat`."""

    template: str | ChatTemplate | ChatFormat | None
    overflow: Overflow
    max_tokens: int | None
    stop: Sequence[str]
    session: Session | None
    cancel: CancelToken | None
