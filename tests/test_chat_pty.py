"""Whole sessions of `edgellama chat` at a terminal, with the real default model: what is typed."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

if os.name != "posix":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)

from pseudoterminal import (
    ALT_ENTER,
    BACKSPACE,
    CTRL_C,
    CTRL_D,
    LEFT,
    PASTE,
    PATIENCE,
    TAB,
    UP,
    Window,
)
from terminalhome import BEGUN, LONG, Home, brief, shows, squeezed

pytest_plugins = ["terminal_fixtures"]


# --- conversations --------------------------------------------------------------------------------


def test_two_turns(home: Home) -> None:
    with home.window() as window:
        window.prompted()
        first = window.text()
        for words in ("135 million parameters", "cpu runtime", "8192 tokens", "template  the file"):
            assert words in first
        assert "Send a message" in window.line()
        assert window.enter("").rstrip() == ">>>"  # the hint goes with the line
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


def test_a_context_that_fills(home: Home) -> None:
    """It is told before it happens, what does not fit is refused, and what is dropped is named."""
    with home.window("--context", "128", "-n", "30") as window:
        window.prompted()
        seen = window.enter("The quick brown fox jumps over the lazy dog. " * 2)
        while "context is" not in seen:  # 80 % of it is reached by a reply of 30 tokens or two
            assert (refused := home.saved(window)) and len(refused) < 8
            seen = window.enter("Tell me about it.")
        assert re.search(r"Thecontextis\d+%full", squeezed(seen))
        before = home.saved(window)
        refused = window.enter("fox " * 200)
        assert shows(refused, "do not fit the context of 128")
        assert shows(refused, "The message was not kept") and home.saved(window) == before
        window.enter("/set overflow shift")
        seen = window.enter("And what about the lazy old cats that live in the big house?")
        assert shows(seen, "The context was full: the model did not see")
        assert len(home.saved(window)) == len(before) + 2  # out of its sight, and still there
        assert shows(window.enter("/context"), "The last reply was made without")
        window.type(CTRL_D)
        assert window.status() == 0


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


def test_ctrl_c_again_at_once(home: Home, talk: Window) -> None:
    """Two may be seen as one; whenever the second is seen, the reply stays and the chat goes on."""
    editors, row = talk.screen.editors, talk.screen.row
    talk.type(LONG + "\r")
    talk.sees(BEGUN, row)
    talk.type(CTRL_C)
    talk.type(CTRL_C)
    talk.prompted(editors)
    said = home.saved(talk)
    assert said[0] == LONG and len(said[1]) >= 20
    assert "Traceback" not in talk.text(row)


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
        deadline = time.monotonic() + PATIENCE
        while not any(name.endswith(".gguf") for name in open_files(pid)):  # soon closed again
            assert time.monotonic() < deadline
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
    with home.window(str(home.model), EDGELLAMA_CACHE=str(tmp_path / "cache")) as window:
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


def test_ctrl_c_in_the_editor(home: Home) -> None:
    """It ends the editor, not the chat; the end of the chat ends the editor."""
    (home.folder / "slow.py").write_text("import time\nprint('EDITING')\ntime.sleep(600)\n")
    editor = f"{sys.executable} -u {home.folder / 'slow.py'}"
    with home.window(EDITOR=editor) as window:
        window.prompted()
        editors, row = window.screen.editors, window.screen.row
        window.type("/edit hello\r")
        window.sees("EDITING", row)
        window.type(CTRL_C)
        window.prompted(editors)
        assert shows(window.text(row), "the editor was interrupted")
        assert home.saved(window) == []
        row = window.screen.row
        window.type("/edit hello\r")
        window.sees("EDITING", row)
        os.kill(window.child.pid, signal.SIGTERM)
        assert window.status() == 130
        assert not window.left_behind()


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


def test_what_is_typed_while_it_loads_is_a_message_too(home: Home) -> None:
    with home.window("-n", "1") as window:
        window.wait(lambda: not window.child.getecho(), "silent")
        window.type("Hello.\r")
        window.sees("reply 1 token")
        window.prompted()
        assert window.text().count("Hello.") == 1
        assert home.saved(window)[0] == "Hello."
