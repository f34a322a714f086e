"""Line breaks between words, where a terminal would break a line anywhere.

Text goes in as it comes, in pieces of any length; the same text with line breaks comes out. Knows
nothing about what it says, nor where it is shown.
"""

import re
from collections.abc import Callable

_CLOSE = "\u2e80-\ud7ff\uf900-\ufaff\uff00-\uffef"  # scripts that may be broken at any letter
_PARTS = re.compile(rf"(?P<end>\n)|(?P<gap>[^\S\n]+)|[{_CLOSE}]|(?P<word>[^\s{_CLOSE}]+)")


class Wrapping:
    """Where the cursor stands, told by what has been written since the last line break.

    A word that comes in several pieces is shown at once; when it turns out too long for its line,
    it is wiped off (ECMA-48: CUB, EL) and written on the next.
    """

    def __init__(self, columns: Callable[[], int], hanging: bool = False) -> None:
        """`columns`: the terminal's width now; 0 if not known, and then nothing is broken.

        `hanging`: what follows several spaces, as behind a label or an indentation, goes on below
        itself.
        """
        self._columns, self._hanging = columns, hanging
        self._indent = 0  # of what goes on
        self._column = 0  # cells of this line that are taken
        self._word = ""  # the unfinished word at its end
        self._full = False  # the line, to its last cell: the cursor waits there for a letter

    def fit(self, text: str) -> str:
        """`text` as it is to be shown; of control characters it has line breaks and tabs alone."""
        columns = self._columns()
        if columns < 2:
            return text
        return "".join(self._placed(part, columns) for part in _PARTS.finditer(text))

    def _placed(self, part: "re.Match[str]", columns: int) -> str:
        if part["end"]:
            self._column, self._indent, self._word, self._full = 0, 0, "", False
            return "\n"
        if part["gap"]:
            return self._gap(part["gap"], columns)
        if not part["word"]:
            self._word = ""
        shown = self._letters(part[0], columns)
        self._word = self._word + part[0] if part["word"] else ""
        return shown

    def _letters(self, text: str, columns: int) -> str:
        """More of the unfinished word; one longer than a line is left to the terminal."""
        width, begun = _cells(text), _cells(self._word)
        alone = self._column == begun
        if alone or self._column + width < columns or begun + width >= columns - self._indent:
            self._column = (self._column + width) % columns
            self._full = self._column == 0
            return text
        self._column, self._full = self._indent + begun + width, False
        wipe = f"\x1b[{begun}D\x1b[K" if begun else ""
        return f"{wipe}\n{' ' * self._indent}{self._word}{text}"

    def _gap(self, spaces: str, columns: int) -> str:
        """Spaces that have no room are not shown: the next word begins a line."""
        self._word = ""
        if self._full:  # a tab would put the next letter over the last
            return ""
        end = len((" " * self._column + spaces).expandtabs())
        if end >= columns and self._column:
            self._column = columns - 1
            return ""
        if self._hanging and len(spaces) > 1 and end < columns // 2:
            self._indent = end
        self._column = end
        return spaces


def _cells(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
