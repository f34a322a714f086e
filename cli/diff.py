"""`edgellama diff`: the first value of the decoder graph where two runtimes or two files part."""

import dataclasses
from pathlib import Path
from typing import Any

import typer

from edgellama.cli.background import in_background
from edgellama.cli.terminal import Terminal
from edgellama.control import CancelToken
from edgellama.diff import Difference, NodeDistance, diff
from edgellama.paths import model_path


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the command line asks for."""

    a: str
    b: str
    text: Path | None
    tolerance: float | None
    accuracy: int
    threads: int | None


def show_difference(terminal: Terminal, file: str, other: str | None, choices: Choices) -> None:
    """Ends with status 1 where something is further apart than the tolerance."""
    from edgellama.perplexity import read_text

    asked = dataclasses.asdict(choices)
    text = asked.pop("text")
    if text is not None:
        asked["text"] = read_text(text, chunks=1)  # two at least, and 64 tokens are taken
    path, cancel = model_path(file), CancelToken()
    second = None if other is None else model_path(other)
    with terminal.progress() as display:
        found = in_background(
            lambda: diff(path, second, cancel=cancel, progress=display.update, **asked),
            cancel,
            idle=display.remind,
        )
    if terminal.json:
        terminal.document(document(found) | {"path": str(path), "other": str(second or path)})
    else:
        terminal.write(report(found, path, second))
    if found.first is not None:
        raise typer.Exit(1)


def document(found: Difference) -> dict[str, Any]:
    """For --json: the fields of Difference, and `agree`; an infinite error is null."""
    told = dataclasses.asdict(found)
    told["nodes"] = [_node(node) for node in found.nodes]
    for name, node in (("first", found.first), ("before", found.before)):
        told[name] = None if node is None else _node(node)
    return {"agree": found.first is None} | told


def _node(node: NodeDistance) -> dict[str, Any]:
    nmse = node.nmse if node.nmse < float("inf") else None
    return dataclasses.asdict(node) | {"nmse": nmse}


def report(found: Difference, path: Path, second: Path | None) -> str:
    """One line; where two files are compared, with their names."""
    names = found.a, found.b
    if second is not None:
        files = told_apart(path, second)
        names = f"{files[0]} ({found.a})", f"{files[1]} ({found.b})"
    pair = " and ".join(names)
    if found.first is None:
        largest = max(found.nodes, key=lambda node: node.nmse)
        agreed = f"{pair} agree in {len(found.nodes)} values of {found.tokens} tokens"
        return f"{agreed}; furthest apart: {largest} (allowed {found.tolerance:.1e})\n"
    before = f"; before it {found.before}" if found.before else ""
    return f"{pair} part at {found.first} (allowed {found.tolerance:.1e}){before}\n"


def told_apart(path: Path, other: Path) -> tuple[str, str]:
    """The names of two files; of those that have one name, the paths."""
    return (str(path), str(other)) if path.name == other.name else (path.name, other.name)
