"""Replies for asyncio: every step of a blocking iterator runs in a worker thread.

Knows nothing about models; `model.py` says what is iterated over.
"""

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Generator
from typing import Self

from edgellama.control import CancelToken
from edgellama.generate import Chunk


class AsyncChunks(AsyncIterator[Chunk]):
    """The chunks of one reply; the event loop is never blocked.

    The work begins with the first step, and wrong arguments are told there. Whoever leaves the
    loop early ends the work, since every step is asked for. If the task that waits for a step is
    cancelled, or `aclose()` is called, the step ends within 100 ms. An asynchronous context
    manager: leaving it calls `aclose()`.
    """

    def __init__(
        self,
        start: Callable[[CancelToken], Generator[Chunk, None, None]],
        cancel: CancelToken | None = None,
    ) -> None:
        """`start` is called once, in a worker thread, with a token that `cancel` sets too."""
        self._start = start
        self._cancel = CancelToken() if cancel is None else cancel.linked()
        self._chunks: Generator[Chunk, None, None] | None = None
        self._step: asyncio.Future[Chunk | None] | None = None
        self._over = False

    async def __anext__(self) -> Chunk:
        if self._over:
            raise StopAsyncIteration
        if self._step is not None and not self._step.done():
            raise RuntimeError("another task waits for this reply's next chunk")
        run = contextvars.copy_context().run
        step = asyncio.get_running_loop().run_in_executor(None, run, self._next)
        self._step = step
        try:
            await asyncio.wait({step})
        except asyncio.CancelledError:
            await self.aclose()
            raise
        self._over = self._over or step.exception() is not None or step.result() is None
        chunk = step.result()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def _next(self) -> Chunk | None:
        if self._chunks is None:
            self._chunks = self._start(self._cancel)
        return next(self._chunks, None)

    async def aclose(self) -> None:
        """End the reply, and wait for the step that is under way; twice is harmless."""
        self._over = True
        self._cancel.cancel()
        step = self._step
        if step is not None:
            if not step.done():  # one that is may be of a loop that has ended
                await asyncio.wait({step})
            step.exception()  # whatever became of it, nobody needs it now
        if self._chunks is not None:
            self._chunks.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
