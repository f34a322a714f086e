"""A terminal window with a program in it: keys go in, and what a person would see comes out.

pexpect holds the pseudo-terminal, pyte draws what the program writes. POSIX only. Knows nothing
about the program.
"""

import os
import re
import time
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pexpect
import pyte
from wcwidth import wcwidth

PATIENCE = 120.0  # seconds in which something must come: some hundred times what it takes
PROMPT = ">>> "
EDITING = 2004 << 5  # the mode of bracketed paste: a line editor has the keyboard
PASTE = "\x1b[200~{}\x1b[201~"
CTRL_C, CTRL_D, CTRL_Z, TAB, BACKSPACE = "\x03", "\x04", "\x1a", "\t", "\x7f"
ENTER, ALT_ENTER, UP, LEFT = "\r", "\x1b\r", "\x1b[A", "\x1b[D"


class _Screen(pyte.HistoryScreen):
    """A screen that remembers what scrolled off it, and answers what the program asks."""

    def __init__(self, columns: int, rows: int, answer: Callable[[str], None]) -> None:
        self.editors = 0  # times that a line editor took the keyboard, on another row than before:
        self._began = -1  # after a change of the window's size it takes it again
        self._answer = answer
        super().__init__(columns, rows, history=100_000)

    def write_process_input(self, data: str) -> None:
        self._answer(data)

    def set_mode(self, *wanted: int, **more: Any) -> None:
        if more.get("private") and 2004 in wanted and self.row != self._began:
            self.editors, self._began = self.editors + 1, self.row
        super().set_mode(*wanted, **more)

    def draw(self, data: str) -> None:
        # pyte drops all that follows a joiner or a variation selector: they are drawn as nothing
        super().draw("".join(c for c in data if wcwidth(c) > 0 or unicodedata.combining(c)))

    def rows(self) -> list[str]:
        """All lines from the first to the last, without the blanks at their ends."""
        lines = [*self.history.top, *(self.buffer[y] for y in range(self.lines))]
        return [
            "".join(line[x].data for x in range(max(line, default=0) + 1)).rstrip()
            for line in lines
        ]

    def resize(self, lines: int, columns: int) -> None:
        """As xterm does: nothing is wrapped anew, and what has no room scrolls off the top.

        pyte would forget it, and leave the cursor where it was.
        """
        row = self.cursor.y
        excess = max(0, row - lines + 1)
        self.cursor.y = self.lines - 1
        for _ in range(excess):
            self.index()
        for line in self.buffer.values():
            for x in range(columns, self.columns):
                line.pop(x, None)
        for y in range(lines, self.lines):
            self.buffer.pop(y, None)
        self.lines, self.columns = lines, columns
        self.cursor.y, self.cursor.x = row - excess, min(self.cursor.x, columns - 1)
        self.set_margins()

    @property
    def row(self) -> int:
        """The cursor's, counted from the first line that ever was."""
        return len(self.history.top) + self.cursor.y


def _text(line: Mapping[int, Any]) -> str:
    return "".join(line[x].data for x in range(max(line, default=-1) + 1)).rstrip()


class Window:
    """A program in a terminal window of its own; leaving the `with` ends it."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        columns: int = 100,
        rows: int = 40,
        folder: Path | None = None,
    ) -> None:
        with warnings.catch_warnings():  # the child becomes another program at once
            warnings.filterwarnings("ignore", ".*forkpty", DeprecationWarning)
            self.child = pexpect.spawn(
                command[0],
                list(command[1:]),
                env=dict(environment),
                cwd=folder,
                dimensions=(rows, columns),
            )
        self.child.delaybeforesend = None
        self.raw = b""  # all that was written
        self.screen = _Screen(columns, rows, self.child.send)
        self._stream = pyte.ByteStream(self.screen)

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, *_: object) -> None:
        self.child.close(force=True)

    def type(self, text: str) -> None:
        """Keys, as bytes of UTF-8; what the program writes meanwhile is taken in.

        A terminal holds few keys (4096 bytes): a paste waits until the program has read some.
        """
        data = text.encode()
        for at in range(0, len(data), 1024):
            self.child.send(data[at : at + 1024])
            self.look(0)

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        self.child.setwinsize(rows, columns)

    def look(self, seconds: float = 0.05) -> bool:
        """Take in what the program has written; False once its end of the terminal is closed."""
        try:
            data = self.child.read_nonblocking(65536, seconds)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self._stream.feed(data)
        return True

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"never {what}:\n{self.text()}"
            assert self.look() or condition(), f"the end came before {what}:\n{self.text()}"

    def sees(self, pattern: str, since: int = 0) -> re.Match[str]:
        """Wait for `pattern` in the lines from row `since` on."""
        self.wait(lambda: re.search(pattern, self.text(since)), f"seen {pattern!r}")
        found = re.search(pattern, self.text(since))
        assert found is not None
        return found

    def text(self, since: int = 0) -> str:
        """What is on the screen and above it, from row `since` on."""
        return "\n".join(self.screen.rows()[since:]).rstrip("\n")

    def display(self) -> str:
        """What is on the screen now."""
        return self.text(len(self.screen.history.top))

    def line(self) -> str:
        """The line with the cursor."""
        return self.screen.rows()[self.screen.row]

    def prompted(self, editors: int = 0) -> None:
        """Wait until a line editor has the keyboard, for the `editors`th time at least."""
        self.wait(lambda: self.screen.editors > editors and self.waiting(), "asked for a message")

    def waiting(self) -> bool:
        """Whether the cursor stands at the beginning of a message."""
        return EDITING in self.screen.mode and self.screen.cursor.x == len(PROMPT)

    def enter(self, keys: str, end: str = ENTER) -> str:
        """Type a line and wait until the next is asked for; returns what came between, as seen."""
        editors, row = self.screen.editors, self.screen.row
        self.type(keys + end)
        self.prompted(editors)
        return "\n".join(self.screen.rows()[row : self.screen.row])

    def status(self) -> int:
        """Wait for the end; the exit status, or minus the signal that ended it."""
        self.wait(lambda: not self.look(), "come to its end")
        return self._ended()

    def hang_up(self) -> int:
        """Close the terminal and wait for the program's end, as `status` does."""
        self.child.ptyproc.fileobj.close()
        return self._ended()

    def left_behind(self) -> bool:
        """Whether any process of the window's is still there after its end."""
        try:
            os.killpg(self.child.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _ended(self) -> int:
        deadline = time.monotonic() + PATIENCE
        while self.child.isalive():
            assert time.monotonic() < deadline, f"it does not end:\n{self.text()}"
            time.sleep(0.02)
        if self.child.signalstatus is not None:
            return -int(self.child.signalstatus)
        return int(self.child.exitstatus)


def environment(**more: str) -> dict[str, str]:
    """Ours, as a person at a plain terminal has it: colours, UTF-8."""
    ours = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "PROMPT_TOOLKIT_NO_CPR")}
    return ours | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"} | more
