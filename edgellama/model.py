"""A loaded model, as an embedding app uses it: sessions, generate, chat.

Knows nothing about operators, formats of weights or terminals.
"""

import os
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgellama.chat import FROM_FILE, NO_TEMPLATE, ChatTemplate, template_from_gguf
from edgellama.control import CancelToken
from edgellama.errors import Cancelled, ForkedProcess, ParameterError, TemplateError, shown
from edgellama.formats import ChatFormat
from edgellama.formats_named import chosen_template
from edgellama.generate import Chunk
from edgellama.gguf import GGUF
from edgellama.graph import Graph
from edgellama.infill import infill_ids, infill_tokens
from edgellama.runtimes.base import Options, Runtime
from edgellama.sampling import Sampling
from edgellama.session import Session
from edgellama.stop import checked_stops
from edgellama.tokenizer import Tokenizer


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
        self.device = runtime.describe()
        self._runtime: Runtime | None = runtime
        self._pid = os.getpid()
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights and the threads; calling it twice is harmless."""
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            runtime.close()

    def session(self) -> Session:
        """A new conversation: an empty key/value cache."""
        if os.getpid() != self._pid:
            raise ForkedProcess("the model was loaded before this process forked; load it here")
        if self._runtime is None:
            raise ParameterError("the model is closed")
        return Session(self, self._runtime.session())

    # --- text -----------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[int],
        params: Sampling | None = None,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
        cancel: CancelToken | None = None,
        special: bool = False,
    ) -> Iterator[Chunk]:
        """Continue a prompt; one Chunk a token.

        A string gets BOS iff the file says so, and its look-alikes of special tokens stay text
        unless `special`; ids are taken as they are. With a `session` whose tokens begin the
        prompt, only the rest is computed. max_tokens None: to the end of the text or of the
        context. Raises ContextOverflow, ParameterError, NonFiniteError.
        """
        if isinstance(prompt, str):
            bos = self.tokenizer.add_bos
            ids = self.tokenizer.encode(prompt, special=special, bos=bos)
        elif isinstance(prompt, Iterable) and not isinstance(prompt, bytes | bytearray):
            ids = list(prompt)
        else:
            raise ParameterError(
                f"prompt is {type(prompt).__name__}; expected text or token ids",
                field="prompt",
                value=shown(prompt),
                allowed="a str or a sequence of ids",
            )
        own = self._own(session)
        return own.generate(ids, params, max_tokens=max_tokens, stop=stop, cancel=cancel)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: Sampling | None = None,
        *,
        template: str | ChatTemplate | ChatFormat | None = None,
        overflow: str = "error",
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
        cancel: CancelToken | None = None,
    ) -> Iterator[Chunk]:
        """Answer the last message of a conversation; one Chunk a token.

        messages: dicts with `role` and `content`. template, instead of the file's: the name of a
        format, such as "llama-2" (all: `edgellama.formats_named.FORMATS`), or Jinja text. A
        format's own stop texts end the reply as `stop` does. Pass the same `session` for the next
        turn, and only new tokens are computed. Raises what `generate` raises, and TemplateError if
        there is no template or it refuses.
        """
        if overflow != "error":
            raise ParameterError(f"overflow = {shown(overflow)}; allowed: error", field="overflow")
        own, chosen = self._own(session), self._chosen(template)
        return own.generate(
            chosen.encode(self.tokenizer, messages),
            params,
            max_tokens=max_tokens,
            stop=[*checked_stops(stop), *chosen.stops],
            cancel=cancel,
            continuing=False,
            ends=chosen.ends(self.tokenizer),
        )

    def _own(self, session: Session | None) -> Session:
        """The session given, or a new one; another model's holds other keys and values."""
        if session is None:
            return self.session()
        if session.model is not self:
            raise ParameterError("the session belongs to another model", field="session")
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
    ) -> Iterator[Chunk]:
        """`infill` as it comes, one Chunk a token; the last one says why it ended."""
        tokens, own = self._infill_tokens, self._own(session)
        ids = infill_ids(
            tokens, self.tokenizer, prefix, suffix, suffix_first=suffix_first, path=self.info.path
        )
        assert tokens is not None
        return own.generate(
            ids, params, max_tokens=max_tokens, stop=stop, cancel=cancel, ends=[tokens.end]
        )

    def agenerate(self, prompt: str | Sequence[int], *args: Any, **kwargs: Any) -> "AsyncChunks":
        """`generate` for asyncio; the event loop is never blocked."""
        return AsyncChunks(self.generate(prompt, *args, **kwargs))

    def achat(
        self, messages: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any
    ) -> "AsyncChunks":
        """`chat` for asyncio; the event loop is never blocked."""
        return AsyncChunks(self.chat(messages, *args, **kwargs))


class AsyncChunks(AsyncIterator[Chunk]):
    """Chunks from a blocking iterator, each step of which runs in a worker thread."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks = chunks

    async def __anext__(self) -> Chunk:
        import asyncio

        chunk = await asyncio.to_thread(next, self._chunks, None)
        if chunk is None:
            raise StopAsyncIteration
        return chunk
