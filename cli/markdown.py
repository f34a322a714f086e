"""A reply shown as Markdown: `chat --markdown`. Each block is set once it is whole.

The block at hand is shown as it comes and set anew when it ends; what is above stays as it is, so
that a long reply can be scrolled. Knows nothing about models.
"""

import re
import sys
from typing import Self

from edgellama.cli.terminal import safe

FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
CODE = "ansi_dark"  # colours of code: the terminal's own, on its own background
REFRESH = 12  # times a second


class Blocks:
    """Cuts a text that comes in pieces into blocks of Markdown: blank lines end them, but none in a
    fence of code."""

    def __init__(self) -> None:
        self.rest = ""  # the block at hand
        self._seen = 0  # characters of it that are known not to end it
        self._fence = ""

    def push(self, text: str) -> list[str]:
        """The blocks that are whole now."""
        self.rest += text
        blocks = []
        while (end := self.rest.find("\n", self._seen)) >= 0:
            line, self._seen = self.rest[self._seen : end], end + 1
            self._look_for_fence(line)
            if not line.strip() and not self._fence:
                block = self.rest[: self._seen].rstrip().lstrip("\n")
                self.rest, self._seen = self.rest[self._seen :], 0
                blocks += [block] if block else []
        return blocks

    def _look_for_fence(self, line: str) -> None:
        found = FENCE.match(line)
        if found is None:
            return
        if not self._fence:
            self._fence = found[1]
        elif found[1].startswith(self._fence) and not line.strip().strip(self._fence[0]):
            self._fence = ""


class Page:
    """Where a reply appears on a terminal's stdout. A context manager: leaving it sets the rest."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=sys.stdout)
        self._blocks, self._begun = Blocks(), False
        self._live = Live(
            console=self._console,
            refresh_per_second=REFRESH,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def write(self, text: str) -> None:
        from rich.text import Text

        for block in self._blocks.push(safe(text)):
            self._live.update(Text())  # else it would be shown once more below itself
            self._set(block)
        self._live.update(Text(self._blocks.rest))

    def _set(self, block: str) -> None:
        from rich.markdown import Markdown

        if self._begun:
            self._console.print()
        self._begun = True
        self._console.print(Markdown(block, CODE, hyperlinks=False))  # addresses are shown

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        rest = self._blocks.rest.strip("\n")
        self._live.stop()
        if rest:
            self._set(rest)
