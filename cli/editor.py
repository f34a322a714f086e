"""A text in the person's own editor, `$VISUAL` or `$EDITOR`. Knows nothing about what it is for."""

import contextlib
import os
import shlex
import sys
import tempfile
from pathlib import Path

from edgellama.cli.terminal import Terminated
from edgellama.errors import EdgeLlamaError, ParameterError

LARGEST = 4 << 20  # bytes
NONE = "no editor is set"
HINT = "Set VISUAL or EDITOR to the command that starts yours, such as EDITOR=nano"


def edited(text: str) -> str:
    """What the person made of `text`. Raises EdgeLlamaError if there is no editor or it fails."""
    command = _command()
    handle, name = tempfile.mkstemp(prefix="edgellama-", suffix=".md")  # private to its owner
    path = Path(name)
    try:
        with open(handle, "w", encoding="utf-8", errors="replace", newline="") as file:
            file.write(text)
        _run([*command, name])
        data = path.read_bytes()[: LARGEST + 1]
    except OSError as error:
        raise EdgeLlamaError(f"the text could not be edited: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    if len(data) > LARGEST:
        raise EdgeLlamaError(f"the text has more than {LARGEST} bytes")
    try:
        return data.decode("utf-8").replace("\r\n", "\n").rstrip("\n")
    except UnicodeDecodeError as error:
        raise EdgeLlamaError(f"the text is not UTF-8: {error}") from error


def _command() -> list[str]:
    given = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""
    if not given.strip():
        raise ParameterError(NONE, hint=HINT)
    try:
        return shlex.split(given, posix=os.name == "posix")
    except ValueError as error:
        raise ParameterError(f"the editor {given!a} cannot be understood: {error}") from error


def _run(command: list[str]) -> None:
    import subprocess

    # an editor draws on stdout, which may lead to a file of the model's words
    screen = None if sys.stdout.isatty() else _number(sys.stderr)
    try:
        status = subprocess.run(command, stdout=screen).returncode
    except FileNotFoundError as error:
        raise EdgeLlamaError(f"the editor {command[0]!a} was not found", hint=HINT) from error
    except Terminated:
        raise
    except KeyboardInterrupt as error:
        raise EdgeLlamaError("the editor was interrupted") from error
    if status != 0:
        raise EdgeLlamaError(f"the editor {command[0]!a} ended with status {status}")


def _number(stream: object) -> int | None:
    """The file number behind a stream; None where it has none, as under a test."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        number: int = stream.fileno()  # type: ignore[attr-defined]
        return number
    return None
