"""`edgellama pull`, and the pulling that chat does on first use: the library's pull with a bar."""

from pathlib import Path

from edgellama.cli.background import in_background
from edgellama.cli.terminal import Terminal
from edgellama.control import CancelToken
from edgellama.pull import pull


def pull_model(terminal: Terminal, name: str, source: Path | None = None) -> Path:
    """Fetch `name` into the cache and return its path; Ctrl-C leaves nothing behind."""
    cancel = CancelToken()
    with terminal.progress() as display:

        def labelled(done: int, total: int, what: str) -> None:
            display.update(done, total, f"{what} {name}")

        return in_background(
            lambda: pull(name, source=source, progress=labelled, cancel=cancel), cancel
        )
