"""One conversation with a loaded model: tokens in, logits or chunks of text out.

Knows nothing about chat messages or files; see `model.py` for both.
"""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from edgellama.control import CancelToken, Turns
from edgellama.errors import ContextOverflow, ForkedProcess, ParameterError, require_integer, shown
from edgellama.generate import Chunk, generate
from edgellama.runtimes.base import RuntimeSession
from edgellama.sampling import Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgellama.model import Model


class Session:
    """One conversation: the tokens in its key/value cache. Its calls take turns."""

    def __init__(self, model: "Model", runtime_session: RuntimeSession) -> None:
        self._model, self._runtime_session = model, runtime_session
        self._turns = Turns()
        self._ids: list[int] = []
        self._closed, self._changes = False, 0

    @property
    def model(self) -> "Model":
        """The model it was opened on."""
        return self._model

    @property
    def position(self) -> int:
        """Tokens in the cache."""
        return self._runtime_session.position

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens in the cache."""
        return tuple(self._ids)

    def forward(
        self,
        ids: Sequence[int],
        *,
        all_logits: bool = False,
        cancel: CancelToken | None = None,
    ) -> "NDArray[np.float32]":
        """Append ids to the cache; logits after the last, float32 (vocab_size,).

        all_logits: after each, (len(ids), vocab_size). Raises ParameterError for an id outside
        the vocabulary, ContextOverflow, Cancelled (the cache is as before), ForkedProcess.
        """
        checked = self._check(ids)
        self._open()  # before waiting: a fork's turn would never come
        with self._turns.turn(cancel, "forward"):
            need, have = self.position + len(checked), self._model.info.context
            if need > have:
                raise ContextOverflow(need, have)
            logits = self._open().forward(checked, all_logits=all_logits, cancel=cancel)
            self._ids += checked
            self._changes += 1
            return logits

    def _open(self) -> RuntimeSession:
        if self._closed or self._model._runtime is None:
            raise ParameterError(f"the {'session' if self._closed else 'model'} is closed")
        if os.getpid() != self._model._pid:
            raise ForkedProcess("the model was loaded before this process forked; load it here")
        return self._runtime_session

    def _check(self, ids: Sequence[int]) -> list[int]:
        size = self._model.config.vocab_size
        checked = []
        for i, token in enumerate(ids):
            plain = cast("int", getattr(token, "item", lambda t=token: t)())  # NumPy's integers too
            if isinstance(plain, bool) or not isinstance(plain, int) or not 0 <= plain < size:
                raise ParameterError(
                    f"ids[{i}] = {shown(token)}; allowed: an integer 0..{size - 1}", field="ids"
                )
            checked.append(plain)
        if not checked:
            raise ParameterError("ids is empty; at least one token is needed", field="ids")
        return checked

    def truncate(self, n: int) -> None:
        """Forget all but the first n tokens. Raises ParameterError for n > position."""
        with self._turns.turn():
            require_integer("n", n, 0, self.position)
            self._truncate(n)

    def _truncate(self, n: int) -> None:
        self._open().truncate(n)
        del self._ids[n:]
        self._changes += 1

    def generate(
        self,
        ids: Sequence[int],
        params: Sampling | None = None,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        cancel: CancelToken | None = None,
        continuing: bool = True,
        ends: Sequence[int] = (),
    ) -> Iterator[Chunk]:
        """Continue a whole prompt of ids; what the cache already holds of it is not recomputed.

        continuing=False starts a text of its own, as a chat's reply is; `ends` are ids that end
        the reply like the tokenizer's own. Raises what `forward` raises, here; NonFiniteError
        while iterating, and ParameterError if the session was used otherwise meanwhile.
        """
        if params is not None and not isinstance(params, Sampling):
            raise ParameterError(f"params is {type(params).__name__}; allowed: Sampling")
        checked = self._check(ids)
        need, have = len(checked), self._model.info.context
        if need > have:
            raise ContextOverflow(need, have)
        with self._turns.turn(cancel, "generate"):
            shared = self._shared(checked)
            self._truncate(shared)
            history, reading = tuple(self._ids), _Reading(self, self._changes)
        return generate(
            reading,
            self._model.tokenizer,
            checked[shared:],
            params or Sampling(),
            context=have,
            max_tokens=max_tokens,
            stop=stop,
            cancel=cancel,
            history=history,
            continuing=continuing,
            ends=ends,
        )

    def _shared(self, ids: list[int]) -> int:
        """Leading tokens that need no computing; the last one always does, for its logits."""
        shared = 0
        for mine, theirs in zip(self._ids, ids[:-1], strict=False):
            if mine != theirs:
                break
            shared += 1
        return shared

    def close(self) -> None:
        """Free the cache, and end a call that another thread is in; twice is harmless."""
        self._closed = True
        if os.getpid() != self._model._pid:
            return  # a fork has nothing that runs, and its memory ends with it
        self._runtime_session.stop()
        with self._turns.turn():
            self._runtime_session.close()
            self._ids = []


class _Reading:
    """A session as one reply sees it: it refuses once anybody else has used the session."""

    def __init__(self, session: Session, changes: int) -> None:
        self._session, self._changes = session, changes

    @property
    def position(self) -> int:
        return self._session.position

    def forward(
        self, ids: Sequence[int], *, cancel: CancelToken | None = None
    ) -> "NDArray[np.float32]":
        if self._session._changes != self._changes:
            raise ParameterError(
                "the session was used otherwise since this reply began",
                field="session",
                hint="One reply at a time; open a session for each",
            )
        logits = self._session.forward(ids, cancel=cancel)
        self._changes += 1
        return logits
