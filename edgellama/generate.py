"""The decode loop: ids go in, a reply comes out token by token.

Knows nothing about files, chat templates or what the session's cache held before; `model.py` takes
care of those. Draws are made by `sampler.py`, stop strings found by `stop.py`.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, runtime_checkable

from edgellama.control import CancelToken
from edgellama.errors import Cancelled, ContextOverflow, ParameterError
from edgellama.runtimes.base import Likeliest
from edgellama.sampler import Sampler
from edgellama.sampling import Sampling, checked_integer
from edgellama.stop import StopMatcher, checked_stops

if TYPE_CHECKING:
    from typing import Any, TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    Ids: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]

FinishReason = Literal["stop", "length", "cancelled", "context"]
Found = TypeVar("Found")
MOST_TOKENS = 2**31 - 1


class TextStream(Protocol):
    """Decodes one id at a time, holding back half a character."""

    def push(self, token_id: int, /) -> str: ...
    def flush(self) -> str: ...


class TextTokenizer(Protocol):
    """The part of a tokenizer that a reply needs."""

    vocab_size: int
    eos: tuple[int, ...]

    def stream(self, *, continuing: bool = False) -> TextStream: ...
    def token_bytes(self, token: int, /) -> bytes: ...


class TextSession(Protocol):
    """The part of a session that a reply needs; see `runtimes.base.RuntimeSession`."""

    @property
    def position(self) -> int: ...
    def forward(
        self, ids: Sequence[int], *, cancel: CancelToken | None = None
    ) -> "NDArray[np.float32]": ...


@runtime_checkable
class ChoosingTextSession(TextSession, Protocol):
    """One that can find the likeliest tokens itself; see `runtimes.base.ChoosingSession`."""

    @property
    def choices(self) -> int: ...
    def step(self, token: int, *, cancel: CancelToken | None = None) -> Likeliest: ...
    def logits(self) -> "NDArray[np.float32]": ...


@dataclass(frozen=True, slots=True)
class Usage:
    """What a reply cost: tokens and seconds. The consumer's own time is in none of them."""

    prompt_tokens: int  # all tokens before the reply
    reused_tokens: int  # of these, the ones that were in the cache already
    completion_tokens: int  # all that were sampled, the one that ended the turn included
    prefill_seconds: float
    decode_seconds: float
    dropped_tokens: int = 0  # left out by the overflow policy that was asked for
    dropped_messages: tuple[int, ...] = ()  # the places of those left out, counted from 0
    seed: int | None = None  # repeats the reply
    mirostat_mu: float | None = None  # with mirostat: its state, from which a next reply goes on
    stop_text: str | None = None  # the stop string that ended the reply, if one did


@dataclass(frozen=True, slots=True)
class Chunk:
    """One token of a reply; the last one also says why the reply ended, and what it cost.

    `text` is "" while half a character or the possible beginning of a stop string is held back;
    the texts joined are the reply. `token` is None in a last chunk that no token belongs to.
    `logprob` is the token's natural log probability under the model's raw logits.
    """

    text: str
    token: int | None
    logprob: float | None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


def cancelled(usage: Usage | None = None) -> Generator[Chunk, None, None]:
    """A reply that ended before it began; without `usage`, before its prompt was known."""
    yield Chunk("", None, None, "cancelled", usage or Usage(0, 0, 0, 0.0, 0.0))


@dataclass(frozen=True, slots=True)
class Wishes:
    """What was asked of one reply, checked: nothing in it can be refused any more."""

    sampler: Sampler
    stops: tuple[str, ...]
    limit: int  # tokens


def checked_wishes(
    tokenizer: TextTokenizer,
    sampling: Sampling | None = None,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
) -> Wishes:
    """The arguments of `generate` that say what is wanted. Raises ParameterError."""
    if sampling is not None and not isinstance(sampling, Sampling):
        kind = type(sampling).__name__
        allowed = "a Sampling or None"
        problem = f"params is {kind}; allowed: {allowed}"
        raise ParameterError(problem, field="params", value=sampling, allowed=allowed)
    limit = MOST_TOKENS
    if max_tokens is not None:
        limit = checked_integer("max_tokens", max_tokens, 0, MOST_TOKENS)
    sampler = Sampler(sampling or Sampling(), tokenizer.vocab_size, tokenizer.token_bytes)
    return Wishes(sampler, checked_stops(stop), limit)


def generate(
    session: TextSession,
    tokenizer: TextTokenizer,
    ids: Sequence[int],
    sampling: Sampling | None = None,
    *,
    context: int,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    cancel: CancelToken | None = None,
    history: Sequence[int] = (),
    dropped: int = 0,
    dropped_messages: Sequence[int] = (),
    continuing: bool = True,
    ends: Sequence[int] = (),
) -> Generator[Chunk, None, None]:
    """Append `ids` to the session and sample a reply; arguments are checked at once.

    `context` is how many tokens the session holds, prompt and reply together; `history` the ids
    in its cache, which the penalties look at; `dropped`, tokens, and `dropped_messages`, places of
    messages, go into the usage. `continuing=False` drops the space that some tokenizers put before
    a text, as fits a chat's reply.

    The reply ends with "stop" (an id of `tokenizer.eos` or `ends`, never shown, or a stop string,
    cut off), "length" (`max_tokens`; 0 only reads the prompt in), "context" (full) or "cancelled".

    Wherever it ends, or the consumer leaves it, the cache holds the first `session.position` of
    history, `ids` and the chunks' tokens; the newest token is never in it.

    Raises ParameterError (no ids, or an argument out of range) and ContextOverflow here,
    NonFiniteError while iterating.
    """
    if not ids:
        problem, allowed = "the prompt has no tokens", "1 or more ids"
        raise ParameterError(problem, field="ids", value=ids, allowed=allowed)
    wishes = checked_wishes(tokenizer, sampling, max_tokens, stop)
    _check_room(session, len(ids), context)
    return replied(
        session,
        tokenizer,
        ids,
        wishes,
        context=context,
        cancel=cancel,
        history=history,
        dropped=dropped,
        dropped_messages=dropped_messages,
        continuing=continuing,
        ends=ends,
    )


def replied(
    session: TextSession,
    tokenizer: TextTokenizer,
    ids: Sequence[int],
    wishes: Wishes,
    *,
    context: int,
    cancel: CancelToken | None = None,
    history: Sequence[int] = (),
    dropped: int = 0,
    dropped_messages: Sequence[int] = (),
    continuing: bool = True,
    ends: Sequence[int] = (),
) -> Generator[Chunk, None, None]:
    """`generate` for arguments that are checked already, by `checked_wishes` and by the caller."""
    sampler, stops = wishes.sampler, StopMatcher(wishes.stops)
    stream = tokenizer.stream(continuing=continuing)
    reply = _Reply(session, tokenizer, sampler, stops, cancel, stream)
    reply.recent.extend([*history[-reply.window :], *ids] if reply.window else ())
    reply.dropped, reply.dropped_messages = dropped, tuple(dropped_messages)
    reply.ends |= frozenset(ends)
    return reply.chunks(list(ids), wishes.limit, context)


def _check_room(session: TextSession, count: int, context: int) -> None:
    if session.position + count > context:
        raise ContextOverflow(session.position + count, context)


class _Reply:
    """One reply under way."""

    def __init__(
        self,
        session: TextSession,
        tokenizer: TextTokenizer,
        sampler: Sampler,
        stops: StopMatcher,
        cancel: CancelToken | None,
        stream: TextStream,
    ) -> None:
        self.session, self.sampler, self.stops = session, sampler, stops
        self.choosing: ChoosingTextSession | None = None
        if isinstance(session, ChoosingTextSession) and sampler.takes(session.choices):
            self.choosing = session
        self.cancel, self.stream, self.ends = cancel, stream, frozenset(tokenizer.eos)
        self.window = sampler.sampling.window
        self.recent: deque[int] = deque(maxlen=self.window)
        self.prompt_tokens = self.reused_tokens = self.completion_tokens = self.dropped = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self.dropped_messages: tuple[int, ...] = ()

    def chunks(self, ids: list[int], limit: int, context: int) -> Generator[Chunk, None, None]:
        _check_room(self.session, len(ids), context)  # again: time may have passed
        self.reused_tokens = self.session.position
        self.prompt_tokens = self.reused_tokens + len(ids)
        room = context - self.prompt_tokens
        self.room = min(limit, room)
        self.full: FinishReason = "length" if limit <= room else "context"
        found: NDArray[np.float32] | Likeliest | None = self.prefill(ids)
        if found is not None and self.room == 0:
            yield self.last(self.full)
            return
        while found is not None:
            chunk = self.advance(found)
            yield chunk
            if chunk.finish_reason is not None or chunk.token is None:
                return
            found = self.decode(chunk.token)
        yield self.last("cancelled")

    def prefill(self, ids: list[int]) -> "NDArray[np.float32] | None":
        started = perf_counter()
        logits = self.computed(partial(self.session.forward, ids))
        self.prefill_seconds = perf_counter() - started
        return logits

    def decode(self, token: int) -> "NDArray[np.float32] | Likeliest | None":
        started = perf_counter()
        found: NDArray[np.float32] | Likeliest | None
        if self.choosing:
            found = self.computed(partial(self.choosing.step, token))
        else:
            found = self.computed(partial(self.session.forward, [token]))
        self.decode_seconds += perf_counter() - started
        return found

    def computed(self, call: Callable[..., Found]) -> Found | None:
        """What a call gives, or None if cancelled before, meanwhile or by the end."""
        if self.cancelled:
            return None
        try:
            found = call(cancel=self.cancel)
        except Cancelled:
            return None
        return None if self.cancelled else found

    @property
    def cancelled(self) -> bool:
        return self.cancel is not None and self.cancel.cancelled

    def advance(self, found: "NDArray[np.float32] | Likeliest") -> Chunk:
        """Sample one token and make its chunk."""
        token, logprob = self.sample(found)
        if token in self.ends:
            return self.last("stop", "", token, logprob)
        text, stopped = self.stops.push(self.stream.push(token))
        if stopped:
            return Chunk(text, token, logprob, "stop", self.usage())
        if self.completion_tokens == self.room:
            return self.last(self.full, text, token, logprob)
        return Chunk(text, token, logprob)

    def sample(self, found: "NDArray[np.float32] | Likeliest") -> tuple[int, float]:
        started = perf_counter()
        token, logprob = self.drawn(found, self.session.position)
        self.recent.append(token)
        self.completion_tokens += 1
        self.decode_seconds += perf_counter() - started
        return token, logprob

    def drawn(self, found: "NDArray[np.float32] | Likeliest", position: int) -> tuple[int, float]:
        if isinstance(found, Likeliest):
            drawn = self.sampler.sample_few(found, self.recent, position)
            if drawn is not None:
                return drawn
            assert self.choosing is not None
            found = self.choosing.logits()
        known = found[: self.sampler.vocab_size]  # a padded head has ids without any text
        return self.sampler.sample(known, self.recent, position)

    def last(
        self,
        reason: FinishReason,
        text: str = "",
        token: int | None = None,
        logprob: float | None = None,
    ) -> Chunk:
        """The last chunk, with all the text that was held back."""
        tail, stopped = self.stops.push(self.stream.flush())
        text += tail + self.stops.flush()
        return Chunk(text, token, logprob, "stop" if stopped else reason, self.usage())

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            completion_tokens=self.completion_tokens,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            dropped_tokens=self.dropped,
            dropped_messages=self.dropped_messages,
            seed=self.sampler.seed,
            mirostat_mu=self.sampler.mu,
            stop_text=self.stops.found,
        )
