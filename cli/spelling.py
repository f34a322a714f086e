"""Tokens, shares and sizes as a person reads them. Knows nothing about conversations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgellama.tokenizer import Tokenizer

WIDTH = 79  # columns of a table
_MEGA = 1e6


def piece(tokenizer: "Tokenizer", token: int) -> str:
    """A token in quotes, such as ' the' or '\\n'; bytes that are no whole character as <E2 82>."""
    text = tokenizer.decode([token], special=True, continuing=True)
    if "\ufffd" in text and not tokenizer.is_special(token):
        return f"<{tokenizer.token_bytes(token).hex(' ').upper()}>"
    return repr(text)


def tokens_in_rows(tokenizer: "Tokenizer", ids: Sequence[int]) -> str:
    """Ids and pieces, as many a line as fit."""
    rows, row = [], ""
    for token in ids:
        word = f"{token} {piece(tokenizer, token)}"
        if row and len(row) + 3 + len(word) > WIDTH:
            rows.append(row)
            row = word
        else:
            row = f"{row}   {word}" if row else word
    return "\n".join([*rows, row])


def percent(share: float) -> str:
    """A share of 1: 63 %, 4.2 %, 0.07 %, <0.01 %."""
    hundredths = 100 * share
    if hundredths >= 9.95:
        return f"{hundredths:.0f} %"
    if hundredths >= 0.095:
        return f"{hundredths:.1f} %"
    return f"{hundredths:.2f} %" if hundredths >= 0.01 else "<0.01 %"


def megabytes(size: int) -> str:
    return f"{size / _MEGA:,.0f} MB" if size >= _MEGA else f"{size / 1e3:,.0f} kB"


def millions(count: int) -> str:
    return f"{count / _MEGA:,.0f} million" if count >= _MEGA else f"{count:,}"


def beginning(text: str, length: int = 48) -> str:
    """The first words of a text, on one line, in quotes."""
    line = " ".join(text[: 4 * length].split())
    return (
        f'"{line}"' if len(line) <= length and len(text) <= 4 * length else f'"{line[:length]}..."'
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: cells of a column begin below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")
