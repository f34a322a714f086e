"""The chat window of examples/, as a user meets it: on a virtual screen, with a mouse and keys."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tkinter", reason="this Python has no tkinter")
MISSING = [name for name in ("Xvfb", "xdotool") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

HANG = 60.0
SOON = 1.0  # seconds; the aim is 0.1
END = 10.0  # seconds until the program of a closed window has ended
GAP = 0.5  # seconds in which the window does nothing; the aim is 0.05
CHILD = Path(__file__).parent / "window_child.py"
STORY = "Write a very long story about the sea."


@pytest.fixture(scope="module")
def screen() -> Iterator[str]:
    """The name of a display that nobody sees."""
    command = ["Xvfb", "-displayfd", "1", "-screen", "0", "1000x800x24", "-nolisten", "tcp"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout is not None
        number = server.stdout.readline().decode().strip()
        assert number, "Xvfb did not start"
        display = os.environ | {"DISPLAY": f":{number}"}
        subprocess.run(["xdotool", "mousemove", "1", "1"], env=display, check=True, timeout=HANG)
        yield f":{number}"
        server.terminate()


class User:
    """One who starts the program, looks at it, types and clicks."""

    def __init__(self, screen: str, model: Path, **environment: str) -> None:
        self.environment = os.environ | {"DISPLAY": screen} | environment
        self.seen: list[tuple[float, dict[str, Any]]] = []
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), str(model)],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._look, daemon=True)
        self._reader.start()

    def __enter__(self) -> "User":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self._reader.join(HANG)
        self.process.__exit__(None, None, None)  # closes its pipes

    def _look(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen.append((time.monotonic(), json.loads(line)))

    @property
    def now(self) -> dict[str, Any]:
        return self.seen[-1][1] if self.seen else {}

    def until(self, happened: Callable[[dict[str, Any]], bool], what: str) -> float:
        """Wait; returns when it was seen."""
        start, place = time.monotonic(), max(0, len(self.seen) - 1)
        while time.monotonic() < start + HANG:
            for when, state in self.seen[place:]:
                place += 1
                if happened(state):
                    return when
            if self.process.poll() is not None:
                break
            time.sleep(0.002)
        raise AssertionError(f"not seen: {what}; the window shows {self.now}")

    def until_ready(self) -> None:
        self.until(lambda state: state["send"], "Send can be pressed")

    def xdotool(self, *arguments: object) -> None:
        command = ["xdotool", *map(str, arguments)]
        subprocess.run(command, env=self.environment, check=True, timeout=HANG)

    def click(self, part: str) -> None:
        self.xdotool("mousemove", *self.now["place"][part], "click", 1)

    def tell(self, line: str) -> float:
        """An order for the window; returns when it was given."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return time.monotonic()

    def close(self) -> float:
        """Close the window; returns the seconds until the program had ended, in good order."""
        start = self.tell("close")
        assert self.process.wait(HANG) == 0
        took = time.monotonic() - start
        self._reader.join(HANG)
        assert self.process.stderr is not None and self.process.stderr.read() == ""
        assert self.now["ended"]
        return took


@pytest.fixture
def user(screen: str, default_model: Path) -> Iterator[User]:
    with User(screen, default_model) as someone:
        yield someone


def test_a_conversation(user: User) -> None:
    user.until_ready()
    loaded = user.now["gap"]
    user.click("entry")
    user.xdotool("type", "--delay", "5", "Name the capital of France.")
    user.until(lambda state: state["entry"].endswith("France."), "what was typed")
    user.xdotool("key", "Return")
    user.until(lambda state: "Paris" in state["text"], "the answer")
    user.until(lambda state: "tokens" in state["status"] and state["send"], "its cost")
    assert user.now["entry"] == "" and not user.now["cancel"]

    user.xdotool("type", "--delay", "5", STORY)
    user.until(lambda state: state["entry"] == STORY, "what was typed")
    begun = len(user.seen)
    user.click("send")
    user.until(lambda state: len(state["text"]) > 300, "a reply that grows")
    pieces = {state["text"] for _, state in user.seen[begun:]}
    assert len(pieces) > 3
    pressed = time.monotonic()
    user.click("cancel")
    stopped = user.until(lambda state: "(stopped)" in state["text"], "the end of the reply")
    assert stopped - pressed < SOON

    user.click("clear")
    user.until(lambda state: state["text"] == "" and state["send"], "an empty window")
    took = user.close()
    print(
        f"\nlongest pause of the window while loading {loaded * 1000:.0f} ms, in all "
        f"{user.now['gap'] * 1000:.0f} ms; {len(pieces)} pieces; cancelled after "
        f"{(stopped - pressed) * 1000:.0f} ms; ended after {took * 1000:.0f} ms"
    )
    assert user.now["gap"] < GAP and took < END


def test_closed_while_it_loads(screen: str, default_model: Path, tmp_path: Path) -> None:
    """With an empty cache, kernels are being compiled then."""
    with User(screen, default_model, EDGELLAMA_CACHE=str(tmp_path)) as someone:
        someone.until(lambda state: "ompiling" in state["status"], "the progress")
        assert not someone.now["send"] and not someone.now["cancel"]
        print(f"\nended after {someone.close() * 1000:.0f} ms; gap {someone.now['gap'] * 1000:.0f}")


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_closed_while_it_answers(when: str, user: User) -> None:
    user.until_ready()
    long = "The sea is wide and deep. " * 800
    user.tell("paste " + (long if when == "prefill" else STORY))
    user.until(lambda state: state["entry"] != "", "what was pasted")
    user.click("send")
    least = len(user.now["entry"]) + (0 if when == "prefill" else 50)
    user.until(lambda state: state["cancel"] and len(state["text"]) >= least, "the work")
    if when == "prefill":
        time.sleep(0.2)
        assert len(user.now["text"]) == len(long.strip())  # no answer yet
    took = user.close()
    print(f"\nended after {took * 1000:.0f} ms; gap {user.now['gap'] * 1000:.0f} ms")
    assert took < END and user.now["gap"] < GAP


def test_problems_are_told_in_words(screen: str, tmp_path: Path) -> None:
    with User(screen, tmp_path / "nowhere.gguf") as someone:
        someone.until(lambda state: "nowhere.gguf" in state["text"], "what is wrong")
        assert "Traceback" not in someone.now["text"] and not someone.now["send"]
        someone.close()
