"""`edgellama quantize`: a checkpoint folder or a GGUF file becomes a GGUF file of another type."""

import contextlib
import dataclasses
import os
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgellama.cli.background import in_background
from edgellama.cli.quality import Around, Extras, figure_lines
from edgellama.cli.spelling import aligned
from edgellama.cli.terminal import Display, Terminal
from edgellama.control import CancelToken, Progress
from edgellama.paths import model_path

if TYPE_CHECKING:
    from edgellama.quantize.convert import Report
    from edgellama.quantize.plan import Plan, PlannedTensor

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the command line asks for."""

    type: str
    importance: Path | None
    certificate: str
    strict: bool
    threads: int | None


def run_quantize(
    terminal: Terminal,
    source: str,
    output: Path,
    choices: Choices,
    extras: Extras,
    *,
    dry_run: bool,
) -> None:
    extras.check(choices.importance)
    with contextlib.ExitStack() as opened:
        stage = partial(_stage, terminal)
        around = stage(lambda *_: _prepared(opened, source, output, choices, extras))
        _introduce(terminal, around, dry_run)
        report = None if dry_run else stage(partial(_convert, around))
        document = _document(around, report)
        terminal.note(f"{output} was not written" if report is None else outcome(report))
        if report is not None and extras.report:
            quality = stage(around.measured)
            document["quality"] = dataclasses.asdict(quality)
            if not terminal.json:
                terminal.write(figure_lines(report, quality))
    if terminal.json:
        terminal.document(document)


def _stage(terminal: Terminal, work: Callable[[CancelToken, Progress], T]) -> T:
    """A part of the work, with a bar of its own."""
    cancel = CancelToken()
    with contextlib.closing(Bytes(terminal.quiet)) as display:
        return in_background(lambda: work(cancel, display.update), cancel, idle=display.remind)


def _prepared(
    opened: contextlib.ExitStack, source: str, output: Path, choices: Choices, extras: Extras
) -> Around:
    from edgellama.quantize.convert import prepared

    asked = dataclasses.asdict(choices) | {"weighted": extras.calibrate is not None}
    job = opened.enter_context(prepared(model_path(source), output, **asked))
    around = Around(job, extras, choices.importance, choices.threads, opened)
    around.check()
    return around


def _convert(around: Around, cancel: CancelToken, progress: Progress) -> "Report":
    around.check_places()
    return around.calibrated(cancel, progress).run(cancel, progress)


def _introduce(terminal: Terminal, around: Around, dry_run: bool) -> None:
    """The plan: the result of a dry run, else a remark."""
    if dry_run and not terminal.json:
        terminal.write(table(around.job.plan))
    elif not terminal.json:
        terminal.note(table(around.job.plan).removesuffix("\n"))
    for note in around.notes:
        terminal.note(f"note: {note}")


def _document(around: Around, report: "Report | None") -> dict[str, Any]:
    """The fields of Report (without those that only a conversion has, if there was none), where
    the importance matrix is, and `tensors`."""
    job = around.job
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
        "importance": around.importance,
        "quality": None,
        "notes": around.notes,
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
    end = f"{plan.type}: {_mb(plan.n_bytes)} MB, {plan.bits_per_weight:.2f} bits per weight"
    return "".join(f"{line}\n" for line in (*aligned(rows), end))


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
