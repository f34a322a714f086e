"""A source as a file that runs: a checkpoint becomes a temporary GGUF file of floats.

What calibrates or measures needs a model that can be loaded, whatever the source is. Knows nothing
about what it is run for.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from edgellama.control import CancelToken, Progress
from edgellama.output import temporary_beside, told_as_output
from edgellama.quantize.convert import check_room, write_gguf
from edgellama.quantize.plan import plan
from edgellama.quantize.source import Source
from edgellama.quantize.stream import QUANTIZING, Streamer

MAKING = "making a temporary file of floats"  # what progress says; it counts the file's bytes


@contextlib.contextmanager
def runnable(
    source: Source,
    output: Path,
    *,
    threads: int,
    cancel: CancelToken | None = None,
    progress: Progress | None = None,
) -> Iterator[Path]:
    """The GGUF file to run: the source itself, or a temporary one beside `output`.

    The latter is F16, or BF16 where the checkpoint is. It is gone when the block ends; a killed
    process's is removed by the next writer of `output`. Raises OutputError, NonFiniteError,
    Cancelled.
    """
    if source.kind == "gguf":
        yield source.path
        return
    kinds = {tensor.type for tensor in source.tensors.values() if len(tensor.shape) > 1}
    planned = plan(source, "BF16" if kinds == {"BF16"} else "F16")
    check_room(output, planned)

    def told(done: int, total: int, what: str) -> None:
        if progress:
            progress(done, total, MAKING if what == QUANTIZING else what)

    beside = output.with_name(f"{output.name}.floats")  # an output may be a folder
    with temporary_beside(beside) as (file, path):
        with told_as_output(output):
            write_gguf(file, Streamer(source, planned, threads, cancel=cancel, progress=told))
            file.flush()
        yield path
