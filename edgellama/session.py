"""One conversation with a loaded model: tokens in, logits or chunks of text out.

Knows nothing about chat messages or files; see `model.py` for both.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar, cast

from edgellama.control import CancelToken, Turns, require_token
from edgellama.errors import (
    Cancelled,
    ContextOverflow,
    ForkedProcess,
    ParameterError,
    as_integer,
    require_integer,
    require_path,
    shown,
)
from edgellama.generate import Chunk, Usage, cancelled, checked_wishes, replied
from edgellama.reuse import as_cached, shared_length
from edgellama.runtimes.base import (
    ChoosingSession,
    Likeliest,
    RuntimeSession,
    SavableSession,
    SavingRuntime,
)
from edgellama.sampling import Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgellama.generate import Ids
    from edgellama.model import Model

Found = TypeVar("Found")


class Session:
    """One conversation: the tokens in its key/value cache. Its calls take turns.

    A context manager: leaving it, or `close()`, frees the cache at once.
    """

    def __init__(
        self, model: "Model", runtime_session: RuntimeSession, ids: Sequence[int] = ()
    ) -> None:
        """`ids` are those in the runtime session's cache already."""
        self._model, self._runtime_session = model, runtime_session
        self._turns = Turns()
        self._ids = list(ids)
        self._closed, self._changes = False, 0

    @property
    def model(self) -> "Model":
        """The model it was opened on."""
        return self._model

    @property
    def position(self) -> int:
        """Tokens in the cache."""
        return len(self._ids)

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens in the cache."""
        return tuple(self._ids)

    def forward(
        self,
        ids: "Ids",
        *,
        all_logits: bool = False,
        cancel: CancelToken | None = None,
    ) -> "NDArray[np.float32]":
        """Append ids to the cache; logits after the last, float32 (vocab_size,).

        all_logits: after each, (len(ids), vocab_size). Raises ParameterError for an id outside
        the vocabulary, ContextOverflow, Cancelled (the cache is as before), ForkedProcess.
        """
        require_token(cancel)
        checked = self._check(ids)
        with self._turn(cancel, "forward") as session:
            return self._forward(session, checked, all_logits, cancel)

    def _forward(
        self, session: RuntimeSession, ids: list[int], all_logits: bool, cancel: CancelToken | None
    ) -> "NDArray[np.float32]":
        return self._appended(
            ids, lambda: session.forward(ids, all_logits=all_logits, cancel=cancel)
        )

    def _appended(self, ids: list[int], compute: Callable[[], Found]) -> Found:
        """What the runtime computes of new ids, which are in the cache then."""
        need, have = self.position + len(ids), self._model.info.context
        if need > have:
            raise ContextOverflow(need, have)
        found = compute()
        self._ids += ids
        self._changes += 1
        return found

    @contextmanager
    def _turn(self, cancel: CancelToken | None, what: str) -> Iterator[RuntimeSession]:
        """Have the session for oneself."""
        self._open()  # before waiting: a fork's turn would never come
        with self._turns.turn(cancel, what):
            session = self._open()
            known = min(session.position, len(self._ids))
            if known < max(session.position, len(self._ids)):  # a signal came between two steps
                session.truncate(known)
                del self._ids[known:]
            yield session

    def _open(self) -> RuntimeSession:
        if self._closed or self._model._runtime is None:
            raise ParameterError(f"the {'session' if self._closed else 'model'} is closed")
        if os.getpid() != self._model._pid:
            raise ForkedProcess("the model was loaded before this process forked; load it here")
        return self._runtime_session

    def _check(self, ids: "Ids") -> list[int]:
        return _checked_ids(ids, self._model.config.vocab_size)

    def truncate(self, n: int) -> None:
        """Forget all but the first n tokens. Raises ParameterError for n > position."""
        with self._turn(None, "truncate") as session:
            self._truncate(session, require_integer("n", n, 0, self.position))

    def _truncate(self, session: RuntimeSession, n: int) -> None:
        session.truncate(n)
        del self._ids[n:]
        self._changes += 1

    def generate(
        self,
        ids: "Ids",
        params: Sampling | None = None,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        cancel: CancelToken | None = None,
        continuing: bool = True,
        ends: Sequence[int] = (),
        same_text: bool = False,
        dropped: int = 0,
        dropped_messages: Sequence[int] = (),
    ) -> Generator[Chunk, None, None]:
        """Continue a whole prompt of ids; what the cache already holds of it is not recomputed.

        continuing=False starts a text of its own, as a chat's reply is; `ends` are ids that end
        the reply like the tokenizer's own. same_text: where the cache spells the prompt's text in
        other tokens, those stay (see `reuse.as_cached`). dropped and dropped_messages go into the
        usage. Raises what `forward` raises, here, but for Cancelled, with which the reply ends;
        NonFiniteError while iterating, and ParameterError if the session was used otherwise
        meanwhile.
        """
        tokenizer = self._model.tokenizer
        require_token(cancel)
        wishes = checked_wishes(tokenizer, params, max_tokens, stop)  # before the cache is changed
        checked = self._check(ids)
        need, have = len(checked), self._model.info.context
        if need > have:
            raise ContextOverflow(need, have)
        try:
            history, rest, reading = self._begin(checked, same_text, cancel)
        except Cancelled:
            usage = Usage(need, 0, 0, 0.0, 0.0, dropped, tuple(dropped_messages))
            return cancelled(usage)
        return replied(
            reading,
            tokenizer,
            rest,
            wishes,
            context=have,
            cancel=cancel,
            history=history,
            continuing=continuing,
            ends=ends,
            dropped=dropped,
            dropped_messages=dropped_messages,
        )

    def _begin(
        self, ids: list[int], same_text: bool, cancel: CancelToken | None
    ) -> "tuple[tuple[int, ...], list[int], _Reading]":
        """Forget what does not belong to the prompt: what is left, what is to be read, and how."""
        with self._turn(cancel, "generate") as session:
            if same_text:
                kept = as_cached(self._ids, ids, self._model.tokenizer)
                ids = kept if len(kept) <= self._model.info.context else ids
            shared = shared_length(self._ids, ids[:-1])  # the last one is computed, for its logits
            self._truncate(session, shared)
            return tuple(self._ids), ids[shared:], _reading(self, session)

    def save(self, path: "str | os.PathLike[str]", *, cancel: CancelToken | None = None) -> None:
        """Write the conversation to a file, from which `Model.restore` goes on.

        It holds the ids, and their keys and values: as many bytes as the part of the cache in use
        (see `saved.py` for the format). An existing file is replaced, whole or not at all. Raises
        OutputError; ParameterError for a runtime whose sessions cannot be saved (llama.cpp), or for
        the model's own file; Cancelled, ForkedProcess.
        """
        from edgellama.saved import save_session

        require_token(cancel)
        target = Path(require_path("path", path))
        if any(_same_file(target, own) for own in _own_files(self._model)):
            problem, allowed = "this is the model's own file", "another file"
            raise ParameterError(
                problem, path=target, field="path", value=os.fspath(path), allowed=allowed
            )
        with self._turn(cancel, "save") as session:
            saving, fingerprint = _savable(session, self._model)
            save_session(target, saving, self._ids, fingerprint, cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache, and end a call that another thread is in; twice is harmless."""
        self._closed = True
        if os.getpid() != self._model._pid:
            return  # a fork has nothing that runs, and its memory ends with it
        self._runtime_session.stop()
        self._turns.finally_do(self._free)

    def _free(self) -> None:
        self._runtime_session.close()
        self._ids = []


def restored(
    model: "Model",
    runtime_session: RuntimeSession,
    path: "str | os.PathLike[str]",
    *,
    exact: bool,
    cancel: CancelToken | None,
) -> Session:
    """A session of what `Session.save` wrote, in an empty runtime session: see `Model.restore`."""
    from edgellama.saved import restore_session

    try:
        require_token(cancel)
        session, fingerprint = _savable(runtime_session, model)
        ids = restore_session(
            Path(require_path("path", path)),
            session,
            fingerprint=fingerprint,
            context=model.info.context,
            vocab_size=model.config.vocab_size,
            exact=exact,
            cancel=cancel,
        )
    except BaseException:
        runtime_session.close()
        raise
    return Session(model, runtime_session, ids)


def _savable(session: RuntimeSession, model: "Model") -> tuple[SavableSession, bytes]:
    """The session and its model's fingerprint, if the runtime can save it; else ParameterError."""
    runtime = model._runtime
    if isinstance(session, SavableSession) and isinstance(runtime, SavingRuntime):
        return session, runtime.fingerprint
    name = model.device["runtime"]
    raise ParameterError(
        f"sessions of the {name} runtime cannot be saved or restored",
        field="runtime",
        value=name,
        allowed="cpu, onnx, reference",
        hint="Keep the messages instead, and let the model read them again",
    )


def _checked_ids(ids: "Ids", vocab_size: int) -> list[int]:
    """Ids of one row, as Python's integers; NumPy's will do."""
    allowed = f"integers 0..{vocab_size - 1}"
    shape = getattr(ids, "shape", (1,))
    if not isinstance(ids, Iterable) or isinstance(ids, str | bytes) or len(shape) != 1:
        what = type(ids).__name__ if len(shape) == 1 else f"of shape {tuple(shape)}"
        problem = f"ids is {what}; allowed: one row of {allowed}"
        raise ParameterError(problem, field="ids", value=ids, allowed=allowed)
    checked = []
    for i, token in enumerate(ids):
        whole = as_integer(token)
        if whole is None or not 0 <= whole < vocab_size:
            problem = f"ids[{i}] = {shown(token)}; allowed: an integer 0..{vocab_size - 1}"
            raise ParameterError(problem, field="ids", value=token, allowed=allowed)
        checked.append(whole)
    if not checked:
        problem = "ids is empty; at least one token is needed"
        raise ParameterError(problem, field="ids", value=ids, allowed="1 or more ids")
    return checked


def _own_files(model: "Model") -> list[Path]:
    """The file or folder that a model was loaded from, with all parts of it."""
    path = model.info.path
    with suppress(OSError):
        return [path, *path.iterdir()]
    return [path, *model._paths]


def _same_file(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except (OSError, ValueError):  # one of them does not exist, or cannot be looked at
        return False


class _Reading:
    """A session as one reply sees it: it refuses once anybody else has used the session."""

    def __init__(self, session: Session, changes: int) -> None:
        self._session, self._changes = session, changes

    @property
    def position(self) -> int:
        return self._session.position

    @contextmanager
    def _alone(self, cancel: CancelToken | None) -> Iterator[RuntimeSession]:
        session = self._session
        with session._turn(cancel, "generate") as runtime_session:
            if session._changes != self._changes:
                raise ParameterError(
                    "the session was used otherwise since this reply began",
                    field="session",
                    hint="One reply at a time; open a session for each",
                )
            yield runtime_session
            self._changes = session._changes

    def forward(
        self, ids: Sequence[int], *, cancel: CancelToken | None = None
    ) -> "NDArray[np.float32]":
        with self._alone(cancel) as runtime_session:
            return self._session._forward(runtime_session, list(ids), False, cancel)


class _Choosing(_Reading):
    """The same of a runtime that finds the likeliest tokens itself."""

    def __init__(self, session: Session, changes: int, choices: int) -> None:
        super().__init__(session, changes)
        self.choices = choices

    def step(self, token: int, *, cancel: CancelToken | None = None) -> Likeliest:
        with self._alone(cancel) as runtime_session:
            choosing = cast("ChoosingSession", runtime_session)
            return self._session._appended([token], lambda: choosing.step(token, cancel=cancel))

    def logits(self) -> "NDArray[np.float32]":
        with self._alone(None) as runtime_session:
            return cast("ChoosingSession", runtime_session).logits()


def _reading(session: Session, runtime_session: RuntimeSession) -> _Reading:
    """Tokens of a padded head have no text: they must not be among the likeliest."""
    model, changes = session._model, session._changes
    if (
        isinstance(runtime_session, ChoosingSession)
        and model.tokenizer.vocab_size == model.config.vocab_size
    ):
        return _Choosing(session, changes, runtime_session.choices)
    return _Reading(session, changes)
