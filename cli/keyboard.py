"""Reading a person's messages at a terminal: line editing, history, completion, messages of many
lines.

Enter sends, unless a fence of three quotes is open or the line ends with a backslash; Alt-Enter and
Ctrl-J begin a new line, and what is pasted is one message, as it is. Knows nothing about models.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from edgellama.cli.background import Noted
from edgellama.cli.history import history_file, remember, remembered
from edgellama.cli.pasting import FENCE, Pastes
from edgellama.cli.terminal import Terminal, Terminated, draws

if TYPE_CHECKING:
    from pathlib import Path

    from prompt_toolkit import PromptSession
    from prompt_toolkit.buffer import Buffer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

    from edgellama.cli.commands import Command

PROMPT, MORE = ">>> ", "... "
PLACEHOLDER = "Send a message (/help shows commands)"


class Keyboard:
    """Messages one by one."""

    def __init__(
        self, terminal: Terminal, commands: "Mapping[str, Command]", **streams: Any
    ) -> None:
        """`streams`: prompt_toolkit's input and output, if not those of this process."""
        self._terminal = terminal
        self._drawn = bool(streams) or draws()
        self._warned = False  # of what one more Ctrl-C does
        self._read: Callable[[], str] = (
            partial(_edited, *_editor(commands, streams)) if self._drawn else _plain
        )

    def message(self, empty: bool = False) -> str | None:
        """The next message, an empty one only if that means something; None at Ctrl-D.

        The first Ctrl-C at an empty prompt hints at the way out, the second is passed on.
        """
        if self._warned:
            self._warn()
        while True:
            try:
                text = unfenced(self._read())
            except EOFError:
                return None
            except Terminated:
                raise
            except KeyboardInterrupt:
                if self._warned:
                    raise
                self._warn()
                continue
            if text.strip() or empty:
                self._warned = False
                return text

    def _warn(self) -> None:
        self._warned = True
        self._terminal.tell("Ctrl-D or /exit leaves; Ctrl-C once more does, too.")

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Hushed while a reply is made; a Ctrl-C that it leaves over is one at the next prompt."""
        with Noted() as left:
            try:
                with self.hushed():
                    yield
            finally:
                self._warned = left.pressed

    @contextlib.contextmanager
    def hushed(self) -> Iterator[None]:
        """What is typed meanwhile is not shown amid a bar or a reply, but at the next prompt.

        Ctrl-C still interrupts. Without an editor, the terminal itself shows and keeps the lines.
        """
        if sys.platform == "win32" or not self._drawn:
            yield
            return
        import termios

        try:
            number = sys.stdin.fileno()
            before = termios.tcgetattr(number)
        except (OSError, ValueError, termios.error):  # not a terminal
            yield
            return
        now = list(before)
        now[0] &= ~termios.ICRNL  # Enter arrives as the editor expects it
        now[3] &= ~(termios.ECHO | termios.ICANON)
        now[3] |= termios.NOFLSH  # Ctrl-C would drop words that are on their way to the screen
        termios.tcsetattr(number, termios.TCSANOW, now)
        try:
            yield
        finally:
            termios.tcsetattr(number, termios.TCSANOW, before)


def unfenced(text: str) -> str:
    """A message without the fences around it, and without the backslashes that continued it.

    What stands between fences is no command: a slash at its beginning is doubled.
    """
    stripped = text.strip()
    if stripped.startswith(FENCE):
        inner = stripped.removeprefix(FENCE).removesuffix(FENCE).strip("\n")
        return f"/{inner.lstrip()}" if inner.lstrip().startswith("/") else inner
    return text.replace("\\\n", "\n").rstrip()


def unfinished(text: str) -> bool:
    """Whether Enter begins a new line: within a fence, or behind a backslash."""
    stripped = text.strip()
    if stripped.startswith(FENCE):
        return len(stripped) < 2 * len(FENCE) or not stripped.endswith(FENCE)
    return text.endswith("\\")


def _plain() -> str:
    """A terminal to type at, but none to draw on: a line as it is."""
    lines: list[str] = []
    while not lines or unfinished("\n".join(lines)):
        if sys.stderr.isatty():
            print(MORE if lines else PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            if lines:
                break
            raise EOFError
        lines.append(line.rstrip("\r\n"))
    return "\n".join(lines)


def _edited(session: "PromptSession[str]", pastes: Pastes) -> str:
    """A message from the editor, as if all of it had been typed.

    SIGTERM and SIGHUP, where they are handled, end it in order: an exception amid its work would be
    printed, and Enter asked for. Raises Terminated.
    """
    app, ended = session.app, False

    def leave() -> None:
        if ended and app.future is not None and not app.future.done():
            app.exit(exception=Terminated())

    def end(number: int, frame: object) -> None:
        nonlocal ended
        ended = True
        if app.loop is not None:
            app.loop.call_soon_threadsafe(leave)

    pastes.forget()
    with _handling(end):
        text = session.prompt(pre_run=leave)
    if ended:
        raise Terminated
    return pastes.typed(text)


@contextlib.contextmanager
def _handling(end: Callable[[int, object], None]) -> Iterator[None]:
    numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    before = {n: signal.getsignal(n) for n in numbers if n and callable(signal.getsignal(n))}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _editor(
    commands: "Mapping[str, Command]", streams: Mapping[str, Any]
) -> "tuple[PromptSession[str], Pastes]":
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.filters import Condition, is_done, is_searching
    from prompt_toolkit.output import create_output

    from edgellama.cli.completion import Words

    if not streams:  # stdout is for the model's text alone
        streams = {"output": create_output(stdout=sys.stderr)}
    path, elsewhere, pastes = history_file(), is_searching | is_done, Pastes()
    session: PromptSession[str] = PromptSession(
        PROMPT,
        multiline=True,
        prompt_continuation=_margin,
        key_bindings=_keys(pastes),
        history=kept_history(path, pastes.typed),
        completer=Words(commands),
        complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
        placeholder=lambda: [] if elsewhere() else [("fg:ansibrightblack", PLACEHOLDER)],
        **streams,
    )
    return session, pastes


def kept_history(path: "Path | None", spelled: Callable[[str], str] = str) -> "History":
    """The editor's view of the history file; `spelled` is what is kept of a message."""
    from prompt_toolkit.history import History

    class Remembered(History):
        def load_history_strings(self) -> Iterable[str]:
            return reversed(remembered(path))  # newest first

        def append_string(self, string: str) -> None:
            super().append_string(spelled(string))

        def store_string(self, string: str) -> None:
            remember(path, string)

    return Remembered()


def _margin(width: int, line: int, wraps: int) -> str:
    """What stands before each row of a message but the first: only a new line is marked."""
    return " " * len(MORE) if wraps else MORE


def _keys(pastes: Pastes) -> "KeyBindings":
    """What keys do in a message; while the history is searched, they do what they always did."""
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.keys import Keys

    keys, writing = KeyBindings(), has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=writing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if unfinished(pastes.typed(buffer.text)):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add(Keys.BracketedPaste, filter=writing)
    def _(event: KeyPressEvent) -> None:
        text = event.data.replace("\r\n", "\n").replace("\r", "\n")
        pastes.add(text)
        event.current_buffer.insert_text(text)

    @keys.add("escape", "enter", filter=writing)
    @keys.add("c-j", filter=writing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("tab", filter=writing)
    def _(event: KeyPressEvent) -> None:
        _complete(event.current_buffer)

    @keys.add("c-c", filter=writing)
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
            pastes.forget()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys


def _complete(buffer: "Buffer") -> None:
    """What all completions have in common, at once; else the menu of them."""
    from prompt_toolkit.completion import CompleteEvent, get_common_complete_suffix

    if buffer.complete_state:  # the menu is there
        buffer.complete_next()
        return
    asked = CompleteEvent(completion_requested=True)
    found = list(buffer.completer.get_completions(buffer.document, asked))
    if common := get_common_complete_suffix(buffer.document, found):
        buffer.insert_text(common)
    else:
        buffer.start_completion()
