"""The messages a person typed in earlier chats: a small private file, and no error if it fails.

One JSON text a line, oldest first. Knows nothing about keyboards.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from edgellama.errors import EdgeLlamaError
from edgellama.output import atomic_output
from edgellama.paths import cache_root
from edgellama.regular_file import open_regular

MOST = 1000  # messages that are kept
LONGEST = 64 << 10  # bytes of one that is kept
LARGEST = 4 << 20  # bytes of the file that are read


def history_file() -> Path | None:
    """Where it lies; None where there is no cache folder at all."""
    with contextlib.suppress(EdgeLlamaError):
        return cache_root() / "chat-history.jsonl"
    return None


def remembered(path: Path | None) -> list[str]:
    """Earlier messages, oldest first. What cannot be read is left out; too many are forgotten."""
    if path is None:
        return []
    texts: list[str] = []
    with contextlib.suppress(EdgeLlamaError, OSError):
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LARGEST))
            lines = (file.read(LARGEST) or b"").split(b"\n")
        texts = [text for line in lines if (text := _text(line))]
        if len(texts) > 2 * MOST or size > LARGEST:
            _rewrite(path, texts[-MOST:])
    return texts[-MOST:]


def remember(path: Path | None, text: str) -> None:
    """Add a message. A full disk, or one that cannot be written, is no reason to stop chatting."""
    line = _line(text)
    if path is None or len(line) > LONGEST:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o600)
        try:
            os.write(handle, line)  # at once: two chats may write
        finally:
            os.close(handle)


def _line(text: str) -> bytes:
    return json.dumps(text).encode() + b"\n"  # ASCII, whatever the text holds


def _text(line: bytes) -> str:
    with contextlib.suppress(ValueError, RecursionError):
        text = json.loads(line)
        return text if isinstance(text, str) else ""
    return ""


def _rewrite(path: Path, texts: Sequence[str]) -> None:
    with contextlib.suppress(OSError), atomic_output(path) as file:
        if os.name == "posix":
            os.fchmod(file.fileno(), 0o600)
        file.writelines(map(_line, texts))
