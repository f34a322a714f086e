"""`edgellama perplexity`: how well a model predicts a text, alone or against a base model."""

import dataclasses
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import edgellama
from edgellama.cli.background import in_background
from edgellama.cli.reply import Running, load_model
from edgellama.cli.spelling import aligned
from edgellama.cli.terminal import Terminal
from edgellama.control import CancelToken
from edgellama.distance import Estimate, Figures
from edgellama.errors import ParameterError
from edgellama.perplexity import CONTEXT, Quality, measure, read_text

LABELS = {  # figure -> what a person reads, and in which unit
    "perplexity": ("perplexity", 1.0, ""),
    "base_perplexity": ("perplexity of the base", 1.0, ""),
    "ratio": ("ratio of the two", 1.0, ""),
    "kl_mean": ("KL divergence, mean", 1.0, ""),
    "kl_median": ("KL divergence, median", 1.0, ""),
    "kl_p99": ("KL divergence, 99th percentile", 1.0, ""),
    "kl_max": ("KL divergence, largest", 1.0, ""),
    "same_top": ("same likeliest token", 0.01, " %"),
    "delta_p_mean": ("change of probability, mean", 0.01, " %"),
    "delta_p_rms": ("change of probability, RMS", 0.01, " %"),
}
BY_POSITION = ("perplexity", "kl_mean", "same_top")


def show_perplexity(
    terminal: Terminal,
    name: str,
    text: Path,
    *,
    base: str | None,
    how: Running,
    base_runtime: str,
    chunks: int | None,
) -> None:
    if base is None and base_runtime != how.runtime:
        raise ParameterError("--base-runtime is for --base", field="base_runtime")
    context = CONTEXT if how.context is None else how.context
    words, cancel = read_text(text, chunks, context), CancelToken()
    with ExitStack() as opened:
        model = opened.enter_context(load_model(terminal, name, how))
        other = None
        if base is not None:
            base_how = dataclasses.replace(how, runtime=base_runtime)
            other = opened.enter_context(load_model(terminal, base, base_how))
        display = opened.enter_context(terminal.progress())
        quality = in_background(
            lambda: measure(
                model,
                words,
                base=other,
                context=context,
                chunks=chunks,
                cancel=cancel,
                progress=display.update,
            ),
            cancel,
            idle=display.remind,
        )
        display.close()
        if terminal.json:
            terminal.document(document(quality, model, other, text))
        else:
            terminal.note(introduction(quality, model, other))
            terminal.write(table(quality))


def document(
    quality: Quality, model: "edgellama.Model", base: "edgellama.Model | None", text: Path
) -> dict[str, Any]:
    """For --json: the fields of Quality; an estimate is `value`, `error`."""
    told = {"model": str(model.info.path), "device": model.device, "base": None, "text": str(text)}
    if base is not None:
        told |= {"base": str(base.info.path), "base_device": base.device}
    return told | dataclasses.asdict(quality)


def introduction(quality: Quality, model: "edgellama.Model", base: "edgellama.Model | None") -> str:
    """On what, with what."""
    names = [f"{one.info.path.name} ({one.device['runtime']})" for one in (model, base) if one]
    return (
        f"{' against '.join(names)}\n{quality.chunks} chunks of {quality.context} tokens, "
        f"{quality.figures.tokens} tokens scored; ± is one standard error"
    )


def table(quality: Quality) -> str:
    """One line a figure; then the main ones by position within the chunk."""
    rows = [[label, *_cell(quality.figures, name)] for name, (label, *_) in LABELS.items()]
    lines = aligned([row for row in rows if len(row) > 1])
    names = [name for name in BY_POSITION if getattr(quality.figures, name) is not None]
    rows = [["positions", *(LABELS[name][0] for name in names)]]
    for bucket in quality.buckets:
        cells = [cell for name in names for cell in _cell(bucket.figures, name)]
        rows.append([f"{bucket.first} to {bucket.last}", *cells])
    return "".join(f"{line}\n" for line in [*lines, "", *aligned(rows)])


def _cell(figures: Figures, name: str) -> list[str]:
    """A figure as text in a list, empty where the figure does not exist."""
    estimate: Estimate | None = getattr(figures, name)
    if estimate is None:
        return []
    _, scale, unit = LABELS[name]
    value = estimate.value / scale
    if estimate.error is None:
        return [f"{value:.6g}{unit}"]
    return [f"{with_error(value, estimate.error / scale)}{unit}"]


def with_error(value: float, error: float) -> str:
    """Both to the second digit of the error: the others say nothing."""
    if not 1e-9 < error < math.inf:
        return f"{value:.6g} ± {error:.2g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
