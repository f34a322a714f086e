"""What a command says and where: text on stdout, everything else on stderr, one line per error.

Knows nothing about models. Heavy things (rich) are imported only once a bar is really drawn.
"""

import contextlib
import errno
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from edgellama.cli.wrapping import Wrapping
from edgellama.errors import OutputError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
BAR_AFTER = 0.5  # seconds of work before a bar is worth drawing
LINE_AFTER = 2.0  # the same where stderr is no terminal and a plain line must do

_KEPT = "\n\t"
_CONTROLS = *range(0x20), *range(0x7F, 0xA0)  # every escape sequence begins with one
_BIDIRECTIONAL = 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)
_UNSAFE = {code: None for code in (*_CONTROLS, *_BIDIRECTIONAL) if chr(code) not in _KEPT}


# How a piece of a remark looks, by name: the terminal's codes (ECMA-48, Select Graphic Rendition).
STYLES = {"dim": "2", "bold": "1", "good": "32", "fair": "33", "poor": "31"}
Piece = tuple[str, str]  # text, and a name of STYLES or ""


def safe(text: str) -> str:
    """`text` without the characters that could command a terminal or disguise what it shows."""
    return text.translate(_UNSAFE)


def colours() -> bool:
    """Whether stderr may be told how text looks: a terminal whose user has not objected.

    Source: no-color.org.
    """
    objected = bool(os.environ.get("NO_COLOR"))
    able = os.environ.get("TERM", "") not in ("", "dumb") or "WT_SESSION" in os.environ
    return sys.stderr.isatty() and able and not objected


def draws() -> bool:
    """Whether stderr is a terminal that does more than write lines: its cursor can be moved."""
    dumb = os.environ.get("TERM", "") in ("", "dumb") and os.name != "nt"
    return sys.stderr.isatty() and not dumb


def columns(stream: TextIO) -> int:
    """The width of the terminal behind a stream; 0 without one, or if it cannot move a cursor."""
    able = os.environ.get("TERM", "") not in ("", "dumb") or "WT_SESSION" in os.environ
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns if able else 0
    return 0


@dataclass
class Terminal:
    """One command's view of the world outside: how much to say, and in what form."""

    quiet: bool = False
    json: bool = False
    debug: bool = False
    ended_line: bool = field(default=True, repr=False)  # stdout stands at the start of a line
    _words: Wrapping = field(
        default_factory=lambda: Wrapping(lambda: columns(sys.stdout)), repr=False
    )

    def note(self, text: str = "", style: str = "") -> None:
        """A remark for the reader, on stderr; --quiet silences it."""
        if not self.quiet:
            self.tell([(text, style)])

    def tell(self, pieces: str | Iterable[Piece]) -> None:
        """What the reader asked for, on stderr: text, or pieces of it in styles of their own."""
        complain([(pieces, "")] if isinstance(pieces, str) else pieces)

    def write(self, text: str) -> None:
        """The command's own output, as it comes."""
        self._write(text, self._words)

    def write_lines(self, text: str) -> None:
        """Whole lines of it: what stands behind a label goes on below itself."""
        self._write(text, Wrapping(lambda: columns(sys.stdout), hanging=True))

    def _write(self, text: str, words: Wrapping) -> None:
        if not text:
            return
        shown = words.fit(safe(text)) if sys.stdout.isatty() else text
        _print(sys.stdout, shown)
        self.ended_line = shown.endswith("\n") if shown else self.ended_line

    def end_line(self) -> None:
        if not self.ended_line:
            self.write("\n")

    def document(self, value: Any) -> None:
        """The one JSON document of a command with --json."""
        _print(sys.stdout, json.dumps(value, ensure_ascii=False, indent=2) + "\n")

    @contextlib.contextmanager
    def progress(self) -> Iterator["Display"]:
        """A display that shows itself once the work has taken a while, and then goes away."""
        display = Display(self.quiet)
        try:
            yield display
        finally:
            display.close()


class Display:
    """A bar per piece of work on a terminal, a plain line elsewhere. Calls may be concurrent.

    `update` is a progress callback; `remind` repeats its last call, for work that reports seldom.
    `took` has the seconds of each piece of work that came to its end.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._terminal = quiet, draws()
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._told: set[str] = set()
        self._last: tuple[int, int, str, str] | None = None
        self._closed = False
        self._began = self._started  # the piece of work at hand
        self.took: dict[str, float] = {}

    def remind(self) -> None:
        if self._last is not None:
            self.update(*self._last)

    def update(self, done: int, total: int, what: str, detail: str = "") -> None:
        """So much of `what` is done; `detail` follows it and may change."""
        with self._lock:
            now = time.monotonic()
            self._clock(now, what)
            self._last = done, total, what, detail
            waited = now - self._started
            if self._quiet or self._closed:
                return
            if self._terminal and waited > BAR_AFTER:
                self._draw(done, total, what)
            elif not self._terminal and waited > LINE_AFTER and what not in self._told:
                self._told.add(what)
                complain(f"{what}...")

    def _clock(self, now: float, what: str) -> None:
        before = self._last[2] if self._last is not None else what
        if before != what:
            self.took[before] = self.took.get(before, 0.0) + now - self._began
            self._began = now

    def _draw(self, done: int, total: int, what: str) -> None:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        detail = self._last[3] if self._last is not None else ""
        description = safe(f"{what} {detail}".rstrip())
        if what not in self._tasks:  # it may be drawn at once
            self._tasks[what] = self._bars.add_task(description, total=total or None)
        self._bars.update(
            self._tasks[what], completed=done, total=total or None, description=description
        )

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._bars is not None:
                self._bars.stop()


def _bars() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)


def complain(text: str | Iterable[Piece]) -> None:
    """A line on stderr; where nobody can read it, silence is all that is left."""
    pieces = [(text, "")] if isinstance(text, str) else text
    words = Wrapping(lambda: columns(sys.stderr), hanging=True)
    with contextlib.suppress(OSError, ValueError):
        coloured = colours()
        line = "".join(
            _styled(words.fit(safe(piece)), style if coloured else "") for piece, style in pieces
        )
        print(line, file=sys.stderr, flush=True)


def _styled(text: str, style: str) -> str:
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if style else text


def prepare_streams() -> None:
    """Let every character out, whatever the terminal's encoding; pipes and files get UTF-8.

    A stream that was closed before we began leads nowhere; no file of ours may take its number.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 - as long as the program
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")


def _print(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        abandon_stdout()
        if error.errno in (errno.EPIPE, errno.EINVAL):  # EINVAL: Windows, the reader has gone
            raise ReaderGone from error
        raise OutputError(f"stdout cannot be written: {error.strerror or error}") from error


class Terminated(KeyboardInterrupt):
    """The system wants the program to end; unlike Ctrl-C, this is not about the work at hand."""


class ReaderGone(Exception):
    """Whoever read our output has had enough (`| head -1`); nothing is wrong."""


def abandon_stdout() -> None:
    """Send what Python still holds for stdout nowhere, so that its exit does not complain."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
