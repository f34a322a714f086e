"""`edgellama chat` with the real model: its window, pipes, and ends that come from outside."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest

if os.name != "posix":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)

from pseudoterminal import CTRL_C, CTRL_D, CTRL_Z, Window
from terminalhome import BEGUN, CHAT, ESCAPE, GREEDY, LONG, Home, brief, shows

pytest_plugins = ["terminal_fixtures"]


# --- the window -----------------------------------------------------------------------------------


def test_resize_while_a_message_is_written(home: Home, talk: Window) -> None:
    words = [f"word{n}" for n in range(40)]
    brief(talk)
    row = talk.screen.row
    try:
        talk.type(" ".join(words[:20]))
        talk.sees("word19", row)
        talk.resize(38, 20)
        talk.type(" " + " ".join(words[20:30]))
        talk.wait(lambda: shows(talk.display(), "".join(words[25:30])), "redrawn")
        talk.resize(130, 45)
        talk.type(" " + " ".join(words[30:]))
        talk.wait(lambda: shows(talk.display(), "".join(words[35:])), "redrawn")
        assert shows(talk.display(), "".join(words))
        talk.enter("")
    finally:
        talk.resize(100, 40)
    assert home.saved(talk)[0] == " ".join(words)


def test_resize_while_it_writes(home: Home, talk: Window) -> None:
    talk.enter("/set max_tokens 120")
    editors, row, start = talk.screen.editors, talk.screen.row, len(talk.raw)
    talk.type(LONG + "\r")
    talk.sees(BEGUN, row)
    try:
        for columns, rows in ((60, 20), (140, 50), (25, 8)):
            seen = len(talk.raw)
            talk.resize(columns, rows)
            talk.wait(lambda seen=seen: len(talk.raw) > seen + 20, "gone on")
        talk.prompted(editors)
    finally:
        talk.resize(100, 40)
    said = home.saved(talk)
    assert shows(talk.raw[start:].decode(), said[1])
    assert "reply 1 token" in brief(talk).enter("Go on.")


def test_a_narrow_window(home: Home) -> None:
    with home.window("-n", "20", columns=20, rows=10) as window:
        window.prompted()
        question = "Who are you, and what is your name?"
        seen = window.enter(question)
        assert shows(window.text(), question)
        said = home.saved(window)
        assert said[0] == question and shows(window.text(), said[1])
        assert "Traceback" not in seen
        window.type("/exit\r")
        assert window.status() == 0


@pytest.mark.parametrize("colours", [True, False])
def test_colours(home: Home, colours: bool) -> None:
    with home.window("-n", "5", **({} if colours else {"NO_COLOR": "1"})) as window:
        window.prompted()
        window.enter("Hello.")
        window.enter("/why")
        window.type(CTRL_D)
        assert window.status() == 0
        styles = {code for codes in re.findall(rb"\x1b\[([\d;]*)m", window.raw) for code in [codes]}
        assert (styles <= {b"", b"0"}) is not colours, styles


def test_a_dumb_terminal(home: Home) -> None:
    with home.window("-n", "5", TERM="dumb") as window:
        window.sees(">>>")
        window.type("Hello.\r")
        window.sees(r"reply 5 tokens(?s:.*)>>>")
        window.type("/exit\r")
        assert window.status() == 0
        assert ESCAPE not in window.raw, window.raw


# --- pipes ----------------------------------------------------------------------------------------


def piped(home: Home, message: bytes, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [*CHAT, *GREEDY, *arguments],
        input=message,
        capture_output=True,
        env=home.environment(),
        cwd=home.folder,
        timeout=120,
    )


def test_one_turn_from_a_pipe(home: Home) -> None:
    done = piped(home, "Who are\nyou, é?\n".encode(), "-n", "20")
    assert done.returncode == 0
    assert len(done.stdout) > 20 and ESCAPE not in done.stdout + done.stderr
    assert b">>>" not in done.stdout + done.stderr
    document = json.loads(piped(home, "Who are\nyou, é?\n".encode(), "-n", "20", "--json").stdout)
    assert document["messages"][0]["content"] == "Who are\nyou, é?"
    assert document["messages"][1]["content"].strip() == done.stdout.decode().strip()
    assert piped(home, b"\n").returncode == 2


def test_stdout_has_the_models_words_alone(home: Home) -> None:
    command = f"exec {' '.join(CHAT)} {' '.join(GREEDY)} -n 20 > words.txt"
    with home.shell(["/bin/sh", "-c", command]) as window:
        window.prompted()
        for message in ("Hello! Who are you?", "And what is a fox?"):
            window.enter(message)
        window.enter("/stats")
        said = home.saved(window)
        window.type(CTRL_D)
        assert window.status() == 0
    words = (home.folder / "words.txt").read_bytes()
    assert ESCAPE not in words
    assert words.decode() == "".join(reply + "\n" for reply in said[1::2])


def test_stderr_elsewhere(home: Home) -> None:
    """Nothing to draw on: lines are read as the terminal gives them, stdout is the model's."""
    command = f"exec {' '.join(CHAT)} {' '.join(GREEDY)} -n 20 2> notes.txt"
    notes = home.folder / "notes.txt"
    with home.shell(["/bin/sh", "-c", command]) as window:
        window.wait(lambda: notes.exists() and "template" in notes.read_text(), "ready")
        window.type("Hello! Who are you?\r")
        window.wait(lambda: "reply 20 tokens" in notes.read_text(), "answered")
        window.type("/save talk.json\r")
        window.wait(lambda: "2 messages written" in notes.read_text(), "saved")
        window.type(CTRL_C)
        window.wait(lambda: "once more does" in notes.read_text(), "hinted")
        window.type(CTRL_D)
        assert window.status() == 0
    said = json.loads((home.folder / "talk.json").read_text("utf-8"))["messages"]
    assert shows(window.text(), said[1]["content"]) and ESCAPE not in window.raw
    assert "template" not in window.text()


# --- ends that others bring -----------------------------------------------------------------------


@pytest.mark.parametrize("busy", [False, True], ids=["at the prompt", "in a reply"])
@pytest.mark.parametrize("end", ["SIGTERM", "SIGHUP", "closed"])
def test_the_end_comes_from_outside(home: Home, end: str, busy: bool) -> None:
    with home.window() as window:
        window.prompted()
        if busy:
            window.type(LONG + "\r")
            window.sees(BEGUN)
        begun = time.monotonic()
        if end == "closed":
            assert window.hang_up() != 0
        else:
            os.kill(window.child.pid, getattr(signal, end))
            assert window.status() != 0
            assert "Traceback" not in window.text()
        assert time.monotonic() - begun < 30 and not window.left_behind()


def test_ctrl_z_and_fg(home: Home) -> None:
    """A job of a shell is stopped amid a reply, and goes on."""
    if (bash := shutil.which("bash")) is None:
        pytest.skip("needs bash")
    with home.shell([bash, "--norc", "--noprofile", "-i"], PS1="shell$ ") as window:
        window.sees(r"shell\$")
        window.type(f"{' '.join(CHAT)} {' '.join(GREEDY)} -n 120\r")
        window.prompted(1)
        row = window.screen.row
        window.type(LONG + "\r")
        window.sees(BEGUN, row)
        window.type(CTRL_Z)
        window.sees(r"Stopped(?s:.*)shell\$", row)
        editors = window.screen.editors
        window.type("fg\r")
        window.prompted(editors)
        said = home.saved(window)
        assert len(said[1]) > 100 and shows(window.text(row), said[1][-40:])
        window.type("/exit\r")
        window.sees(r"shell\$ *$")
        window.type("echo status $?; exit\r")
        window.sees("status 0")
