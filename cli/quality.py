"""What `quantize` does around a conversion: --calibrate before it, --report after it."""

import dataclasses
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.cli.spelling import aligned
from edgellama.control import CancelToken, Progress
from edgellama.errors import ParameterError

if TYPE_CHECKING:
    from edgellama.distance import Estimate
    from edgellama.perplexity import Quality
    from edgellama.quantize.convert import Job, Report

FIGURES = (  # a figure, its name, digits, scale
    ("perplexity", "perplexity", 2, 1),
    ("base_perplexity", "of the source", 2, 1),
    ("kl_mean", "KL mean", 4, 1),
    ("kl_median", "KL median", 4, 1),
    ("kl_p99", "KL p99", 3, 1),
    ("same_top", "same top, %", 1, 100),
    ("delta_p_rms", "RMS Δp, %", 2, 100),
)


@dataclasses.dataclass(frozen=True)
class Extras:
    """The options about what surrounds a conversion."""

    calibrate: Path | None = None
    importance_out: Path | None = None
    report: bool = False
    text: Path | None = None
    chunks: int | None = None

    def check(self, importance: Path | None) -> None:
        """Raises ParameterError for options that do not go together."""
        calibrated = self.calibrate is not None
        for wrong, problem in (
            (calibrated and importance is not None, "--importance and --calibrate: choose one"),
            (self.importance_out and not calibrated, "--importance-out is for --calibrate"),
            (self.text and not self.report, "--text is for --report"),
            (self.report and not self.text, "--report needs --text FILE, to measure on"),
            (
                self.chunks and not (calibrated or self.report),
                "--chunks is for texts",
            ),
        ):
            if wrong:
                raise ParameterError(problem)


@dataclasses.dataclass(frozen=True)
class Around:
    """A planned conversion with what is asked for around it. Check it before anything long."""

    job: "Job"
    extras: Extras
    given: Path | None  # --importance
    threads: int | None
    opened: ExitStack  # closes what lives as long as the command
    made: list[Path] = dataclasses.field(default_factory=list)

    def check(self) -> None:
        """Refuse early what would fail late: texts, and the place of the matrix.

        Raises ParameterError, EdgeLlamaError for a text that cannot be read.
        """
        from edgellama.perplexity import chunked, read_text
        from edgellama.quantize.calibrate import check_matrix
        from edgellama.tokenizer import tokenizer_from_gguf

        given = [path for path in (self.extras.calibrate, self.extras.text) if path is not None]
        if self.extras.calibrate is not None:
            check_matrix(self.matrix, (self.job.source.path, self.job.output, *given))
        if given:
            source = self.job.source
            tokenizer = tokenizer_from_gguf(source.metadata, source.path)
        for path in given:  # a matrix remembers the whole text it was collected on
            chunks = None if path == self.extras.calibrate else self.extras.chunks
            chunked(tokenizer, read_text(path, chunks), limit=1)

    def check_places(self) -> None:
        """Refuse early where nothing could be written. Raises OutputError."""
        from edgellama.quantize.calibrate import check_place
        from edgellama.quantize.convert import check_room

        check_place(self.job.output)
        if self.extras.calibrate is not None:
            check_place(self.matrix)
        check_room(self.job.output, self.job.plan)

    @property
    def notes(self) -> list[str]:
        """What a user should know, in a sentence each."""
        notes, extras = list(self.job.notes), self.extras
        if extras.calibrate is not None:
            notes.append(f"the importance matrix is kept in {self.matrix}")
            if extras.text is not None and extras.text.samefile(extras.calibrate):
                notes.append("what is measured on the text of the calibration flatters the result")
        return notes

    @property
    def importance(self) -> str | None:
        """The file of the weights of importance."""
        path = self.given if self.extras.calibrate is None else self.matrix
        return None if path is None else os.fspath(path)

    @property
    def matrix(self) -> Path:
        from edgellama.quantize.calibrate import matrix_beside

        return self.extras.importance_out or matrix_beside(self.job.output)

    def calibrated(self, cancel: CancelToken, progress: Progress) -> "Job":
        """The job with weights of importance, if they are asked for."""
        from edgellama.quantize.calibrate import calibrate

        if self.extras.calibrate is None:
            return self.job
        found = calibrate(
            self._model(cancel, progress),
            self.extras.calibrate,
            self.matrix,
            **self._how(cancel, progress),
        )
        return self.job.with_importance(found.weights())

    def measured(self, cancel: CancelToken, progress: Progress) -> "Quality":
        from edgellama.perplexity import read_text
        from edgellama.quantize.quality import quality

        assert self.extras.text is not None
        base = self._model(cancel, progress)
        text = read_text(self.extras.text, self.extras.chunks)
        return quality(self.job.output, base, text, **self._how(cancel, progress))

    def _model(self, cancel: CancelToken, progress: Progress) -> Path:
        """The source as a file that runs, made once."""
        from edgellama.quantize.runnable import runnable

        if not self.made:
            file = runnable(
                self.job.source,
                self.job.output,
                threads=self.job.threads,
                cancel=cancel,
                progress=progress,
            )
            self.made.append(self.opened.enter_context(file))
        return self.made[0]

    def _how(self, cancel: CancelToken, progress: Progress) -> dict[str, Any]:
        return {
            "chunks": self.extras.chunks,
            "threads": self.threads,
            "cancel": cancel,
            "progress": progress,
        }


def figure_lines(report: "Report", quality: "Quality") -> str:
    """What this conversion came to, a figure in a line."""
    figures = quality.figures
    cells = {
        "type": report.type,
        "MB": f"{report.bytes / 1e6:.1f}",
        "bits/weight": f"{report.bits_per_weight:.2f}",
    }
    for figure, name, digits, scale in FIGURES:
        cells[name] = _cell(getattr(figures, figure), digits, scale)
    return "".join(f"{line}\n" for line in aligned(list(cells.items())))


def _cell(estimate: "Estimate | None", digits: int, scale: float) -> str:
    assert estimate is not None  # there is a base
    text = f"{estimate.value * scale:.{digits}f}"
    return text if estimate.error is None else f"{text} ± {estimate.error * scale:.{digits}f}"
