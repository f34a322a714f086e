"""Importance matrices: which columns of a weight meet large inputs, and so deserve small errors.

Statistics are collected as llama.cpp's llama-imatrix does: a text in chunks of 512 tokens, each
read afresh from BOS, and for every product in the layers the sum of its squared inputs by column.
The output matrix is left out, as there. Knows nothing about how encoders use the weights; files
are read and written in `importance_files.py`.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellama.control import CancelToken, Progress
from edgellama.errors import EdgeLlamaError, NonFiniteError, require_integer
from edgellama.gguf import open_gguf
from edgellama.opening import load
from edgellama.paths import model_path
from edgellama.perplexity import CONTEXT, chunked
from edgellama.quantize.importance_files import (
    Importance as Importance,
    read_importance,
    write_importance,
)

SAVE_EVERY = 10  # chunks
ORIGIN = "edgellama.importance.origin"  # hash of model, text and chunk length
SAMPLE = 1 << 16  # bytes of each tensor that tell one model from another


def load_importance(path: "str | os.PathLike[str]") -> dict[str, NDArray[np.float32]]:
    """By tensor name the mean square of each column's input, float32 (columns,): what encoders
    take. Raises what `read_importance` raises."""
    return read_importance(path).weights()


def collect(
    model: "str | os.PathLike[str]",
    text: str,
    output: "str | os.PathLike[str] | None" = None,
    *,
    dataset: str = "",
    context: int = CONTEXT,
    chunks: int | None = None,
    threads: int | None = None,
    save_every: int = SAVE_EVERY,
    cancel: CancelToken | None = None,
    progress: Progress | None = None,
) -> Importance:
    """Collect statistics of a GGUF model's inputs on `text`, with the cpu runtime.

    With `output`, they are written there after every `save_every` chunks and at the end; what an
    earlier call on the same model and text left there is continued, with the very result that one
    call would have had. `dataset` names the text in the file; `chunks` takes the first ones only.
    The threads' number does not change the result. progress: (tokens done, in all, what).

    Raises what `load` and `chunked` raise, NonFiniteError, OutputError, Cancelled.
    """
    require_integer("save_every", save_every, 1, 1 << 30)
    path = model_path(os.fspath(model))
    with load(
        path,
        "cpu",
        context=context,
        threads=threads,
        kv_type="f32",
        deterministic=True,
        cancel=cancel,
        progress=progress,
    ) as loaded:
        cut = chunked(loaded.tokenizer, text, context, chunks)
        origin = _origin(path, chunked(loaded.tokenizer, text, context), context)
        nothing = Importance({}, {}, 0, context, [dataset] if dataset else [], {ORIGIN: origin})
        found = _earlier(output, origin, len(cut)) or nothing
        collector = _Collector(loaded._runtime, path, found)
        for number in range(found.chunks, len(cut)):
            if progress:
                progress(number * context, len(cut) * context, "collecting importance")
            collector.add(cut[number], cancel)
            if output is not None and found.chunks % save_every == 0 and number + 1 < len(cut):
                write_importance(output, found)
    if progress:
        progress(len(cut) * context, len(cut) * context, "collecting importance")
    if output is not None:
        write_importance(output, found)
    return found


class _Collector:
    """Adds one chunk after the other to the sums.

    A chunk is summed up in float64 and added in float32, so that what a file holds is all there is
    to know for going on.
    """

    def __init__(self, runtime: object, path: Path, found: Importance) -> None:
        from edgellama.runtimes.cpu import Cpu
        from edgellama.runtimes.observe import Observer

        assert isinstance(runtime, Cpu)
        self._runtime, self._observer = runtime, Observer(runtime)
        self._path, self._found = path, found
        self._sums: dict[tuple[str, ...], NDArray[np.float64]] = {}

    def add(self, chunk: Sequence[int], cancel: CancelToken | None) -> None:
        self._sums = {}
        with closing(self._runtime.session()) as session:
            self._observer.forward(session, chunk, self._see, cancel)
        added = {
            name: self._added(name, sums) for names, sums in self._sums.items() for name in names
        }
        found = self._found
        found.sums.update(added)  # only now: a chunk counts whole or not at all
        found.chunks += 1
        count = np.array([found.chunks * len(chunk)], np.float32)
        found.counts = dict.fromkeys(added, count)

    def _added(self, name: str, sums: NDArray[np.float64]) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):  # told here
            total = (self._found.sums.get(name, 0) + sums).astype(np.float32)
        if not np.isfinite(total).all():
            column = int(np.isfinite(total).argmin())
            problem = f"squared inputs of column {column} overflow, or are not numbers"
            raise NonFiniteError(problem, path=self._path, where=f"tensor '{name}'")
        return total

    def _see(self, names: tuple[str, ...], inputs: NDArray[np.float32]) -> None:
        exact = inputs.astype(np.float64)
        self._sums[names] = self._sums.get(names, 0) + np.einsum("tc,tc->c", exact, exact)


def _earlier(
    output: "str | os.PathLike[str] | None", origin: str, chunks: int
) -> Importance | None:
    """What an earlier call has left, if it is of the same origin and not beyond what is asked."""
    if output is None or not Path(output).exists():
        return None
    try:
        earlier = read_importance(output)
    except EdgeLlamaError:  # something else, which the new file will replace
        return None
    same = earlier.keys.get(ORIGIN) == origin and earlier.chunks <= chunks
    return earlier if same else None


def _origin(path: Path, chunks: list[list[int]], context: int) -> str:
    """A hash of what decides the statistics: the model's tensors, by samples, and the ids."""
    digest = hashlib.sha256(f"{context}".encode())
    with open_gguf(path) as file:
        for name, info in sorted(file.tensors.items()):
            sample = bytearray(min(info.n_bytes, SAMPLE))
            file.read_into(name, sample)
            digest.update(f"{name} {info.type.name} {info.shape}".encode() + sample)
    for chunk in chunks:
        digest.update(np.asarray(chunk, "<i8").tobytes())
    return digest.hexdigest()
