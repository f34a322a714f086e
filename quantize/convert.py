"""`quantize`: a checkpoint or a GGUF file becomes a GGUF file of another type, or an ONNX folder.

Puts the parts together: what is read (`source.py`), which type each tensor gets (`plan.py`), the
bytes (`stream.py`), the file (`writer.py`). The output appears whole or not at all.
"""

import contextlib
import glob
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from edgellama.control import CancelToken, Progress, require_progress, require_token
from edgellama.errors import (
    OutputError,
    ParameterError,
    require_choice,
    require_integer,
    require_path,
    shown,
)
from edgellama.machine import usable_cores
from edgellama.measure import peak_bytes
from edgellama.output import atomic_output
from edgellama.quantize import onnx_target
from edgellama.quantize.plan import Plan, plan, type_name
from edgellama.quantize.source import Source, open_source
from edgellama.quantize.stream import Importance, Piece, Streamer
from edgellama.quantize.writer import Writer

CERTIFICATES = ("full", "none")
OWN_KEYS = "edgellama."  # a file's own: what they say of the source does not hold for the output
LARGEST_EXPONENT = 20  # of importance, in powers of two: ggml's searches overflow far beyond
QUANTIZATION_VERSION = 2  # of the block formats; llama.cpp's GGML_QNT_VERSION
_PART = re.compile(r"(.+)-[0-9]{5}-of-([0-9]{5})\.gguf")


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    source: Path
    output: Path
    type: str
    types: dict[str, int]  # how many tensors have each type
    bits_per_weight: float
    bytes: int  # of the output
    seconds: float
    peak_bytes: int | None  # largest resident set of the process so far; None if unknown
    notes: tuple[str, ...]  # what was chosen or guessed


class Witness(Protocol):
    """Sees every piece of a conversion, in order and from one thread; then says what it saw.

    Its word is kept in the file under `key`, in at most `size` bytes.
    """

    key: str
    size: int

    def see(self, piece: Piece) -> None: ...
    def testify(self) -> str: ...


def quantize(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    type: str,
    importance: "Importance | str | os.PathLike[str] | None" = None,
    certificate: str = "full",
    strict: bool = False,
    threads: int | None = None,
    cancel: CancelToken | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert a checkpoint folder or a GGUF file to a GGUF file of another type.

    An output whose name ends in .onnx becomes a folder for ONNX Runtime; tensors that have their
    planned type already are copied to the bit.

    `type` names one type or a mix (`plan.FILE_TYPES`), any case in. `importance` weights each
    column's errors: a file, or by tensor name float32 (columns,). With `strict`, tensors that
    would need a larger type than theirs are refused. `threads`: None for all cores. `progress` is
    called with (bytes, bytes in all, what). An existing output is replaced once the new one is
    whole; the same input gives the same bytes.

    Raises ParameterError for arguments, the errors of `open_source`, NonFiniteError naming a
    tensor and a row, OutputError (the old output stays), Cancelled.
    """
    require_token(cancel)
    require_progress(progress)
    with prepared(source, output, type, importance, certificate, strict, threads) as job:
        return job.run(cancel, progress)


@dataclass(frozen=True)
class Job:
    """A conversion that is planned and checked; nothing is written before `run`."""

    source: Source
    output: Path
    plan: Plan
    importance: Importance | None
    certificate: str
    threads: int
    started: float

    def with_importance(self, weights: Importance) -> "Job":
        """The same job, which was prepared as `weighted`, with its weights of importance."""
        known = _importance(weights, self.source)
        return replace(self, importance=known, started=time.monotonic())

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, in a sentence each."""
        return (*self.source.notes, *_plan_notes(self.plan))

    def run(self, cancel: CancelToken | None = None, progress: Progress | None = None) -> Report:
        """Write the output."""
        check_room(self.output, self.plan)
        witness = _witness(self.certificate, self.source, self.plan)
        watched = witness is not None
        how = self.threads, self.importance, watched, cancel, progress
        streamer, notes = Streamer(self.source, self.plan, *how), self.notes
        if onnx_target.is_onnx(self.output):
            metadata = _metadata(self.source, self.plan)
            size, more = onnx_target.write(self.output, streamer, metadata, witness)
            notes = (*notes, *more)
        else:
            size = _written(self.output, streamer, witness)
        return Report(
            source=self.source.path,
            output=self.output,
            type=self.plan.type,
            types=self.plan.types,
            bits_per_weight=self.plan.bits_per_weight,
            bytes=size,
            seconds=time.monotonic() - self.started,
            peak_bytes=peak_bytes(),
            notes=notes,
        )


@contextlib.contextmanager
def prepared(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    type: str,
    importance: "Importance | str | os.PathLike[str] | None" = None,
    certificate: str = "full",
    strict: bool = False,
    threads: int | None = None,
    weighted: bool = False,
) -> Iterator[Job]:
    """The arguments of `quantize`, checked; the source is open while the `with` lasts.

    weighted: the plan reckons with weights of importance, which `with_importance` brings.
    """
    started = time.monotonic()
    require_choice("certificate", certificate, CERTIFICATES)
    workers = usable_cores() if threads is None else require_integer("threads", threads, 1, 1024)
    full = type_name(type)
    source, output = Path(require_path("source", source)), Path(require_path("output", output))
    if onnx_target.is_onnx(output):
        onnx_target.check_type(full)
    if not (importance is None or isinstance(importance, Mapping)):
        importance = Path(require_path("importance", importance))
    check_output(source, output, importance if isinstance(importance, Path) else None)
    with open_source(source) as opened:
        weights = _importance(importance, opened)
        planned = plan(opened, type, strict, importance=weighted or weights is not None)
        if onnx_target.is_onnx(output):
            planned = onnx_target.fitted(planned)
        yield Job(opened, output, planned, weights, certificate, workers, started)


def _written(output: Path, streamer: Streamer, witness: Witness | None) -> int:
    """Write a GGUF file; returns its size in bytes."""
    with atomic_output(output) as file:
        size = write_gguf(file, streamer, witness)
        if streamer.cancel is not None:
            streamer.cancel.check("the conversion")  # the last moment that changes nothing
        return size


def write_gguf(file: BinaryIO, streamer: Streamer, witness: Witness | None = None) -> int:
    """Write the whole file; returns its size in bytes."""
    source, planned = streamer.source, streamer.plan
    metadata = _metadata(source, planned)
    reserved = (witness.key, witness.size) if witness else None
    writer = Writer(file, metadata, planned.tensors, kinds=source.kinds, reserved=reserved)
    with contextlib.closing(streamer.pieces()) as pieces:
        for piece in pieces:
            writer.write(piece.data.data)
            if piece.ends_tensor:
                writer.end_tensor(piece.planned)
            if witness:
                witness.see(piece)
    if witness:
        writer.fill(witness.testify())
    return writer.n_bytes


def _metadata(source: Source, planned: Plan) -> dict[str, Any]:
    """What the file declares: the source's keys, and what is new about this one."""
    kept = {k: v for k, v in source.metadata.items() if not k.startswith(OWN_KEYS)}
    return kept | {
        "general.file_type": planned.file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
    }


def _plan_notes(planned: Plan) -> list[str]:
    """What a user should know about a plan, in a sentence each."""
    if not planned.fallbacks:
        return []
    count, of = len(planned.fallbacks), len(planned.tensors)
    columns = sorted({tensor.shape[-1] for tensor in planned.fallbacks})
    return [
        f"{count} of {of} tensors get a larger type than is usual in {planned.type}: its blocks do"
        f" not fit rows of {' and '.join(map(str, columns))};"
        f" {planned.bits_per_weight:.2f} bits per weight"
    ]


def _witness(certificate: str, source: Source, planned: Plan) -> Witness | None:
    if certificate == "none":
        return None
    from edgellama.quantize.certificate import Clerk

    return Clerk(source, _metadata(source, planned), [tensor.name for tensor in planned.tensors])


def _importance(
    given: "Importance | str | os.PathLike[str] | None", source: Source
) -> Importance | None:
    """Weights of importance by tensor name; those of tensors that are not here do not matter.

    A tensor whose columns all weigh 0 is left out: none of its errors would count. Raises
    ParameterError for weights of another model, and the errors of reading them.
    """
    if given is None:
        return None
    path = None
    if isinstance(given, (str, os.PathLike)):
        from edgellama.quantize.importance import load_importance

        path, given = Path(given), load_importance(given)
    known = {name: weights for name, weights in given.items() if name in source.tensors}
    for name, weights in known.items():
        columns = source.tensors[name].shape[1:]
        fits = np.shape(weights) == columns and np.asarray(weights).dtype.kind in "fiu"
        if not fits or not (np.isfinite(weights) & (weights >= 0)).all():
            problem = f"importance of {shown(name)}: shape {list(np.shape(weights))}"
            allowed = f"{list(columns)}, finite numbers from 0 on"
            raise _other_model(f"{problem}; expected {allowed}", path, allowed)
    if not known:
        raise _other_model("no importance of any tensor of this model", path)
    return {name: _within_reach(weights) for name, weights in known.items() if weights.any()}


def _within_reach(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same weights, of such a size that squares of sums of their products stay in float32.

    Only what they are to each other counts. A power of two changes no digit of a result.
    """
    exponent = int(np.frexp(np.float64(weights.max()))[1])
    shift = min(max(exponent, -LARGEST_EXPONENT), LARGEST_EXPONENT) - exponent
    return np.ldexp(weights.astype(np.float64), shift).astype(np.float32) if shift else weights


def _other_model(problem: str, path: Path | None, allowed: str | None = None) -> ParameterError:
    hint = "It was collected with another model"
    return ParameterError(problem, path=path, field="importance", allowed=allowed, hint=hint)


def check_output(source: Path, output: Path, importance: Path | None = None) -> None:
    """Refuse an output that is an input or a folder around one, under whatever name, or of a kind
    not written here.

    Raises ParameterError.
    """
    if output.suffix.lower() not in (".gguf", onnx_target.SUFFIX):
        allowed = "a name that ends in .gguf or .onnx"
        problem = f"output = {shown(str(output))}; allowed: {allowed}"
        raise ParameterError(problem, field="output", value=str(output), allowed=allowed)
    try:
        target = output.stat()
    except (OSError, ValueError):  # nothing there: nothing to lose
        return
    for path in _inputs(source, importance):
        if _is_or_holds(target, path):
            problem = f"the output is the input, {shown(str(path))}"
            hint = "Write to another name"
            raise ParameterError(problem, path=output, field="output", hint=hint)


def _inputs(source: Path, importance: Path | None) -> Iterator[Path]:
    """The files that may be read: a file with the other parts of a split one, or a folder's."""
    yield source
    if importance is not None:
        yield importance
    if os.path.isdir(source):  # which raises nothing, whatever the name
        yield from source.iterdir()
    elif match := _PART.fullmatch(source.name):
        stem, count = map(glob.escape, match.groups())
        yield from source.parent.glob(f"{stem}-*-of-{count}.gguf")


def _is_or_holds(target: os.stat_result, path: Path) -> bool:
    """Whether replacing the target takes the file away: a folder goes with all that it holds."""
    with contextlib.suppress(OSError, ValueError):
        places = [path]
        if stat.S_ISDIR(target.st_mode):
            places += Path(os.path.realpath(path)).parents
        return any(os.path.samestat(place.stat(), target) for place in places)
    return False


def check_room(output: Path, planned: Plan) -> None:
    """Refuse at once what cannot fit: the old output stays until the new one is whole."""
    try:
        with contextlib.suppress(FileNotFoundError):
            output.stat()  # a loop of links is an OSError here, whatever `resolve` makes of it
        free = shutil.disk_usage(output.resolve().parent).free
    except (OSError, ValueError, RuntimeError) as error:
        problem = f"cannot be written: {getattr(error, 'strerror', None) or error}"
        raise OutputError(problem, path=output, hint="Nothing was changed") from error
    if planned.n_bytes > free:
        problem = f"no space left: {planned.n_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        raise OutputError(problem, path=output, hint="Nothing was changed")
