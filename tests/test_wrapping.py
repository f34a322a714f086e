"""Lines break between words, in whatever pieces they come; seen on an emulated terminal."""

import pyte
import pytest
from hypothesis import given, settings, strategies as st

from edgellama.cli.wrapping import Wrapping

WIDTH = 20
TEXT = """\
The whale, named Elara, swam  alongside
the ship:
    an indented line that is long
日本語 ok"""


def shown(pieces: list[str], width: int = WIDTH, hanging: bool = False) -> list[str]:
    """The rows that a terminal of that width shows, without blank ones at the end."""
    screen, wrapping = pyte.Screen(width, 400), Wrapping(lambda: width, hanging)
    stream = pyte.Stream(screen)
    for piece in pieces:
        stream.feed(wrapping.fit(piece).replace("\n", "\r\n"))  # as the terminal's driver does
    # pyte marks the second cell of a wide letter with an empty text
    rows = ["".join(screen.buffer[y][x].data for x in range(width)) for y in range(screen.lines)]
    return "\n".join(row.rstrip() for row in rows).rstrip().split("\n")


def test_lines_break_between_words() -> None:
    assert shown([TEXT]) == [
        "The whale, named",
        "Elara, swam",
        "alongside",
        "the ship:",
        "    an indented",
        "line that is long",
        "日本語 ok",
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pieces_do_not_matter(size: int) -> None:
    pieces = [TEXT[at : at + size] for at in range(0, len(TEXT), size)]
    assert shown(pieces) == shown([TEXT])


def test_what_was_begun_moves_to_the_next_line() -> None:
    assert shown(["a row of fourteen al", "ong"]) == ["a row of fourteen", "along"]


def test_a_word_longer_than_a_line_stays_whole_text() -> None:
    link = "https://example.org/" + "a" * 50
    assert "".join(shown([f"see {link} there"])).replace(" ", "") == f"see{link}there"


def test_scripts_without_spaces_fill_their_lines() -> None:
    rows = shown(["日本語" * 9])
    assert "".join(rows) == "日本語" * 9
    assert all(len(row) >= 9 for row in rows[:-1])


def test_what_stands_behind_a_label_goes_on_below_itself() -> None:
    text = "context  8192 tokens of 8192\n   and what is indented\nno label, so no margin"
    labelled = ["context  8192", "         tokens of", "         8192"]
    indented = ["   and what is", "   indented"]
    assert shown([text], hanging=True) == [*labelled, *indented, "no label, so no", "margin"]


def test_a_tab_behind_a_full_line_costs_no_letter() -> None:
    assert shown(["a" * 12 + "b\tc"], 13) == ["a" * 12 + "b", "c"]


def test_an_unknown_width_changes_nothing() -> None:
    assert Wrapping(lambda: 0).fit(TEXT * 9) == TEXT * 9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abc de\nf\t", min_size=1, max_size=9), max_size=30), st.integers(12, 30))
def test_every_word_is_there_and_none_is_torn(pieces: list[str], width: int) -> None:
    words = "".join(pieces).split()
    seen = [word for row in shown(pieces, width) for word in row.split()]
    if all(len(word) < width for word in words):
        assert seen == words
    else:
        assert "".join(seen) == "".join(words)
