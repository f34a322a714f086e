"""`edgellama run --infill`: what belongs between two files; stdout gets that text alone."""

import os
import sys
from pathlib import Path

from edgellama.cli.reply import Running, Wording, context_told, finish, load_model, show_reply
from edgellama.cli.terminal import Terminal
from edgellama.control import CancelToken
from edgellama.errors import EdgeLlamaError
from edgellama.regular_file import unreadable

LARGEST = 16 << 20  # bytes of a file; far beyond any context


def run_infill(
    terminal: Terminal,
    name: str,
    files: tuple[Path, Path],
    *,
    suffix_first: bool,
    how: Running,
    wording: Wording,
) -> None:
    prefix, suffix = map(_read, files)
    params, cancel = wording.params(), CancelToken()
    with load_model(terminal, name, how) as model:
        limits = wording.limits(cancel)
        how_to = {"suffix_first": suffix_first, **limits}
        with context_told(model):
            reply = show_reply(
                terminal,
                lambda: model.infill_chunks(prefix, suffix, params, **how_to),
                cancel,
                whole_lines=sys.stdout.isatty(),
            )
        about = {"model": str(model.info.path), "device": model.device, "chat": False}
    finish(terminal, reply, about | {"infill": [str(file) for file in files]})


def _read(path: Path) -> str:
    """The file's text, every character of it: line ends stay as they are."""
    if not os.path.isfile(path):
        raise EdgeLlamaError(f"--infill: {path.name} is no file", field="infill", value=str(path))
    try:
        if path.stat().st_size > LARGEST:
            raise EdgeLlamaError(f"--infill: {path.name} is longer than {LARGEST} bytes")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise EdgeLlamaError(f"--infill: {path.name} is not UTF-8: {error}") from error
    except OSError as error:
        raise unreadable(path, error) from error
