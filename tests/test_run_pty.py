"""`edgellama run` at a terminal, with the real default model: what is seen while it reads."""

import os
import sys

import pytest

if os.name != "posix":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)

from pseudoterminal import CTRL_C, Window
from terminalhome import Home

pytest_plugins = ["terminal_fixtures"]
LONG = " ".join(f"{n}: the quick brown fox." for n in range(700))  # some seconds' reading


def reading(home: Home, *more: str) -> Window:
    """A prompt that is too long to type, in a window of its own."""
    (home.folder / "prompt.txt").write_text(LONG)
    command = (sys.executable, "-m", "edgellama", "run", str(home.model), "--file", "prompt.txt")
    return home.shell([*command, "-n", "5", "--threads", "1", *more])


@pytest.mark.parametrize("more", [(), ("--raw",)])
def test_a_bar_while_it_reads(home: Home, more: tuple[str, ...]) -> None:
    with reading(home, *more) as window:
        window.sees(r"reading the prompt \(0 cached / [1-9]\d* processed / \d+ tokens\)")
        window.type(CTRL_C)
        assert window.status() == 130
        assert "Traceback" not in window.text()


def test_no_bar_elsewhere(home: Home) -> None:
    (home.folder / "few.txt").write_text(LONG[:4_000])  # at least half a second's reading
    command = f"exec {sys.executable} -m edgellama run {home.model} --file few.txt -n 2 2> notes"
    with home.shell(["/bin/sh", "-c", command]) as window:
        assert window.status() == 0
    notes = (home.folder / "notes").read_bytes()
    assert b"prompt 1 of 1" in notes and b"processed" not in notes and b"\x1b" not in notes
