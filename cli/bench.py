"""`edgellama bench`: how fast a model runs here, alone or side by side with a peer."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from edgellama.cli.background import in_background
from edgellama.cli.reply import Running
from edgellama.cli.spelling import aligned
from edgellama.cli.terminal import Terminal
from edgellama.control import CancelToken
from edgellama.measure import CONTEXT, ROUNDS, Comparison, Spread, compare
from edgellama.paths import model_path

LABELS = {  # figure -> what a person reads, and the unit's size
    "prefill": ("prefill, tokens/s", 1.0),
    "decode": ("decode, tokens/s", 1.0),
    "load_seconds": ("load, ms", 1e-3),
    "first_token_seconds": ("first token, ms", 1e-3),
    "peak_bytes": ("peak memory, MB", 1e6),
}


def run_bench(
    terminal: Terminal, name: str, *, against: str | None, how: Running, rounds: int = ROUNDS
) -> None:
    path, cancel = model_path(name), CancelToken()
    own = _runtime(path, how)
    with terminal.progress() as display:
        result = in_background(
            lambda: compare(
                path,
                [own] if against is None else [own, against],
                device=how.device,
                threads=how.threads,
                context=CONTEXT if how.context is None else how.context,
                rounds=rounds,
                cancel=cancel,
                progress=display.update,
            ),
            cancel,
            idle=display.remind,
        )
    if terminal.json:
        terminal.document(document(result))
    else:
        terminal.note(introduction(result))
        terminal.write(table(result))


def _runtime(path: Path, how: Running) -> str:
    """What `load` would take."""
    if how.runtime != "auto":
        return how.runtime
    return "onnx" if how.device == "cuda" or path.is_dir() else "cpu"


def document(result: Comparison) -> dict[str, Any]:
    """For --json: the fields of Comparison; a spread is `median`, `low`, `high`."""
    fields = dataclasses.asdict(result)
    return fields | {"model": os.fspath(result.model)}


def introduction(result: Comparison) -> str:
    """On what, with what."""
    machine = result.machine
    return (
        f"{Path(result.model).name} on {machine['processor']}, {result.threads} threads\n"
        f"prefill {result.prefill_tokens} tokens, decode {result.decode_tokens}; median (least to "
        f"most) of {result.rounds} rounds, of {result.cold_rounds} fresh processes below"
    )


def table(result: Comparison) -> str:
    """One line a figure, one column a runtime, and the ratio of two."""
    heads = [*result.runtimes, *(["ratio"] if result.ratios else [])]
    rows = [["", *heads]]
    for figure, (label, unit) in LABELS.items():
        spreads = [getattr(runtime, figure) for runtime in result.runtimes.values()]
        cells = [_cell(spread, unit, ",.0f") for spread in spreads]
        if result.ratios:
            cells.append(_cell(result.ratios.get(figure), 1.0, ".2f"))
        rows.append([label, *cells])
    return "".join(f"{line}\n" for line in aligned(rows))


def _cell(spread: Spread | None, unit: float, form: str) -> str:
    if spread is None:
        return "unknown"
    median, low, high = (format(v / unit, form) for v in (spread.median, spread.low, spread.high))
    return f"{median} ({low} to {high})"
