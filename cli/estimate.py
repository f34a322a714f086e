"""`edgellama estimate`: what a model will need in memory, from its header alone."""

import dataclasses
from typing import Any

from edgellama.cli.reply import Running
from edgellama.cli.terminal import Terminal
from edgellama.estimate import Estimate, estimate
from edgellama.paths import model_path

LABELS = {  # purpose -> what a person reads
    "weights": "weights, as the runtime lays them out",
    "kv_cache": "keys and values of the whole context",
    "scratch": "rooms to compute in",
    "loading": "pieces of the file on their way in",
    "tokenizer": "tokenizer",
    "program": "Python, libraries, machine code",
    "context": "CUDA's own",
}


def show_estimate(terminal: Terminal, name: str, how: Running, kv_type: str) -> None:
    path = model_path(name)
    found = estimate(
        path,
        context=how.context,
        runtime=how.runtime,
        device=how.device,
        kv_type=kv_type,
        threads=how.threads,
    )
    if terminal.json:
        terminal.document({"path": str(path)} | document(found))
        return
    terminal.note(
        f"{path.name}: {found.runtime} runtime on {found.device}, {found.threads} threads, "
        f"{found.context} tokens of context, keys and values in {found.kv_type}"
    )
    terminal.write(table(found))
    for note in found.notes:
        terminal.note(f"note: {note}")


def document(found: Estimate) -> dict[str, Any]:
    """For --json: the fields of Estimate, and its totals."""
    totals = {"total": found.total, "device_total": found.device_total}
    return dataclasses.asdict(found) | totals


def table(found: Estimate) -> str:
    rows = [(LABELS[purpose], n) for purpose, n in found.memory.items()]
    rows.append(("memory in all", found.total))
    if found.device_memory:
        rows += [(f"GPU: {LABELS[purpose]}", n) for purpose, n in found.device_memory.items()]
        rows.append(("GPU memory in all", found.device_total))
    if found.available is not None:
        rows.append(("this machine could give now", found.available))
    wide = max(len(label) for label, _ in rows)
    return "".join(f"{label:<{wide}}  {n / 1e6:>10,.1f} MB\n" for label, n in rows)
