"""Processes that must not use the network, watched by an audit hook which their children inherit.

A `sitecustomize` on PYTHONPATH installs the hook before anything else runs. It refuses every
`socket.connect` and every look-up of a host, and writes both that it is there and what it refused
to a file: an attempt counts even where the program goes on without an answer.
"""

import os
from pathlib import Path

HOOK = """
import os, sys

LOG = {log!r}
FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")

def _note(*words):
    handle = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(handle, (" ".join(map(ascii, words)) + "\\n").encode())
    os.close(handle)

def _local(event, arguments):  # Windows makes its socket pairs so
    ours = os.name == "nt" and event == "socket.connect" and arguments[1][0] == "127.0.0.1"
    return ours and sys._getframe(2).f_code.co_name in ("socketpair", "_fallback_socketpair")

def _refuse(event, arguments):
    if event in FORBIDDEN and not _local(event, arguments):
        _note("attempt", os.getpid(), event, arguments[1:])
        raise PermissionError("the network was used: " + event)

sys.addaudithook(_refuse)
_note("watched", os.getpid(), getattr(sys, "orig_argv", sys.argv))
"""


class Watched:
    """A hook in `folder`, and what it has noted."""

    def __init__(self, folder: Path) -> None:
        self.hook, self.log = folder / "hook", folder / "hook.log"
        self.hook.mkdir()
        (self.hook / "sitecustomize.py").write_text(HOOK.format(log=str(self.log)))

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to be watched, and all its children too."""
        others = os.environ.get("PYTHONPATH")
        return {"PYTHONPATH": os.pathsep.join([str(self.hook), *([others] if others else [])])}

    def processes(self) -> list[str]:
        return self._lines("'watched'")

    def attempts(self) -> list[str]:
        return self._lines("'attempt'")

    def _lines(self, kind: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.startswith(kind)]
