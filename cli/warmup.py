"""`edgellama warmup`: kernels compiled ahead of time, for this machine or for an app's users."""

import dataclasses
from pathlib import Path
from typing import Any

from edgellama.cli.background import in_background
from edgellama.cli.terminal import Terminal
from edgellama.control import CancelToken
from edgellama.runtimes.shipped_kernels import VARIABLE
from edgellama.runtimes.warmup import Warmth, warm_up


def run_warmup(
    terminal: Terminal,
    models: list[str],
    *,
    types: str | None,
    into: Path | None,
    levels: str | None,
) -> None:
    cancel = CancelToken()
    with terminal.progress() as display:
        warmth = in_background(
            lambda: warm_up(
                models,
                types=_words(types),
                into=into,
                levels_wanted=_words(levels),
                cancel=cancel,
                progress=display.update,
            ),
            cancel,
            idle=display.remind,
        )
    if terminal.json:
        terminal.document(document(warmth))
        return
    terminal.note(report(warmth))
    if into is not None:
        terminal.note(
            f"An app that ships this folder sets {VARIABLE} to it before it loads a model"
        )


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def document(warmth: Warmth) -> dict[str, Any]:
    """For --json: the fields of Warmth."""
    return dataclasses.asdict(warmth) | {"folder": str(warmth.folder)}


def report(warmth: Warmth) -> str:
    compiled = f"{warmth.compiled} compiled in {warmth.seconds:.1f} s"
    if warmth.compiled == 0:
        compiled = "all of them were there"
    return (
        f"{warmth.kernels} kernels ({', '.join(warmth.types)}) for {', '.join(warmth.levels)}: "
        f"{warmth.bytes / 1e6:.1f} MB in {warmth.folder}; {compiled}"
    )
