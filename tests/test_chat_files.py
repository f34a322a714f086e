"""Files, editors and the clipboard in a chat: what is read and written, what is refused."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from chatting import CONTEXT, Begin, contents, told

import edgellama
from edgellama.cli import clipboard
from edgellama.cli.chat import Chat

pytest_plugins = ["chat_fixtures"]


@pytest.fixture(autouse=True)
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VISUAL", "EDITOR", "SSH_CONNECTION", "SSH_TTY", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)


# --- files ----------------------------------------------------------------------------------------


def test_save_and_load(begin: Begin, tmp_path: Path) -> None:
    chat, path = begin(system="be brief"), tmp_path / "a talk.json"
    told(chat, "hällo")
    told(chat, "/set top_k 3")
    assert "3 messages written" in told(chat, f"/save {path}")
    document = json.loads(path.read_text("utf-8"))
    assert document["messages"] == chat.conversation.messages()
    assert document["settings"] == {"temperature": 0, "max_tokens": 5, "top_k": 3}
    told(chat, f'/save "{path}"')  # one of ours is replaced
    assert list(tmp_path.iterdir()) == [path]

    other = begin()
    assert "1 exchange read" in told(other, f"/load {path}")
    assert other.conversation.messages() == chat.conversation.messages()
    chat.conversation.settings = other.conversation.settings
    told(chat, "more")
    told(other, "more")
    assert contents(chat) == contents(other)


def test_save_leaves_other_files_alone(chat: Chat, tmp_path: Path) -> None:
    for name, data in (("notes.txt", b"mine"), ("a.json", b'{"messages": []}'), ("bin", b"\xff")):
        (tmp_path / name).write_bytes(data)
        assert "there is another file of that name" in told(chat, f"/save {tmp_path / name}")
        assert (tmp_path / name).read_bytes() == data
    assert "this is a folder" in told(chat, f"/save {tmp_path}")
    assert "cannot be written" in told(chat, f"/save {tmp_path / 'none' / 'a.json'}")
    assert "which file?" in told(chat, "/save")
    assert "which file?" in told(chat, "/save a\0b")


HEAD = '{"format": "edgellama conversation", "version": 1, "messages": '
HOSTILE = {
    "": "not JSON",
    "[]": "not written by /save",
    '{"messages": []}': "not written by /save",
    '{"format": "edgellama conversation", "version": 2, "messages": []}': "version is 2",
    '{"format": "edgellama conversation", "version": true}': "version is True",
    HEAD + "5}": "messages is 5",
    HEAD + "[5]}": "messages[0]",
    HEAD + '[{"role": "user", "content": "a"}]}': "take turns",
    HEAD + '[{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]}': "turns",
    HEAD + '[{"role": "tool", "content": "a"}]}': "turns",
    HEAD + '[{"role": "root", "content": "a"}]}': "expected one of",
    HEAD + '[{"role": "user", "content": 1}]}': "expected text",
    HEAD + '[{"role": "system", "content": "\\ud800"}]}': "not valid Unicode",
    HEAD + "[" * 100_000: "not JSON",
    HEAD + "1" * 100_000 + "}": "not JSON",
    HEAD + '[{"role": "user", "content": "' + "a" * (9 << 20) + '"}]}': "too long",
}


@pytest.mark.parametrize("text", HOSTILE, ids=[text[:90][-30:] for text in HOSTILE])
def test_load_refuses(text: str, chat: Chat, tmp_path: Path) -> None:
    told(chat, "hello")
    before = contents(chat)
    (tmp_path / "a.json").write_text(text)
    assert HOSTILE[text] in told(chat, f"/load {tmp_path / 'a.json'}")
    assert contents(chat) == before


def test_load_of_what_is_no_file(chat: Chat, tmp_path: Path) -> None:
    assert "No such file" in told(chat, f"/load {tmp_path / 'none'}")
    assert "folder" in told(chat, f"/load {tmp_path}")
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe")
        assert "not a regular file" in told(chat, f"/load {tmp_path / 'pipe'}")


def test_loaded_text_cannot_command_the_terminal(chat: Chat, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "\x1b[2J"}, {"role": "assistant", "content": "\x9b2J\r"}]
    (tmp_path / "a.json").write_text(HEAD + json.dumps(talk) + "}")
    text = told(chat, f"/load {tmp_path / 'a.json'}") + told(chat, "/context")
    assert not {"\x1b", "\x9b", "\r"} & {*text}


def test_read(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "b c.txt").write_text("three")
    assert "a.txt: " in told(chat, f"/read {tmp_path / 'a.txt'}")
    told(chat, f"/read {tmp_path / 'b c.txt'}")
    told(chat, "hello")
    assert contents(chat)[0] == "one\ntwo\n\nthree\n\nhello"
    told(chat, "more")
    assert contents(chat)[2] == "more"
    told(chat, f"/read {tmp_path / 'a.txt'}")
    told(chat, "/clear")
    told(chat, "hello")
    assert contents(chat)[0] == "hello"


def test_read_refuses(chat: Chat, tmp_path: Path) -> None:
    for name, data, words in (
        ("binary", b"\xff\xfe", "not UTF-8"),
        ("null", b"a\0b", "no text file"),
        ("empty", b"\n", "is empty"),
        ("long", b"z" * CONTEXT, "do not fit the context of 256"),
        ("longer", b"z" * 100_000, "has more than 4,096 bytes"),
    ):
        (tmp_path / name).write_bytes(data)
        assert words in told(chat, f"/read {tmp_path / name}")
    assert "folder" in told(chat, f"/read {tmp_path}")
    assert "which file?" in told(chat, "/read")
    if Path("/dev/zero").exists():
        assert "not a regular file" in told(chat, "/read /dev/zero")
    told(chat, "hello")
    assert contents(chat)[0] == "hello"


def test_read_says_when_there_is_no_room_left(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("z" * 150)
    told(chat, "y" * 100)
    assert "they do not fit" in told(chat, f"/read {tmp_path / 'a.txt'}")


# --- programs -------------------------------------------------------------------------------------


def script(path: Path, text: str) -> str:
    """A program for the shell; returns its name."""
    if os.name != "posix":
        pytest.skip("needs a shell")
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_edit(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen"
    monkeypatch.setenv("EDITOR", "false")
    monkeypatch.setenv(
        "VISUAL", script(tmp_path / "ed", f'cp "$2" {seen}; printf "%s\\n" one two > "$2"') + " -w"
    )
    assert "one\ntwo" in told(chat, "/edit some words")
    assert seen.read_text() == "some words" and contents(chat)[0] == "one\ntwo"
    told(chat, "/undo")
    told(chat, "/edit")
    assert seen.read_text() == "one\ntwo"


@pytest.mark.parametrize(
    ("editor", "words"),
    [
        (None, "Set VISUAL or EDITOR"),
        ("  ", "Set VISUAL or EDITOR"),
        ("no-such-program", "'no-such-program' was not found"),
        ("'a", "cannot be understood"),
        ('printf "" > "$1"', "nothing was sent"),
        ("exit 3", "ended with status 3"),
        ('printf "\\377" > "$1"', "not UTF-8"),
        ('head -c 5000000 /dev/zero > "$1"', "more than"),
        ('rm "$1"', "could not be edited"),
    ],
)
def test_edit_that_fails(
    editor: str | None,
    words: str,
    chat: Chat,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if editor is not None and " " in editor.strip():
        editor = script(tmp_path / "ed", editor)
    if editor is not None:
        monkeypatch.setenv("EDITOR", editor)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert words in told(chat, "/edit hello")
    assert contents(chat) == [] and not [*tmp_path.glob("edgellama-*")]


def test_copy_with_a_program(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "wl-copy", f"/bin/cat > {tmp_path / 'clipboard'}")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert "nothing was said yet" in told(chat, "/copy")
    told(chat, "hello")
    assert "wl-copy" in told(chat, "/copy")
    assert (tmp_path / "clipboard").read_text("utf-8") == contents(chat)[1]
    script(tmp_path / "wl-copy", "exit 1")
    assert "there is no clipboard" in told(chat, "/copy")


def test_copy_by_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "here")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "OSC 52" in clipboard.copy("hällo")
    assert capsys.readouterr().err == "\x1b]52;c;aMOkbGxv\x07"
    with pytest.raises(edgellama.EdgeLlamaError, match="too long"):
        clipboard.copy("x" * 60_000)
    monkeypatch.setenv("TERM", "dumb")
    with pytest.raises(edgellama.EdgeLlamaError, match="no clipboard"):
        clipboard.copy("x")
