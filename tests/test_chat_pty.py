"""Whole sessions of `edgellama chat` at a terminal, with the real default model."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

if os.name != "posix":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)

from offline import Watched
from pseudoterminal import (
    ALT_ENTER,
    BACKSPACE,
    CTRL_C,
    CTRL_D,
    CTRL_Z,
    LEFT,
    PASTE,
    TAB,
    UP,
    Window,
    environment,
)

from edgellama.paths import DEFAULT_MODEL, cache_dir

CHAT = (sys.executable, "-m", "edgellama", "chat")
GREEDY = ("--temperature", "0")
LONG = "Write a very long story about a fox."  # more than a minute's reply would fit the context
BEGUN = re.escape(LONG) + r"\n(?!reading)[^\n](?s:.{20})"  # some of the reply, and no bar
ESCAPE = b"\x1b"
# What the person's editor does: notes what it was given, and writes what is ready for it.
EDITOR = """
import pathlib, sys
given, ready = pathlib.Path("given.txt"), pathlib.Path("ready.txt")
given.write_bytes(pathlib.Path(sys.argv[1]).read_bytes())
pathlib.Path(sys.argv[1]).write_bytes(ready.read_bytes() if ready.exists() else b"")
"""


@dataclass
class Home:
    """A folder of one's own: a cache with the model and a history, an editor, saved talks."""

    folder: Path
    watched: Watched

    def window(self, *arguments: str, columns: int = 100, rows: int = 40, **more: str) -> Window:
        """A chat in a terminal window; `more` are environment variables."""
        command = [*CHAT, *GREEDY, *arguments]
        return self.shell(command, columns=columns, rows=rows, **more)

    def shell(self, command: list[str], columns: int = 100, rows: int = 40, **more: str) -> Window:
        settings = self.environment(**more)
        return Window(command, settings, columns=columns, rows=rows, folder=self.folder)

    def environment(self, **more: str) -> dict[str, str]:
        own = {
            "HOME": str(self.folder),
            "EDGELLAMA_CACHE": str(self.folder / "cache"),
            "EDITOR": f"{sys.executable} {self.folder / 'editor.py'}",
            "VISUAL": "",
        }
        return environment(**(own | self.watched.environment() | more))

    def saved(self, window: Window) -> list[str]:
        """What was said so far, as /save has it: message, reply, message, reply..."""
        assert shows(window.enter("/save talk.json"), "written to")
        document = json.loads((self.folder / "talk.json").read_text("utf-8"))
        return [message["content"] for message in document["messages"]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("home")
    (folder / "cache" / "models").mkdir(parents=True, mode=0o700)
    (folder / "cache" / "models" / f"{DEFAULT_MODEL}.gguf").symlink_to(default_model.absolute())
    (folder / "cache" / "kernels").symlink_to(cache_dir("kernels"))
    (folder / "editor.py").write_text(EDITOR)
    watched = Watched(folder)
    yield Home(folder, watched)
    assert watched.processes(), "nobody was watched"
    assert watched.attempts() == []


Talk = Callable[[], Window]


@pytest.fixture(scope="module")
def opened(home: Home) -> Iterator[list[Window]]:
    windows: list[Window] = []
    yield windows
    for window in windows:
        window.__exit__()


@pytest.fixture
def talk(home: Home, opened: list[Window]) -> Window:
    """A window whose chat has said nothing yet; most tests share it, one after the other."""
    if not opened or not opened[-1].waiting():
        opened.append(home.window())
        opened[-1].prompted()
    opened[-1].enter("/clear")
    opened[-1].enter("/system -")
    opened[-1].enter("/set max_tokens default")
    return opened[-1]


def brief(window: Window) -> Window:
    """From here on, replies of one token: only the messages matter."""
    window.enter("/set max_tokens 1")
    return window


# --- conversations --------------------------------------------------------------------------------


def test_two_turns(home: Home) -> None:
    with home.window() as window:
        window.prompted()
        first = window.text()
        for words in ("135 million parameters", "cpu runtime", "8192 tokens", "template  the file"):
            assert words in first
        assert "Send a message" in window.line()
        one = window.enter("Hello! Who are you?")
        two = window.enter("And what can you do for me?")
        said = home.saved(window)
        assert [said[0], said[2]] == ["Hello! Who are you?", "And what can you do for me?"]
        for seen, reply in ((one, said[1]), (two, said[3])):
            assert len(reply) > 20 and shows(seen, reply)
            assert re.search(r"\[prompt\d+tokens.*reply\d+tokens.*context\d+/8192", squeezed(seen))
        assert "cached" not in one and "cached" in two
        window.type("/exit\r")
        assert window.status() == 0


def squeezed(text: str) -> str:
    """Without blanks and line ends: a terminal breaks lines where it will."""
    return re.sub(r"\s+", "", text)


def shows(seen: str, words: str) -> bool:
    return squeezed(words) in squeezed(seen)


def test_every_command(home: Home, talk: Window) -> None:
    """One session through all of them; each says what it is for, and nothing goes wrong inside."""
    (home.folder / "notes.txt").write_text("The fox's name is Quillon.\n")
    steps = {
        "/help": "/regen",
        "/help set": "/set temperature 0",
        "/set max_tokens 12": "max_tokens",
        "/system You are a pirate.": "system: You are a pirate.",
        "/read notes.txt": "in front of your next message",
        "What is the fox's name?": "context ",
        "/why": "%",
        "/regen": "temperature is 0",
        "/context": "of 8192 tokens",
        "/tokens": "<|im_start|>",
        "/stats": "replies",
        "/show": "The template:",
        "/set": "temperature",
        "/copy": "clipboard",
        "/save all.json": "3 messages written",
        "/undo": "Taken back",
        "/load all.json": "1 exchange read",
        "/clear": "is forgotten",
        "/system -": "There is no system message",
    }
    for typed, words in steps.items():
        seen = talk.enter(typed)
        assert shows(seen, words), (typed, seen)
        assert "internal error" not in seen and "Traceback" not in seen
    document = json.loads((home.folder / "all.json").read_text("utf-8"))
    said = [message["content"] for message in document["messages"]]
    assert said[0] == "You are a pirate."
    assert said[1] == "The fox's name is Quillon.\n\nWhat is the fox's name?"


def test_what_looks_like_a_command(home: Home, talk: Window) -> None:
    assert "There is no command '/frobnicate'" in brief(talk).enter("/frobnicate the fox")
    assert "Did you mean /stats" in talk.enter("/stat")
    talk.enter("//frobnicate the fox")
    assert home.saved(talk)[0] == "/frobnicate the fox"
    assert len(home.saved(talk)) == 2


# --- Ctrl-C and Ctrl-D ----------------------------------------------------------------------------


def test_ctrl_c_while_it_writes(home: Home, talk: Window) -> None:
    editors, row = talk.screen.editors, talk.screen.row
    talk.type(LONG + "\r")
    talk.sees(BEGUN, row)
    talk.type(CTRL_C)
    talk.prompted(editors)
    seen = talk.text(row)
    assert "stopped" in seen and "stays in the conversation" in seen and "Traceback" not in seen
    said = home.saved(talk)
    assert said[0] == LONG and len(said[1]) >= 20
    assert shows(seen, said[1])
    talk.enter("/set max_tokens 5")
    assert "reply 5 tokens" in talk.enter("Go on.")  # it knows what it had said
    assert home.saved(talk)[1] == said[1]


def test_ctrl_c_while_it_reads_ten_kilobytes_of_paste(home: Home, talk: Window) -> None:
    pasted = "\n".join(f"{n}: a b c d e f g h i j k l m n o p 日本語 é ñ" for n in range(160))
    assert len(pasted.encode()) > 8_000
    pasted += "x" * (10_000 - len(pasted.encode()))
    editors, row = talk.screen.editors, talk.screen.row
    talk.type(PASTE.format(pasted.replace("\n", "\r")))
    talk.sees("xxx")  # the last of it
    assert talk.screen.editors == editors  # no line of it was sent
    talk.type("\r")
    talk.sees(r"\d+ processed / \d+ tokens", row)
    talk.type(CTRL_C)
    talk.prompted(editors)
    assert shows(talk.text(row), "it had not begun, and the message was not kept")
    assert "0 messages written" in talk.enter("/save none.json")
    talk.enter("/edit")  # opens it, and makes it nothing
    assert (home.folder / "given.txt").read_text("utf-8") == pasted
    assert "reply 1 token" in brief(talk).enter("Hello.")


def test_ctrl_c_at_the_prompt(home: Home, talk: Window) -> None:
    talk.type("half a mess")
    talk.wait(lambda: "half a mess" in talk.line(), "typed")
    talk.type(CTRL_C)
    talk.wait(talk.waiting, "dropped what was typed")
    assert "once more" not in talk.line()
    assert "once more does" in talk.enter(CTRL_C, end="")
    assert home.saved(talk) == []  # something else came between: the next one is a first one
    assert "once more does" in talk.enter(CTRL_C, end="")
    talk.type(CTRL_C)
    assert talk.status() == 130
    assert "Traceback" not in talk.text()


def test_ctrl_c_while_it_loads(home: Home) -> None:
    """The process is halted when it has opened the file, and wakes to find the Ctrl-C."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file is open")
    with home.window() as window:
        pid = window.child.pid
        window.wait(lambda: any(name.endswith(".gguf") for name in open_files(pid)), "loading")
        os.kill(pid, signal.SIGSTOP)
        window.type(CTRL_C)
        os.kill(pid, signal.SIGCONT)
        assert window.status() == 130
        assert ">>>" not in window.text() and "Traceback" not in window.text()


def open_files(pid: int) -> list[str]:
    names = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            names.append(os.readlink(link))
        except OSError:  # closed meanwhile
            continue
    return names


def test_ctrl_c_while_it_compiles_for_the_first_time(home: Home, tmp_path: Path) -> None:
    model = home.folder / "cache" / "models" / f"{DEFAULT_MODEL}.gguf"
    with home.window(str(model), EDGELLAMA_CACHE=str(tmp_path / "cache")) as window:
        window.sees("compiling kernels")
        window.type(CTRL_C)
        assert window.status() == 130
        assert ">>>" not in window.text() and "Traceback" not in window.text()


def test_ctrl_d(home: Home, talk: Window) -> None:
    talk.type(CTRL_D)
    assert talk.status() == 0


# --- the line editor ------------------------------------------------------------------------------


def test_unicode_typed_and_pasted(home: Home, talk: Window) -> None:
    typed = "e\u0301 \u65e5\u672c\u8a9e \U0001f469\u200d\U0001f469\u200d\U0001f467 na\u00efve"
    pasted = "\u4e2d\u6587 \U0001f98a\ufe0f o\u0308 \u0645\u0631\u062d\u0628\u0627 \U00010348"
    brief(talk).type(typed)
    talk.wait(lambda: "\u65e5\u672c\u8a9e" in talk.line() and "na\u00efve" in talk.line(), "typed")
    talk.enter("")
    talk.enter(PASTE.format(pasted))
    talk.enter(f"\u65e5\u672c\u8a9e{LEFT}{BACKSPACE}")
    assert home.saved(talk)[::2] == [typed, pasted, "\u65e5\u8a9e"]


def test_messages_of_several_lines(home: Home, talk: Window) -> None:
    brief(talk).enter('"""one\rtwo\r\rfour"""')
    talk.enter(f"one{ALT_ENTER}two\nthree")
    talk.enter("one\\\rtwo")
    talk.enter(PASTE.format("one\rtwo"))
    assert home.saved(talk)[::2] == ["one\ntwo\n\nfour", "one\ntwo\nthree", "one\ntwo", "one\ntwo"]


def test_edit(home: Home, talk: Window) -> None:
    ready = home.folder / "ready.txt"
    ready.write_text("From the editor:\nmörk\n", "utf-8")
    seen = brief(talk).enter("/edit a draft")
    ready.unlink()
    assert (home.folder / "given.txt").read_text() == "a draft" and "mörk" in seen
    assert home.saved(talk)[0] == "From the editor:\nmörk"
    talk.enter("/undo")
    assert "nothing was sent" in talk.enter("/edit")
    assert (home.folder / "given.txt").read_text("utf-8") == "From the editor:\nmörk"


def test_completion(home: Home, talk: Window) -> None:
    (home.folder / "unmistakable.txt").write_text("words")
    for start, whole in (("/cle", "/clear"), ("/read unmis", "/read unmistakable.txt")):
        talk.type(start + TAB)
        talk.wait(lambda whole=whole: talk.line() == f">>> {whole}", f"completed to {whole}")
        talk.type("\x15")  # Ctrl-U
        talk.wait(talk.waiting, "emptied")
    talk.type("half" + TAB + "way")
    talk.wait(lambda: talk.line().startswith(">>> half"), "typed")
    assert "way" in talk.line() and "/" not in talk.line()
    talk.type(CTRL_C)
    talk.wait(talk.waiting, "emptied")


def test_history_of_an_earlier_chat(home: Home, talk: Window) -> None:
    brief(talk).enter("What did\\\rthe fox say?")
    talk.enter("/stats")
    with home.window() as window:
        window.prompted()
        window.enter("/set max_tokens 1")
        window.type(UP * 2)
        window.wait(lambda: "/stats" in window.line(), "recalled")
        window.type(UP)
        window.sees("the fox say.\n?.*$")
        window.enter("")
        assert home.saved(window)[0] == "What did\nthe fox say?"


def test_what_is_typed_during_a_reply_comes_after_it(home: Home, talk: Window) -> None:
    talk.enter("/set max_tokens 150")
    editors, row = talk.screen.editors, talk.screen.row
    talk.type(LONG + "\r")
    talk.sees(BEGUN, row)
    talk.type("typed ahead")
    talk.wait(lambda: talk.screen.editors > editors and "ahead" in talk.line(), "prompted")
    assert talk.line() == ">>> typed ahead"
    talk.type(CTRL_C)
    talk.wait(talk.waiting, "emptied")
    assert "typed" not in home.saved(talk)[1]


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
        assert time.monotonic() - begun < 30


def test_ctrl_z_and_fg(home: Home) -> None:
    """A job of a shell is stopped amid a reply, and goes on."""
    with home.shell(["/bin/bash", "--norc", "--noprofile", "-i"], PS1="shell$ ") as window:
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
