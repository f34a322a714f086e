"""A model and one conversation in a thread of their own, for any window: copy it as it is.

Knows nothing about widgets: a window calls `ask`, `cancel`, `clear`, `close`, which return at once,
and takes out of `events`, now and then, what has happened. `chat_window.py` does so with Tk.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

import edgellama

SAMPLING = edgellama.Sampling(temperature=0.4, top_p=0.9, repetition_penalty=1.1)


class Talk:
    """One question at a time. The events are pairs of a name and a value:

    "loading": (done, total, what); "ready": ModelInfo; "text": a piece of the reply; "done": the
    reply's last Chunk; "cleared": None; "failed": why there is no reply; "broken": why there will
    be none at all.
    """

    def __init__(self, model: str, sampling: edgellama.Sampling = SAMPLING, **options: Any) -> None:
        """`options` are those of edgellama.load."""
        self.events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.messages: list[dict[str, str]] = []  # the thread's: others only look
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = edgellama.CancelToken()  # ends the loading
        self._cancel = edgellama.CancelToken()  # ends the newest reply
        self._sampling = sampling
        # a daemon: whatever happens, the program ends when its window is closed
        self._thread = threading.Thread(target=self._work, args=(model, options), daemon=True)
        self._thread.start()

    def ask(self, question: str, overflow: str = "error") -> None:
        cancel = self._cancel = edgellama.CancelToken()
        self._orders.put(lambda: self._answer(question, overflow, cancel))

    def cancel(self) -> None:
        self._cancel.cancel()

    def clear(self) -> None:
        """Forget the conversation; a reply under way is cancelled."""
        self.cancel()
        self._orders.put(self._forget)

    def close(self) -> None:
        """End whatever is under way, and free the model's memory."""
        self._closing.cancel()
        self.cancel()
        self._orders.put(None)
        self._thread.join(5)

    # --- in the thread ----------------------------------------------------------------------------

    def _work(self, path: str, options: dict[str, Any]) -> None:
        def progress(*step: int | str) -> None:
            self.events.put(("loading", step))

        try:
            options |= {"cancel": self._closing, "progress": progress}
            with edgellama.load(path, **options) as model:
                self._model, self._session = model, model.session()
                self.events.put(("ready", model.info))
                while (order := self._orders.get()) is not None:
                    order()
        except Exception as error:  # nobody else would ever hear of it
            self.events.put(("broken", str(error) or type(error).__name__))

    def _answer(self, question: str, overflow: Any, cancel: edgellama.CancelToken) -> None:
        asked = [*self.messages, {"role": "user", "content": question}]
        options = {"overflow": overflow, "session": self._session, "cancel": cancel}
        reply = ""
        try:
            for chunk in self._model.chat(asked, self._sampling, **options):
                reply += chunk.text
                self.events.put(("text", chunk.text))
        except edgellama.EdgeLlamaError as error:
            self.events.put(("failed", str(error)))
            return
        if reply:  # what was stopped counts as far as it came
            self.messages = [*asked, {"role": "assistant", "content": reply}]
        self.events.put(("done", chunk))

    def _forget(self) -> None:
        self.messages = []
        self.events.put(("cleared", None))
