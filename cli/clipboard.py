"""Putting text on the clipboard: by a program of this machine, or by asking the terminal.

Knows nothing about what the text is.
"""

import base64
import os
import shutil
import sys

from edgellama.errors import EdgeLlamaError

TOOLS = (  # the program, its arguments, and the variable that says its screen is there
    ("pbcopy", (), None),
    ("wl-copy", (), "WAYLAND_DISPLAY"),
    ("xclip", ("-selection", "clipboard"), "DISPLAY"),
    ("clip", (), None),
)
LONGEST_SEQUENCE = 74_994  # bytes that terminals which know the sequence take
PATIENCE = 5.0  # seconds


def copy(text: str) -> str:
    """Copy, and say how it was done. Raises EdgeLlamaError where there is no clipboard.

    Over a network only the terminal knows the clipboard of the person who looks at it.
    """
    far = "SSH_CONNECTION" in os.environ or "SSH_TTY" in os.environ
    if not far and (command := _tool()) is not None and _run(command, text):
        return f"Copied with {command[0]}."
    if sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
        return _by_terminal(text)
    raise EdgeLlamaError(
        "there is no clipboard: no terminal, and none of pbcopy, wl-copy, xclip, clip"
    )


def _tool() -> list[str] | None:
    for name, arguments, variable in TOOLS:
        there = variable is None or os.environ.get(variable)
        if there and (path := shutil.which(name)) is not None:
            return [path, *arguments]
    return None


def _run(command: list[str], text: str) -> bool:
    import subprocess

    encoding = "utf-16" if os.name == "nt" else "utf-8"
    try:
        done = subprocess.run(
            command,
            input=text.encode(encoding, "replace"),
            stdout=subprocess.DEVNULL,  # xclip stays behind, and would keep a pipe open
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def _by_terminal(text: str) -> str:
    """OSC 52 of xterm's control sequences; there is no answer to it."""
    code = base64.b64encode(text.encode("utf-8", "replace")).decode()
    if len(code) > LONGEST_SEQUENCE:
        raise EdgeLlamaError("the text is too long for the terminal's clipboard; /save writes it")
    sys.stderr.write(f"\x1b]52;c;{code}\x07")
    sys.stderr.flush()
    return "Sent to the terminal's clipboard (OSC 52); not every terminal allows it."
