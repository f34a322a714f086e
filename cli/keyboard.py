"""Reading a person's messages: line editing and history on a terminal, plain lines from a pipe.

A message may span lines: between two fences of three quotes, or after a final backslash. Knows
nothing about models.
"""

import sys
from collections.abc import Callable
from typing import Any

from edgellama.cli.terminal import Terminal

FENCE = '"""'


class Keyboard:
    """Messages one by one; `live` tells whether a person types them."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self.live = sys.stdin is not None and sys.stdin.isatty()
        self._read: Callable[[str], str] = _editor() if self.live else _piped

    def message(self) -> str | None:
        """The next message that is not empty; None when there are no more (Ctrl-D).

        The first Ctrl-C drops what was typed and hints at the way out, the second is passed on.
        """
        warned = False
        while True:
            try:
                text = self._whole()
            except EOFError:
                return None
            except KeyboardInterrupt:
                if warned or not self.live:
                    raise
                warned = True
                self._terminal.note("Ctrl-D or /exit leaves; Ctrl-C once more does, too.")
                continue
            if text.strip():
                return text

    def _whole(self) -> str:
        line = self._read(">>> ").strip()
        if line.startswith(FENCE):
            return self._fenced(line.removeprefix(FENCE))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            try:
                lines.append(self._read("... "))
            except EOFError:
                break
        return "\n".join(lines)

    def _fenced(self, line: str) -> str:
        lines = []
        while not line.rstrip().endswith(FENCE):
            lines.append(line)
            try:
                line = self._read("... ")
            except EOFError:
                return "\n".join(lines)
        return "\n".join([*lines, line.rstrip().removesuffix(FENCE)]).strip("\n")


def _piped(_: str) -> str:
    line = sys.stdin.readline() if sys.stdin is not None and not sys.stdin.closed else ""
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _editor() -> Callable[[str], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    # stdout is for the model's text alone
    session: PromptSession[Any] = PromptSession(output=create_output(stdout=sys.stderr))
    return session.prompt
