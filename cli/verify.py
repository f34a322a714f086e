"""`edgellama verify`: whether a file still holds, and computes, what its certificate says."""

import dataclasses
from typing import Any

import typer

from edgellama.cli.background import in_background
from edgellama.cli.terminal import Terminal
from edgellama.control import CancelToken
from edgellama.paths import model_path
from edgellama.quantize.verify import Verdict, verify


def show_verdict(
    terminal: Terminal, name: str, *, runtime: str, device: str, threads: int | None
) -> None:
    """Ends with status 1 where something does not hold."""
    path, cancel = model_path(name), CancelToken()
    with terminal.progress() as display:
        verdict = in_background(
            lambda: verify(
                path,
                runtime,
                device=device,
                threads=threads,
                cancel=cancel,
                progress=display.update,
            ),
            cancel,
            idle=display.remind,
        )
    if terminal.json:
        terminal.document(document(verdict))
    else:
        terminal.write(report(verdict))
    if verdict.problems:
        raise typer.Exit(1)


def document(verdict: Verdict) -> dict[str, Any]:
    """For --json: the fields of Verdict, and `holds`."""
    told = dataclasses.asdict(verdict) | {"path": str(verdict.path)}
    return {"holds": not verdict.problems} | told


def report(verdict: Verdict) -> str:
    """One line a problem, or what was found to hold."""
    name = verdict.path.name
    if verdict.problems:
        return "".join(f"{name}: {problem}\n" for problem in verdict.problems)
    return (
        f"{name} holds what its certificate says: {verdict.tensors} tensors and {verdict.keys} "
        f"keys unchanged;\n{verdict.prompts} prompts answered as the source answers them, "
        f"{verdict.deviation:.3f} of the logits' spread apart (allowed {verdict.limit}; runtime "
        f"{verdict.runtime})\n"
    )
