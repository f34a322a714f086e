"""Conversations as files, for `/save` and `/load`: JSON that names itself, checked on its way in.

Knows nothing about models.
"""

import json
from pathlib import Path
from typing import Any

from edgellama.errors import EdgeLlamaError, OutputError, ParameterError, shown
from edgellama.messages import checked_messages
from edgellama.output import atomic_output
from edgellama.regular_file import read_start

FORMAT, VERSION = "edgellama conversation", 1
LARGEST = 32 << 20  # bytes; the messages of a chat may have 8 million characters


def save(path: Path, messages: list[dict[str, str]], about: dict[str, Any]) -> None:
    """Write the conversation, whole or not at all.

    A conversation that is there already is replaced; any other file is left alone. Raises
    OutputError.
    """
    if path.is_dir():
        raise OutputError("this is a folder", path=path, hint="Name a file in it")
    if path.exists() and not _ours(path):
        hint = "Choose another name"
        raise OutputError("there is another file of that name", path=path, hint=hint)
    document = {"format": FORMAT, "version": VERSION, **about, "messages": messages}
    text = json.dumps(document, ensure_ascii=False, indent=2) + "\n"
    with atomic_output(path, private=True) as file:
        file.write(text.encode("utf-8", "surrogatepass"))


def load(path: Path) -> tuple[str | None, list[tuple[str, str]]]:
    """The system message and the exchanges (message, reply) of a saved conversation.

    Raises ParameterError for a file of another kind, EdgeLlamaError for one that cannot be read.
    """
    document = _document(path)
    try:
        messages = checked_messages(document.get("messages") or [])
    except ParameterError:
        if document.get("messages") != []:
            raise
        messages = []
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    rest = messages[system is not None :]
    if [message["role"] for message in rest] != ["user", "assistant"] * (len(rest) // 2):
        raise _wrong(path, "user and assistant do not take turns in it")
    for message in messages:
        _check_text(path, message["content"])
    texts = [message["content"] for message in rest]
    return system, list(zip(texts[::2], texts[1::2], strict=True))


def _document(path: Path) -> dict[str, Any]:
    data = _bytes(path)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _wrong(path, f"it is not JSON: {shown(str(error))}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _wrong(path, "it was not written by /save")
    if document.get("version") != VERSION or isinstance(document["version"], bool):
        version = shown(document.get("version"))
        raise _wrong(path, f"its version is {version}; this program reads {VERSION}")
    return document


def _bytes(path: Path) -> bytes:
    data = read_start(path, LARGEST + 1, ParameterError, wanted="a conversation")
    if len(data) > LARGEST:
        raise _wrong(path, f"it has more than {LARGEST} bytes")
    return data


def _ours(path: Path) -> bool:
    try:
        return bool(_document(path))
    except EdgeLlamaError:
        return False


def _check_text(path: Path, text: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _wrong(path, "a text in it is not valid Unicode")


def _wrong(path: Path, problem: str) -> ParameterError:
    return ParameterError(f"cannot be loaded: {problem}", path=path)
