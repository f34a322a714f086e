"""Line breaks between words, where a terminal would break a line anywhere.

Text goes in as it comes, in pieces of any length; the same text with line breaks comes out. Knows
nothing about what it says, nor where it is shown.
"""

import re
from collections.abc import Callable

_WIDE = "\u2e80-\ud7ff\uf900-\ufaff\uff00-\uffef"  # scripts that may be broken at any letter
_PARTS = re.compile(rf"\n|[^\S\n]+|[{_WIDE}]|[^\s{_WIDE}]+")


class Wrapping:
    """Where the cursor stands, told by what has been written since the last line break.

    A word that comes in several pieces is shown at once; when it turns out too long for its line,
    it is wiped off (ECMA-48: CUB, EL) and written on the next.
    """

    def __init__(self, columns: Callable[[], int]) -> None:
        """`columns`: the terminal's width now; 0 if not known, and then nothing is broken."""
        self._columns = columns
        self._column = 0  # cells of this line that are taken
        self._word = ""  # the unfinished word at its end

    def fit(self, text: str) -> str:
        """`text` as it is to be shown; of control characters it has line breaks and tabs alone."""
        columns = self._columns()
        if columns < 2:
            return text
        return "".join(self._placed(part, columns) for part in _PARTS.findall(text))

    def _placed(self, part: str, columns: int) -> str:
        if part == "\n":
            self._column, self._word = 0, ""
            return part
        if part.isspace():
            return self._gap(part, columns - 1)
        if re.match(f"[{_WIDE}]", part):
            self._word = ""
        width, begun = _cells(part), _cells(self._word)
        before = self._column - begun  # what this line holds ahead of the word
        if before and self._column + width >= columns > begun + width:
            wipe = f"\x1b[{begun}D\x1b[K" if begun else ""
            shown, self._column = f"{wipe}\n{self._word}{part}", begun + width
        else:  # a word longer than a line is left to the terminal
            shown, self._column = part, (self._column + width) % columns
        self._word = "" if re.match(f"[{_WIDE}]", part) else self._word + part
        return shown

    def _gap(self, spaces: str, last: int) -> str:
        """Spaces that have no room are not shown: the next word begins a line."""
        self._word = ""
        end = len((" " * self._column + spaces).expandtabs())
        if end > last and self._column:
            self._column = last
            return ""
        self._column = end
        return spaces


def _cells(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
