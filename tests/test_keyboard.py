"""Typing a message: keys, pastes, fences, completion, and the history that is kept of it."""

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from edgellama.cli import history
from edgellama.cli.commands import COMMANDS
from edgellama.cli.completion import Words
from edgellama.cli.keyboard import Keyboard, kept_history, unfenced, unfinished
from edgellama.cli.settings import NAMES
from edgellama.cli.terminal import Terminal

PASTE, PASTED = "\x1b[200~", "\x1b[201~"
ALT_ENTER, UP = "\x1b\r", "\x1b[A"
CTRL_C, CTRL_D, CTRL_J, CTRL_R = "\x03", "\x04", "\n", "\x12"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELLAMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pipe() -> Iterator[PipeInput]:
    with create_pipe_input() as opened:
        yield opened


Type = Callable[[str], str | None]


def keyboard(pipe: PipeInput) -> Keyboard:
    return Keyboard(Terminal(), COMMANDS, input=pipe, output=DummyOutput())


@pytest.fixture
def typed(pipe: PipeInput) -> Type:
    """The message that comes of some keys."""
    keys = keyboard(pipe)

    def send(text: str) -> str | None:
        pipe.send_text(text)
        return keys.message()

    return send


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello\r", "hello"),
        ("hällo 🦙\r", "hällo 🦙"),
        ("helo\x1b[Dl\r", "hello"),  # the arrow key
        ("one\x15two\r", "two"),  # Ctrl-U
        ("\r  \r\rafter nothing\r", "after nothing"),
        (f"one{ALT_ENTER}two\r", "one\ntwo"),
        (f"one{CTRL_J}  two\r", "one\n  two"),
        ("one\\\rtwo\r", "one\ntwo"),
        ('"""one\rtwo\r"""\r', "one\ntwo"),
        ('"""one"""\r', "one"),
        ('"""\r\r  one\r"""\r', "  one"),
        ('say """ this\r', 'say """ this'),
        (f"{PASTE}one\rtwo\n\nthree{PASTED}\r", "one\ntwo\n\nthree"),
        (f"{PASTE}/help set{PASTED}\r", "/help set"),
        (f"typed{CTRL_C}other\r", "other"),
        ("/cl\t\r", "/clear"),
        ("/set over\t\r", "/set overflow"),
        ("a\tb\r", "ab"),
    ],
)
def test_keys(keys: str, message: str, typed: Type) -> None:
    assert typed(keys) == message


def test_a_large_paste_is_one_message(typed: Type) -> None:
    text = "\n".join("lines of some length, " * 5 for _ in range(100))
    assert len(text) > 10_000
    assert typed(f"{PASTE}{text}{PASTED}\r") == text.rstrip()


@pytest.mark.parametrize(
    ("keys", "sent"),
    [
        (f"{PASTE}// a\rb{PASTED}\r", "// a\nb"),
        (f"{PASTE}//a{PASTED}\r", "//a"),
        (f"  {PASTE}//a{PASTED} b\r", "//a b"),
        ("//a\r", "/a"),  # that was typed
        (f"{PASTE}/* a */\rb{PASTED} \r", "/* a */\nb"),
        (f"{PASTE}/exit\r/help{PASTED}\r", "/exit\n/help"),
        (f'{PASTE}"""a"""\rb{PASTED}\r', '"""a"""\nb'),
        (f'{PASTE}"""a\rb{PASTED}\r', '"""a\nb'),
        (f'{PASTE}"""a\rb"{PASTED}\r', '"""a\nb"'),
        (f"{PASTE}a \\\rb \\{PASTED}\r", "a \\\nb \\"),
        (f"one\\\rtwo {PASTE}a \\\rb{PASTED}\r", "one\ntwo a \\\nb"),
        (f'"""{PASTE}a\\\rb{PASTED}"""\r', "a\\\nb"),
        (f"{PASTE}//a\rb{PASTED}{CTRL_C}//a\r", "/a"),
    ],
)
def test_a_paste_is_taken_as_it_is(keys: str, sent: str, typed: Type) -> None:
    assert taken(typed(keys)) == sent
    assert taken(typed(f"{UP}\r")) == sent  # from the history


def taken(message: str | None) -> str:
    """What a chat sends: it takes one slash of two away."""
    assert message is not None
    assert not message.startswith("/") or message.startswith("//"), "a command"
    return message[1:] if message.startswith("//") else message.strip()


def test_typed_ahead(typed: Type) -> None:
    assert typed("one\rtwo\rthree\r") == "one"
    assert typed("") == "two"
    assert typed("") == "three"


def test_nothing_is_a_message_if_it_means_something(pipe: PipeInput) -> None:
    pipe.send_text("\r \r")
    keys = keyboard(pipe)
    assert [keys.message(empty=True), keys.message(empty=True)] == ["", ""]


def test_ctrl_d(typed: Type) -> None:
    assert typed(CTRL_D) is None


def test_ctrl_c_hints_and_then_leaves(typed: Type, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(f"{CTRL_C}hello\r") == "hello"
    assert "Ctrl-D or /exit leaves" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        typed(f"{CTRL_C}{CTRL_C}")
    assert "Ctrl-D or /exit leaves" in capsys.readouterr().err


def test_hushed_where_there_is_no_terminal(pipe: PipeInput) -> None:
    with keyboard(pipe).hushed():
        pass


@pytest.mark.parametrize("text", ['"""', '""', '"""a', '"""a""', "a\\", '"""a\n"""b'])
def test_unfinished(text: str) -> None:
    assert unfinished(text) is (text != '""')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(('""" a """', " a "), ('"""a', "a"), ("a\\b", "a\\b"), ("a  \n", "a"), ("  a", "  a")),
        *(('"""\n/help\n"""', "//help"), ('""" // x"""', "/// x")),  # no commands
    ],
)
def test_unfenced(text: str, message: str) -> None:
    assert unfenced(text) == message


# --- completion -----------------------------------------------------------------------------------


def completed(text: str) -> list[str]:
    event = CompleteEvent(completion_requested=True)
    found = Words(COMMANDS).get_completions(Document(text, len(text)), event)
    return [text[: len(text) + each.start_position] + each.text for each in found]


def test_completion_of_commands_and_settings() -> None:
    assert [text.rstrip() for text in completed("/")] == [f"/{name}" for name in COMMANDS]
    assert completed("/re") == ["/regen", "/read "]
    assert completed("/help /") == [] and "/help read " in completed("/help re")
    assert completed("/set ") == [f"/set {name}" for name in NAMES]
    assert completed("/set overflow s") == ["/set overflow shift"]
    assert completed("/set top_k d") == ["/set top_k default"]
    for text in ("", "re", "//re", "a /re", "/nothing x", "a\n/re", "/re\n/re", "/clear x"):
        assert completed(text) == []


def test_completion_of_paths(tmp_path: Path) -> None:
    for name in ("one.txt", "one more.txt"):
        (tmp_path / name).touch()
    for command in ("read", "save", "load"):
        found = completed(f"/{command} {tmp_path}/one")
        assert sorted(found) == sorted(f"/{command} {tmp_path}/{n}" for n in os.listdir(tmp_path))


# --- history --------------------------------------------------------------------------------------


def test_history_outlives_a_chat(typed: Type, cache: Path) -> None:
    messages = ["one", "two\nlines", "/set seed 1"]
    for message in messages:
        assert typed(f"{PASTE}{message}{PASTED}\r") == message
    path = cache / "chat-history.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == messages
    assert [*kept_history(path).load_history_strings()] == messages[::-1]
    assert typed(f"{UP}\r") == messages[-1]
    assert typed(f"{CTRL_R}one\r\r") == "one"
    assert typed(f"{CTRL_R}one{CTRL_C}other\r") == "other"
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_history_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "history"
    history.remember(path, "x" * history.LONGEST)
    assert not path.exists()
    path.write_text("".join(f'"{n}"\n' for n in range(3 * history.MOST)))
    expected = [str(n) for n in range(2 * history.MOST, 3 * history.MOST)]
    assert history.remembered(path) == expected
    assert len(path.read_text().splitlines()) == history.MOST  # rewritten
    assert history.remembered(path) == expected
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b"x" * (history.LARGEST + 10) + b'\n"last"\n')
    assert history.remembered(path) == ["last"]
    assert path.read_text() == '"last"\n'


def test_a_damaged_history_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_bytes(b'"one"\n\xff\xfe\n{"a": 1}\n5\n\n"two"\n"half' + b"[" * 100_000)
    assert history.remembered(path) == ["one", "two"]
    assert history.remembered(tmp_path / "none") == history.remembered(None) == []
    assert history.remembered(tmp_path) == []
    history.remember(None, "text")
    history.remember(tmp_path, "text")  # a folder
    history.remember(path / "below", "text")  # below a file
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe")
        history.remember(tmp_path / "pipe", "text")
        assert history.remembered(tmp_path / "pipe") == []
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        history.remember(tmp_path / "link", "text")
        assert not (tmp_path / "elsewhere").exists()


def test_a_full_disk_is_no_error(pipe: PipeInput, cache: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    history.remember(full, "text")
    cache.write_text("a file where the folder should be")
    pipe.send_text("hello\r")
    assert keyboard(pipe).message() == "hello"


def test_lone_surrogates_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "history"
    history.remember(path, "a\udc80b")
    assert history.remembered(path) == ["a\udc80b"]
