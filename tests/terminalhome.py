"""A person's own folder and terminal windows, in which `edgellama chat` runs with a real model.

POSIX only. Knows nothing about what is said.
"""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from offline import Watched
from pseudoterminal import Window, environment

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
    shared: list[Window] = field(default_factory=list)  # the last is the one in use

    @property
    def model(self) -> Path:
        return self.folder / "cache" / "models" / f"{DEFAULT_MODEL}.gguf"

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

    def talk(self) -> Window:
        """A chat that has said nothing yet: tests share its window, one after the other."""
        if not self.shared or not self.shared[-1].waiting():
            # a single thread: no machine is so fast that nothing can be interrupted
            self.shared.append(self.window("--threads", "1"))
            self.shared[-1].prompted()
        for command in ("/clear", "/system -", "/set max_tokens default"):
            self.shared[-1].enter(command)
        return self.shared[-1]


@contextlib.contextmanager
def at_home(folder: Path, model: Path) -> Iterator[Home]:
    """A home whose processes use no network: its windows close with it."""
    (folder / "cache" / "models").mkdir(parents=True, mode=0o700)
    (folder / "cache" / "kernels").symlink_to(cache_dir("kernels"))
    (folder / "editor.py").write_text(EDITOR)
    home = Home(folder, Watched(folder))
    home.model.symlink_to(model.absolute())
    try:
        yield home
    finally:
        for window in home.shared:
            window.__exit__()
    assert home.watched.processes(), "nobody was watched"
    assert home.watched.attempts() == []


def brief(window: Window) -> Window:
    """From here on, replies of one token: only the messages matter."""
    window.enter("/set max_tokens 1")
    return window


def squeezed(text: str) -> str:
    """Without blanks and line ends: a terminal breaks lines where it will."""
    return re.sub(r"\s+", "", text)


def shows(seen: str, words: str) -> bool:
    return squeezed(words) in squeezed(seen)
