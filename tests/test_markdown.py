"""Replies set as Markdown: blocks of a text that comes in pieces, and what a terminal is shown."""

import io
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import pyte
import pytest
from chatting import begun, contents, opened, told
from hypothesis import given, strategies as st

from edgellama.cli.markdown import Blocks, Page

TEXT = """# Title

Some *words*
of two lines.
 \n
- one
- two

```py
a = 1

b = 2
```

last"""
WHOLE = ["# Title", "Some *words*\nof two lines.", "- one\n- two", "```py\na = 1\n\nb = 2\n```"]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)


def words(screen: Screen) -> str:
    """What stands on the screen in the end."""
    window = pyte.Screen(60, 50)
    pyte.Stream(window).feed(screen.getvalue().replace("\n", "\r\n"))
    return "\n".join(line.rstrip() for line in window.display).rstrip()


@given(st.lists(st.integers(0, len(TEXT))))
def test_where_a_text_is_cut_makes_no_difference(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(TEXT)]
    blocks = Blocks()
    pieces = [TEXT[a:b] for a, b in pairwise(places)]
    assert [block for piece in pieces for block in blocks.push(piece)] == WHOLE
    assert blocks.rest == "last"


@pytest.mark.parametrize(
    ("text", "blocks", "rest"),
    [
        ("a\n", [], "a\n"),
        ("\n\n\na\n\n", ["a"], ""),
        ("~~~\n\n```\n\n~~~\n\n", ["~~~\n\n```\n\n~~~"], ""),
        ("````\n```\n\n````\n\n", ["````\n```\n\n````"], ""),
        ("```\n``` not the end\n\n", [], "```\n``` not the end\n\n"),
        ("    ```\n\n", ["    ```"], ""),
    ],
)
def test_blocks(text: str, blocks: list[str], rest: str) -> None:
    cut = Blocks()
    assert cut.push(text) == blocks and cut.rest == rest


def test_a_page() -> None:
    with redirect_stdout(Screen()) as screen, Page() as page:
        for letter in TEXT:
            page.write(letter)
    shown = words(screen)
    for word in ("Title", "Some words of two lines.", "• one", "• two", "a = 1", "b = 2", "last"):
        assert shown.count(word) == 1
    assert "*" not in shown and "#" not in shown and "```" not in shown


def test_a_page_that_is_left_by_an_error_shows_all_there_was() -> None:
    with redirect_stdout(Screen()) as screen, pytest.raises(KeyboardInterrupt), Page() as page:
        page.write("some *words")
        raise KeyboardInterrupt
    assert "some *words" in words(screen)
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l")


def test_text_cannot_command_the_terminal() -> None:
    with redirect_stdout(Screen()) as screen, Page() as page:
        page.write("\x1b]0;title\x07 [here](http://there) \x9b2J <b>bold</b>\n\n[red]red[/red]")
    text = screen.getvalue()
    assert "\x1b]" not in text and "\x07" not in text and "\x9b" not in text
    assert "http://there" in words(screen) and "[red]red[/red]" in words(screen)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_reply_is_kept_as_it_was_said(terminal: bool, tmp_path: Path) -> None:
    with opened(tmp_path / "a.gguf") as model:
        plain, chat = begun(model), begun(model)
        chat.conversation.markdown = True
        told(plain, "hello")
        with redirect_stdout(Screen() if terminal else io.StringIO()) as screen:
            assert chat.take("hello")
        assert contents(chat) == contents(plain)
        assert ("\x1b[?25l" in screen.getvalue()) is terminal  # the cursor was hidden
        assert terminal or screen.getvalue().rstrip("\n") == contents(chat)[1].rstrip("\n")
