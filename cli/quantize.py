"""`edgellama quantize`: a checkpoint folder or a GGUF file becomes a GGUF file of another type."""

import contextlib
import dataclasses
import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.cli.background import in_background
from edgellama.cli.terminal import Display, Terminal
from edgellama.control import CancelToken
from edgellama.paths import model_path

if TYPE_CHECKING:
    from edgellama.quantize.convert import Job, Report
    from edgellama.quantize.plan import Plan, PlannedTensor


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the command line asks for."""

    type: str
    importance: Path | None
    certificate: str
    strict: bool
    threads: int | None


def run_quantize(
    terminal: Terminal, source: str, output: Path, choices: Choices, *, dry_run: bool
) -> None:
    cancel = CancelToken()
    with contextlib.closing(Bytes(terminal.quiet)) as display:
        document, last = in_background(
            lambda: _convert(terminal, display, source, output, choices, dry_run, cancel),
            cancel,
            idle=display.remind,
        )
    terminal.note(last)
    if terminal.json:
        terminal.document(document)


def _convert(
    terminal: Terminal,
    display: Display,
    source: str,
    output: Path,
    choices: Choices,
    dry_run: bool,
    cancel: CancelToken,
) -> tuple[dict[str, Any], str]:
    """Convert, and tell of it on the way; returns the document for --json, and a last remark."""
    from edgellama.quantize.convert import prepared

    asked = dataclasses.asdict(choices)
    with prepared(model_path(source), output, **asked) as job:
        _introduce(terminal, job, dry_run)
        if dry_run:
            return _document(job, None), f"{output} was not written"
        report = job.run(cancel, display.update)
        return _document(job, report), outcome(report)


def _introduce(terminal: Terminal, job: "Job", dry_run: bool) -> None:
    """The plan: the result of a dry run, else a remark."""
    if dry_run and not terminal.json:
        terminal.write(table(job.plan))
    elif not terminal.json:
        terminal.note(table(job.plan).removesuffix("\n"))
    for note in job.notes:
        terminal.note(f"note: {note}")


def _document(job: "Job", report: "Report | None") -> dict[str, Any]:
    """The fields of Report (without those that only a conversion has, if there was none), and
    `tensors`."""
    done = {} if report is None else {"seconds": report.seconds, "peak_bytes": report.peak_bytes}
    tensors = [
        dataclasses.asdict(tensor) | {"bytes": tensor.n_bytes} for tensor in job.plan.tensors
    ]
    return {
        "source": os.fspath(job.source.path),
        "output": os.fspath(job.output),
        "type": job.plan.type,
        "types": job.plan.types,
        "bits_per_weight": job.plan.bits_per_weight,
        "bytes": job.plan.n_bytes if report is None else report.bytes,
        **done,
        "notes": list(job.notes),
        "tensors": tensors,
    }


def table(plan: "Plan") -> str:
    """One line for the tensors of one role that get one type for one reason."""
    groups: dict[tuple[str, ...], list[PlannedTensor]] = defaultdict(list)
    for tensor in plan.tensors:
        role = tensor.name.removesuffix(".weight").rpartition(".")[2]
        groups[role, tensor.source_type, tensor.type, tensor.reason].append(tensor)
    rows = [["tensors", "", "from", "to", "MB", "why"]]
    for (role, before, after, reason), tensors in groups.items():
        size = sum(tensor.n_bytes for tensor in tensors)
        rows.append([role, f"x {len(tensors)}", before, after, _mb(size), reason])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    end = f"{plan.type}: {_mb(plan.n_bytes)} MB, {plan.bits_per_weight:.2f} bits per weight"
    return "".join(line.rstrip() + "\n" for line in (*lines, end))


def outcome(report: "Report") -> str:
    peak = "unknown" if report.peak_bytes is None else f"{_mb(report.peak_bytes)} MB"
    return (
        f"{report.output}: {report.type}, {_mb(report.bytes)} MB, {report.bits_per_weight:.2f} "
        f"bits per weight, in {report.seconds:.1f} s; peak memory {peak}"
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"


class Bytes(Display):
    """A bar that counts in bytes, and says how long the rest will take."""

    def _draw(self, done: int, total: int, what: str) -> None:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        super()._draw(done, total, what)


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    from edgellama.quantize.stream import QUANTIZING

    class Amount(DownloadColumn):
        def render(self, task: Any) -> Any:
            return super().render(task) if task.description == QUANTIZING else ""

    label, times = TextColumn("{task.description}", markup=False), TimeRemainingColumn(compact=True)
    columns = label, BarColumn(), TaskProgressColumn(), Amount(), times
    return Progress(*columns, console=Console(stderr=True), transient=True)
