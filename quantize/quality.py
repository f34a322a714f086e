"""What a file's bits buy: its size, and how far it is from the model that it was made from.

Knows nothing about how files are converted.
"""

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack

from edgellama.control import CancelToken, Progress
from edgellama.ggml import BY_NAME
from edgellama.gguf import TensorInfo, open_gguf
from edgellama.opening import load
from edgellama.perplexity import CONTEXT, Quality, measure
from edgellama.quantize.plan import FILE_TYPES


def quality(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str],
    text: str,
    *,
    context: int = CONTEXT,
    chunks: int | None = None,
    threads: int | None = None,
    cancel: CancelToken | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Measure a model against `base`, a GGUF file of what it was made from, on `text`.

    context: tokens of a chunk; only 512 gives the usual perplexity. chunks: the text's first ones
    only. Both models are in memory; a GGUF file runs on the cpu runtime. Raises what `load` and
    `measure` raise, Cancelled.
    """
    with ExitStack() as opened:
        models = [
            opened.enter_context(
                load(one, context=context, threads=threads, cancel=cancel, progress=progress)
            )
            for one in (path, base)
        ]
        return measure(
            models[0],
            text,
            base=models[1],
            context=context,
            chunks=chunks,
            cancel=cancel,
            progress=progress,
        )


def declared(path: str | os.PathLike[str]) -> tuple[str, float]:
    """A GGUF file's type by name, and the bits that its tensors take for each weight."""
    with open_gguf(path) as file:
        number, tensors = file.metadata.get("general.file_type"), file.tensors
        names = {number: name for name, (number, _) in FILE_TYPES.items()}
        n_bytes = sum(info.n_bytes for info in tensors.values())
        weights = sum(math.prod(info.shape) for info in tensors.values())
        kind = names[number] if isinstance(number, int) and number in names else _usual(tensors)
        return kind, 8 * n_bytes / max(1, weights)


def _usual(tensors: Mapping[str, TensorInfo]) -> str:
    """The type that most weights have."""
    counts = dict.fromkeys(BY_NAME, 0)
    for info in tensors.values():
        counts[info.type.name] = counts.get(info.type.name, 0) + math.prod(info.shape)
    return max(counts, key=lambda name: counts[name])
