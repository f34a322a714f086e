"""Reading a model file's weights for a runtime, a bounded piece at a time.

Checks for NaN and infinity on the way, since the bytes are in cache anyway. Knows nothing about
how a runtime stores what it gets.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgellama.gguf import GGUF, TensorInfo
from edgellama.quantize.blocks import decode
from edgellama.runtimes.base import Options
from edgellama.weights import check_finite

PIECE = 2 << 20  # bytes read at once: small enough to stay in cache until repacked


@dataclass
class Loader:
    """The weights of one file, with progress, cancellation and what there is to warn of."""

    file: GGUF
    options: Options
    total: int  # bytes that will be read
    done: int = 0
    warnings: list[str] = field(default_factory=list)
    _free: list[NDArray[np.uint8]] = field(default_factory=list)  # rooms to read into again

    def pieces(self, name: str, multiple: int = 1) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(first row, raw rows (n, row_bytes)) of a tensor; n is a multiple but for the last."""
        info = self.file.tensors[name]
        step = max(1, PIECE // info.row_bytes // multiple) * multiple
        zero = True
        for first in range(0, info.n_rows, step):
            raw = self._read(info, first, min(step, info.n_rows - first))
            block = first * info.row_bytes // info.type.size
            zero = check_finite(info, raw, block, self.file.path) and zero
            yield first, raw
        if zero:
            self.warnings.append(f"tensor '{name}' is all zeros")

    def give_back(self, raw: NDArray[np.uint8]) -> None:
        """The caller has done with a piece: its memory is used again, which saves its pages."""
        if isinstance(raw.base, np.ndarray):
            self._free.append(raw.base)

    def _read(self, info: TensorInfo, first: int, rows: int) -> NDArray[np.uint8]:
        need = rows * info.row_bytes
        room = self._free.pop() if self._free else np.empty(max(need, PIECE), np.uint8)
        if len(room) < need:
            room = np.empty(need, np.uint8)
        raw = room[:need].reshape(rows, info.row_bytes)
        self.file.read_into(info.name, raw.data.cast("B"), first * info.row_bytes)
        self.done += raw.nbytes
        if self.options.cancel:
            self.options.cancel.check("loading the model")
        if self.options.progress:
            self.options.progress(self.done, self.total, "loading weights")
        return raw

    def array(self, name: str) -> NDArray[np.float32]:
        """A whole tensor as float32, in its own shape."""
        info = self.file.tensors[name]
        whole = np.empty((info.n_rows, math.prod(info.shape) // info.n_rows), np.float32)
        for first, raw in self.pieces(name):
            whole[first : first + len(raw)] = decode(info.type.name, raw)
            self.give_back(raw)
        return whole.reshape(info.shape)
