"""An importance matrix for a conversion: collected on a text, kept in a file, never over another.

Knows nothing about how statistics are collected (`importance.py`) or used.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from edgellama.control import CancelToken, Progress
from edgellama.errors import EdgeLlamaError, OutputError, ParameterError, shown
from edgellama.perplexity import CONTEXT, read_text
from edgellama.quantize.importance import ORIGIN, Importance, collect
from edgellama.quantize.importance_files import read_importance


def matrix_beside(output: Path) -> Path:
    """Where the matrix of a conversion is kept if nobody says otherwise."""
    return output.with_name(f"{output.stem}.importance.gguf")


def check_matrix(path: Path, taken: Iterable[Path]) -> None:
    """Refuse a place for a matrix that is one of `taken`, or holds anything but a matrix of ours.

    Raises ParameterError.
    """
    for other in taken:
        if _same(path, other):
            raise _refused(path, f"the importance matrix cannot take the place of {shown(other)}")
    if not os.path.lexists(path):
        return
    try:
        ours = ORIGIN in read_importance(path).keys
    except EdgeLlamaError:
        ours = False
    if not ours:
        raise _refused(path, "is there, and no importance matrix that was collected here")


def check_place(path: Path) -> None:
    """Refuse a name under which no file could be written later on. Raises OutputError."""
    folder = path.parent if path.is_dir() else Path(os.path.realpath(path)).parent
    if not folder.exists():
        problem = f"there is no folder {shown(str(folder))}"
    elif not folder.is_dir():
        problem = f"{shown(str(folder))} is no folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = f"the folder {shown(str(folder))} cannot be written to"
    else:
        return
    raise OutputError(f"cannot be written: {problem}", path=path, hint="Nothing was changed")


def _same(path: Path, other: Path) -> bool:
    if path.absolute() == other.absolute():
        return True
    with contextlib.suppress(OSError, ValueError):
        return path.samefile(other)
    return False


def _refused(path: Path, problem: str) -> ParameterError:
    return ParameterError(problem, path=path, field="importance_out", hint="Name another file")


def calibrate(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    context: int = CONTEXT,
    chunks: int | None = None,
    threads: int | None = None,
    cancel: CancelToken | None = None,
    progress: Progress | None = None,
) -> Importance:
    """Collect an importance matrix of a GGUF model on a text file, and keep it in `output`.

    What an earlier call on the same model and text has left there is continued. A matrix of other
    origin that was collected here is replaced; anything else is not. Raises ParameterError,
    OutputError, what `read_text` and `collect` raise, Cancelled.
    """
    check_matrix(Path(output), (Path(model), Path(text)))
    check_place(Path(output))
    return collect(
        model,
        read_text(text),
        output,
        dataset=Path(text).name,
        context=context,
        chunks=chunks,
        threads=threads,
        cancel=cancel,
        progress=progress,
    )
