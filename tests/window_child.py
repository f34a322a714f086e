"""The chat window of examples/, told what to do by lines on stdin, telling on stdout what it shows.

    python tests/window_child.py MODEL

Each line out is a JSON object, written when something has changed: what the window's parts show,
and the longest time, in seconds, in which the window did nothing. "place" is where buttons are.
"""

import json
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from chat_window import Window
from talk import Talk

BEAT = 5  # milliseconds between two looks


class Watched:
    """A window and its heart."""

    def __init__(self, window: Window) -> None:
        self.window, self.told, self.gap = window, {}, 0.0
        self.last = time.perf_counter()
        self.orders: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._beat()

    def _listen(self) -> None:
        for line in sys.stdin:
            self.orders.put(line.rstrip("\n"))

    def _obey(self, line: str) -> bool:
        """`paste TEXT` fills the entry; `close` does what a window's cross does."""
        order, _, text = line.partition(" ")
        if order == "paste":
            self.window.entry.insert("1.0", text)
        else:
            self.window.destroy()
        return order != "close"

    def _beat(self) -> None:
        now = time.perf_counter()
        self.gap, self.last = max(self.gap, now - self.last), now
        seen = self._seen()
        if seen != self.told:
            self.told = seen
            print(json.dumps(seen | {"gap": self.gap}), flush=True)
        if self.orders.empty() or self._obey(self.orders.get()):
            self.window.after(BEAT, self._beat)

    def _seen(self) -> dict[str, Any]:
        window = self.window
        buttons = {
            "send": window.send_button,
            "cancel": window.cancel_button,
            "clear": window.clear_button,
        }
        parts = buttons | {"entry": window.entry}
        return {
            "status": window.status["text"],
            "text": window.text.get("1.0", "end").strip(),
            "entry": window.entry.get("1.0", "end").strip(),
            **{name: button.instate(["!disabled"]) for name, button in buttons.items()},
            "place": {name: _middle(part) for name, part in parts.items()},
        }


def _middle(part: Any) -> tuple[int, int]:
    """Where a part is on the screen, in pixels."""
    x, y = part.winfo_rootx(), part.winfo_rooty()
    return x + part.winfo_width() // 2, y + part.winfo_height() // 2


if __name__ == "__main__":
    talk = Talk(sys.argv[1])
    window = Window(talk)
    window.update()  # it appears: what follows is work and waiting
    watched = Watched(window)
    window.mainloop()
    talk.close()
    print(json.dumps({"ended": not talk._thread.is_alive(), "gap": watched.gap}), flush=True)
