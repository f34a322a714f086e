"""A source's tensors as the bytes of a plan, piece after piece, made on all threads.

Only a few pieces exist at a time, whatever the size of the model. Knows nothing about what becomes
of the bytes.
"""

import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgellama.control import CancelToken, Progress
from edgellama.quantize.encode import WEIGHTED, encode
from edgellama.quantize.finite import LARGEST_HALF, check_bits, largest
from edgellama.quantize.halves import widened
from edgellama.quantize.plan import Plan, PlannedTensor
from edgellama.quantize.source import Source, SourceTensor
from edgellama.runtimes import kernel_cache, levels

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Importance: TypeAlias = Mapping[str, Floats]  # by tensor name: a weight for each column

PIECE = 1 << 18  # weights read, encoded and written at a time: they fit a core's own cache
QUANTIZING = "quantizing"  # what progress says; it counts the output's bytes
SLICE = 1 << 16  # weights encoded between two looks at the cancel token, even by slow encoders
_AHEAD = 2  # pieces that wait for a thread, so that none waits for a piece
_LOOK = 0.02  # seconds between two looks at the cancel token
_TOLD = 0.05  # seconds between two reports of progress


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one tensor, from the source to the file."""

    planned: PlannedTensor
    tensor: SourceTensor
    first: int
    last: int
    data: Bytes  # rows first..last-1 as the file has them, in GGUF's order
    rows: Floats | None  # the same rows as the source has them, if asked for

    @property
    def ends_tensor(self) -> bool:
        return self.last == self.tensor.shape[0]


@dataclass(frozen=True)
class Streamer:
    """How pieces are made. `keep_rows`: pieces carry the source's weights too."""

    source: Source
    plan: Plan
    threads: int
    importance: Importance | None = None
    keep_rows: bool = False
    cancel: CancelToken | None = None
    progress: Progress | None = None

    def pieces(self) -> Generator[Piece, None, None]:
        """All tensors' rows, in order. Raises NonFiniteError, Cancelled, what reading raises."""
        self._compile()
        with ThreadPoolExecutor(self.threads, "edgellama-quantize") as pool:
            try:
                yield from self._in_order(pool)
            finally:  # pieces that wait are dropped; leaving the `with` awaits the few begun
                pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self) -> None:
        """Have the encoders ready: the wait for a compiler can be cancelled here, later not."""
        weighted = self.importance or {}
        names = [
            f"{'weighted' if t.name in weighted and t.type in WEIGHTED else 'encode'}:{t.type}"
            for t in self.plan.tensors
            if t.type not in ("F32", t.source_type)
        ]
        kernel_cache.addresses(names, levels.choose()[0], self.progress, self.cancel)

    def _in_order(self, pool: ThreadPoolExecutor) -> Iterator[Piece]:
        waiting: deque[Future[Piece]] = deque()
        report = _Report(self.plan.n_bytes, self.progress)
        for planned, first, last in self._ranges():
            waiting.append(pool.submit(self._made, planned, first, last))
            if len(waiting) >= self.threads + _AHEAD:
                yield report.add(self._wait(waiting.popleft()))
        while waiting:
            yield report.add(self._wait(waiting.popleft()))

    def _ranges(self) -> Iterator[tuple[PlannedTensor, int, int]]:
        for planned in self.plan.tensors:
            step, rows = self.source.tensors[planned.name].row_step, planned.shape[0]
            columns = planned.n_elements // rows
            count = max(1, PIECE // (columns * step)) * step
            for first in range(0, rows, count):
                yield planned, first, min(first + count, rows)

    def _wait(self, future: "Future[Piece]") -> Piece:
        while not wait([future], timeout=_LOOK).done:
            self._look()
        self._look()
        return future.result()

    def _look(self) -> None:
        if self.cancel is not None:
            self.cancel.check("the conversion")

    def _made(self, planned: PlannedTensor, first: int, last: int) -> Piece:
        tensor, path = self.source.tensors[planned.name], self.source.path
        rows = None
        if planned.type == tensor.type:
            bits = tensor.read_bits(first, last)
            check_bits(bits, tensor.type, tensor.name, first, path, stored=True)
            data = _bytes(tensor.arrange(bits))
            if self.keep_rows:
                rows = tensor.read(first, last)
        else:
            rows, size = self._weights(tensor, first, last)
            data = self._encoded(planned, tensor.arrange(rows))
            if size > LARGEST_HALF or (self.importance and planned.name in self.importance):
                check_bits(data, planned.type, tensor.name, first, path, stored=False)
        return Piece(planned, tensor, first, last, data, rows if self.keep_rows else None)

    def _weights(self, tensor: SourceTensor, first: int, last: int) -> tuple[Floats, float]:
        """Rows of weights, and what none of them exceeds."""
        if tensor.type == "F16":
            bits = tensor.read_bits(first, last)
            check_bits(bits, "F16", tensor.name, first, self.source.path, stored=True)
            return widened(bits), LARGEST_HALF
        rows = tensor.read(first, last)
        return rows, largest(rows, tensor.name, first, self.source.path)

    def _encoded(self, planned: PlannedTensor, rows: Floats) -> Bytes:
        weights = self.importance.get(planned.name) if self.importance else None
        rows = rows.reshape(len(rows), -1)
        data = np.empty((len(rows), planned.n_bytes // planned.shape[0]), np.uint8)
        count = max(1, SLICE // rows.shape[1])
        for at in range(0, len(rows), count):
            self._look()
            some = slice(at, at + count)
            data[some] = encode(rows[some], planned.type, importance=weights)
        return data


class _Report:
    """Counts the bytes made, and tells of them now and then."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._told = 0.0

    def add(self, piece: Piece) -> Piece:
        self._done += piece.data.nbytes
        now = time.monotonic()
        if self._progress and (now - self._told > _TOLD or self._done == self._total):
            self._told = now
            self._progress(self._done, self._total, QUANTIZING)
        return piece


def _bytes(rows: NDArray[np.generic]) -> Bytes:
    """(rows, row bytes)"""
    return np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
