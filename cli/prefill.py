"""A long prompt of `run` or `chat`, read into a session piece by piece, so that there is progress
to show.

What comes after it in the session is computed as if it had not been read ahead. Knows nothing about
messages or terminals but what a display shows.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

from edgellama.cli.reply import READING, Reply
from edgellama.cli.terminal import Display
from edgellama.control import CancelToken
from edgellama.reuse import as_cached, shared_length

if TYPE_CHECKING:
    from edgellama.session import Session

PIECE = 256  # tokens: as many as a runtime reads at once, so that it rounds as it would have


class ReadAhead:
    """Call it with a display before the reply; `counted` puts what it did into the usage."""

    def __init__(
        self, session: "Session", ids: Callable[[], Sequence[int]], cancel: CancelToken
    ) -> None:
        self._session, self._ids, self._cancel = session, ids, cancel
        self._known: int | None = None
        self._seconds = 0.0

    def __call__(self, display: Display) -> None:
        """Read all but the last piece; nothing of what the reply will refuse as too long.

        Raises Cancelled, and what `ids` raises.
        """
        session, model = self._session, self._session.model
        given = self._ids()
        if len(given) > model.info.context:
            return
        ids = as_cached(session.ids, given, model.tokenizer)
        if len(ids) > model.info.context:  # the same text in more tokens
            ids = list(given)
        known = self._known = shared_length(session.ids, ids[:-1])
        session.truncate(known)
        started = perf_counter()
        try:
            for start in range(known, len(ids) - PIECE, PIECE):
                detail = f"({known} cached / {start} processed / {len(ids)} tokens)"
                display.update(start, len(ids), READING, detail)
                session.forward(ids[start : start + PIECE], cancel=self._cancel)
        finally:
            self._seconds = perf_counter() - started

    def counted(self, reply: Reply) -> Reply:
        if self._known is None or reply.usage is None:
            return reply
        seconds = reply.usage.prefill_seconds + self._seconds
        usage = replace(reply.usage, reused_tokens=self._known, prefill_seconds=seconds)
        return replace(reply, usage=usage)
