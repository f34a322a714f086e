"""The command line at a real terminal: Ctrl-C, Ctrl-D, and what a screen may be shown."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import tiny_config, write_tiny

if os.name != "posix":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)

import fcntl
import pty
import termios

PATIENCE = 30.0  # seconds before a terminal that says nothing is a failure
ENDLESS = ("--runtime", "reference", "--temperature", "0", "--max-tokens", "100000")
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


class Screen:
    """A child that believes to sit at a terminal."""

    def __init__(self, *arguments: str, cache: Path) -> None:
        self._ours, theirs = pty.openpty()

        def take_the_terminal() -> None:
            os.setsid()
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

        self.child = subprocess.Popen(
            [sys.executable, "-m", "edgellama", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=take_the_terminal,
            env=os.environ
            | {"EDGELLAMA_CACHE": str(cache), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"},
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, pattern: str) -> str:
        """What the screen showed until `pattern`, which is taken off it."""
        deadline = time.monotonic() + PATIENCE
        while (found := re.search(pattern, self.seen)) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen[-500:]!r}"
            assert self._read(), f"the end came before {pattern!r}: {self.seen[-500:]!r}"
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def _read(self) -> bool:
        """Take in what there is; False at the end."""
        if not select.select([self._ours], [], [], 1.0)[0]:
            return True
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # Linux says so when the other side is closed
            return False
        self.seen += data.decode("utf-8", "replace")
        return bool(data)

    def status(self) -> int:
        """Read to the end and return the exit status."""
        deadline = time.monotonic() + PATIENCE
        while self._read() and time.monotonic() < deadline:
            pass
        return self.child.wait(PATIENCE)

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        os.close(self._ours)


Start = Callable[..., Screen]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that never comes to an end by itself within a test."""
    path = tmp_path_factory.mktemp("models") / "long.gguf"
    metadata = {"tokenizer.chat_template": TEMPLATE}
    return str(write_tiny(path, tiny_config(context_length=65536), metadata=metadata))


@pytest.fixture
def screens(tmp_path: Path) -> Iterator[list[Screen]]:
    opened: list[Screen] = []
    yield opened
    for screen in opened:
        screen.close()


@pytest.fixture
def screen(screens: list[Screen], tmp_path: Path, model: str) -> Start:
    def start(command: str, *arguments: str) -> Screen:
        screens.append(Screen(command, model, *ENDLESS, *arguments, cache=tmp_path / "cache"))
        return screens[-1]

    return start


def test_ctrl_c_stops_the_reply_and_not_the_chat(screen: Start) -> None:
    chat = screen("chat")
    chat.wait_for(">>>")
    chat.type("hello\r")
    chat.wait_for(r"\x1b\[\?2004l(?s:.{40})")  # the editor has let go, the reply has begun
    chat.type("\x03")
    footer = chat.wait_for(r"reply \d+ tokens[^\n]*stopped")
    assert "Traceback" not in footer
    chat.wait_for(">>>")
    chat.type("\x03")
    chat.wait_for("Ctrl-D or /exit leaves")
    chat.wait_for(">>>")
    chat.type("\x03")
    assert chat.status() == 130
    assert "Traceback" not in chat.seen


def test_ctrl_d_ends_the_chat(screen: Start) -> None:
    chat = screen("chat")
    chat.wait_for(">>>")
    chat.type("\x04")
    assert chat.status() == 0


def test_pasted_lines_are_one_message(screen: Start) -> None:
    chat = screen("chat", "--max-tokens", "1")
    chat.wait_for(">>>")
    chat.type("\x1b[200~first\rsecond\x1b[201~\r")
    chat.wait_for(r"\[prompt ")
    chat.wait_for(">>>")
    chat.type("/exit\r")
    assert chat.status() == 0
    assert "[prompt " not in chat.seen


def test_ctrl_c_ends_a_run_with_130(screen: Start) -> None:
    child = screen("run", "hello")
    child.wait_for(r"template[^\n]*\n(?s:.{20})")
    child.type("\x03")
    assert child.status() == 130
    assert "stopped" in child.seen and "Traceback" not in child.seen


def test_sigterm_ends_a_run_in_order(screen: Start) -> None:
    child = screen("run", "hello")
    child.wait_for(r"template[^\n]*\n(?s:.{20})")
    child.child.send_signal(signal.SIGTERM)
    assert child.status() == 130
    assert "Traceback" not in child.seen
