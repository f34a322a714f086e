"""A chat window made of Tk, the standard library and edgellama: copy it and make it yours.

    python examples/chat_window.py [MODEL]

The model is in the thread of `talk.py`; its events come through a queue that the window empties
every 20 ms, so that nothing the model does can freeze it.
"""

import signal
import sys
import tkinter as tk
from time import perf_counter
from tkinter import ttk
from tkinter.font import nametofont
from typing import Any

from talk import Talk

import edgellama

POLICIES = {"When too long: forget the oldest": "shift", "When too long: say so": "error"}
ROLES = {  # of the transcript: text colour, background
    "you": ("#174a7e", "#e8f1fb"),
    "model": ("#202124", "#ffffff"),
    "note": ("#80868b", "#ffffff"),
    "error": ("#b3261e", "#fdecea"),
}
ENDS = {"cancelled": "(stopped)\n", "context": "(the context is full)\n"}
GREY, BLUE = "#f3f4f6", "#174a7e"


class Window(tk.Tk):
    """The transcript, and below it what is being written."""

    def __init__(self, talk: Talk) -> None:
        super().__init__()
        self.talk, self.context = talk, 0
        self.tokens, self.started = 0, 0.0  # of the reply
        self.title("edgellama")
        self.geometry("760x600")
        nametofont("TkTextFont").configure(size=11)
        nametofont("TkHeadingFont").configure(size=11, weight="bold")
        if self.tk.call("tk", "windowingsystem") == "x11":
            style = ttk.Style()
            style.theme_use("clam")
            style.configure(".", background=GREY, troughcolor="#e2e4e8")
            style.configure("TProgressbar", background=BLUE)
            style.map("TCombobox", fieldbackground=[("readonly", "white")])
        self._build_bars()
        self._build_transcript()
        self._now("Loading…")
        self._poll()

    def _build_bars(self) -> None:
        top, bottom = ttk.Frame(self, padding=(18, 10)), ttk.Frame(self, padding=(18, 12))
        top.pack(side="top", fill="x")
        bottom.pack(side="bottom", fill="x")
        self.name = ttk.Label(top, font="TkHeadingFont")
        self.clear_button = ttk.Button(top, text="Clear", command=self.talk.clear)
        self.policy = ttk.Combobox(top, values=list(POLICIES), state="readonly", width=27)
        self.policy.current(0)
        self.name.pack(side="left")
        self.clear_button.pack(side="right")
        self.policy.pack(side="right", padx=10)
        self.entry = tk.Text(bottom, height=3, wrap="word", font="TkTextFont", padx=8, pady=6)
        self.entry.configure(relief="flat", highlightcolor=BLUE, highlightbackground="#c4c7cc")
        self.entry.bind("<Return>", self._send)
        self.entry.bind("<Shift-Return>", lambda _: None)  # writes a line break
        self.entry.focus_set()
        self.send_button = ttk.Button(bottom, text="Send", command=self._send)
        self.cancel_button = ttk.Button(bottom, text="Cancel", command=self.talk.cancel)
        self.status = ttk.Label(bottom, foreground="#5f6368")
        self.bar = ttk.Progressbar(bottom, length=100)
        self.entry.grid(row=0, column=0, rowspan=2, sticky="nsew", padx=(0, 10))
        self.send_button.grid(row=0, column=1, sticky="nsew", pady=(0, 6))
        self.cancel_button.grid(row=1, column=1, sticky="nsew")
        self.status.grid(row=2, column=0, sticky="w", pady=(10, 0))
        self.bar.grid(row=2, column=1, sticky="ew", pady=(10, 0))
        bottom.columnconfigure(0, weight=1)

    def _build_transcript(self) -> None:
        scroll = ttk.Scrollbar(self)
        scroll.pack(side="right", fill="y")
        self.text = tk.Text(
            self, wrap="word", font="TkTextFont", background="white", state="disabled"
        )
        self.text.configure(yscrollcommand=scroll.set, relief="flat", padx=0)
        self.text.pack(fill="both", expand=True)
        scroll.configure(command=self.text.yview)
        for role, (colour, back) in ROLES.items():
            self.text.tag_configure(role, foreground=colour, background=back, lmargincolor=back)
            self.text.tag_configure(role, lmargin1=18, lmargin2=18, rmargin=18, rmargincolor=back)
            self.text.tag_configure(role, spacing1=5, spacing2=3, spacing3=5)

    def _write(self, text: str, role: str, start: str = "end") -> None:
        """From `start` on, the transcript is this; whoever has scrolled up is left there."""
        following = self.text.yview()[1] > 0.999
        self.text.configure(state="normal")
        self.text.replace(start, "end", text, role)
        self.text.configure(state="disabled")
        if following:
            self.text.see("end")

    def _now(self, status: str, *, send: bool = False, cancel: bool = False) -> None:
        """What is going on, in words, and what can be pressed meanwhile."""
        self.status.configure(text=status)
        self.send_button.state(["!disabled" if send else "disabled"])
        self.cancel_button.state(["!disabled" if cancel else "disabled"])
        self.bar.configure(mode="indeterminate" if cancel else "determinate")
        self.bar.start(20) if cancel else self.bar.stop()

    def _send(self, _: Any = None) -> str:
        question = self.entry.get("1.0", "end").strip()
        if question and self.send_button.instate(["!disabled"]):
            self.entry.delete("1.0", "end")
            self._write(question + "\n", "you")
            self.talk.ask(question, POLICIES[self.policy.get()])
            self.tokens = 0
            self._now("Reading…", cancel=True)
        return "break"  # the key itself writes nothing

    def _poll(self) -> None:
        events = [self.talk.events.get() for _ in range(self.talk.events.qsize())]
        if text := [value for what, value in events if what == "text"]:
            self._text(text)  # all in one piece: nothing else can come between
        for what, value in events:
            self._show(what, value)
        self.after(20, self._poll)

    def _show(self, what: str, value: Any) -> None:
        if what == "loading":
            self.bar.configure(value=value[0], maximum=value[1])
            self.status.configure(text=f"{value[2].capitalize()}…")
        elif what == "ready":
            self.context = value.context
            self.name.configure(text=value.path.stem)
            self._now(f"Ready; {value.context:,} tokens of context", send=True)
        elif what == "done":
            self._done(value)
        elif what == "cleared":
            self._write("", "note", start="1.0")
            self._now("A new conversation", send=True)
        elif what in ("failed", "broken"):
            self._write(value + "\n", "error")
            self._now("", send=what == "failed")

    def _text(self, pieces: list[str]) -> None:
        self._write("".join(pieces), "model")
        if not self.tokens:
            self.started = perf_counter() - 0.02  # the first came since the last look
        self.tokens += len(pieces)
        seconds = perf_counter() - self.started
        self.status.configure(text=f"Answering… {self.tokens / seconds:.0f} tokens a second")

    def _done(self, last: edgellama.Chunk) -> None:
        usage = last.usage
        assert usage is not None  # only the last chunk has it
        self._write("\n", "model")
        self._write(ENDS.get(str(last.finish_reason), ""), "note")
        if lost := usage.dropped_messages:
            self._write(f"({len(lost)} old messages were left out)\n", "note")
        rate = usage.completion_tokens / max(usage.decode_seconds, 1e-9)
        used = f"{usage.prompt_tokens + usage.completion_tokens:,} of {self.context:,} in use"
        self._now(f"{usage.completion_tokens} tokens, {rate:.0f} a second; {used}", send=True)


def show(model: str) -> None:
    talk = Talk(model)
    window = Window(talk)
    signal.signal(signal.SIGINT, lambda *_: window.destroy())  # Ctrl-C in the terminal
    window.mainloop()
    talk.close()


if __name__ == "__main__":
    show(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct")
