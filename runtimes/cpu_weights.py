"""The cpu runtime's weights in memory: matrices repacked as the file streams in, vectors padded.

One thread reads, all repack; what is in flight is bounded by a few pieces. Knows nothing about
programs or kernels' code.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from edgellama.gguf import GGUF
from edgellama.graph import Graph
from edgellama.runtimes import abi
from edgellama.runtimes.base import Options
from edgellama.runtimes.loading import Loader
from edgellama.runtimes.places import Matrix, aligned
from edgellama.runtimes.program import products
from edgellama.runtimes.repack import padded, repack, repacked_bytes


class Weights:
    """The graph's weights. Loading raises what `Loader` raises, NonFiniteError and Cancelled."""

    def __init__(self, file: GGUF, graph: Graph, options: Options) -> None:
        infos = {name: file.tensors[name] for name in graph.weights}
        loader = Loader(file, options, sum(info.n_bytes for info in infos.values()))
        self.matrices: dict[str, Matrix] = {}
        self.vectors: dict[str, NDArray[np.float32]] = {}
        groups = neighbours(graph)
        sizes = [[_size(file, name) for name in group] for group in groups]
        # One room for all: memory of this size goes back to the system when it is freed.
        self.room = aligned(sum(padded(sum(of_group), 64) for of_group in sizes))
        with ThreadPoolExecutor(options.threads, "edgellama-load") as pool:
            try:
                self._load_groups(_Repacking(loader, pool, 2 * options.threads), groups, sizes)
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what is not begun would only hold it up
                raise
        for name, info in infos.items():
            if len(info.shape) == 1:
                vector = aligned(padded(info.shape[0], abi.BLOCK) * 4).view(np.float32)
                vector[: info.shape[0]] = loader.array(name)
                self.vectors[name] = vector
        self.warnings = loader.warnings
        self.n_bytes = self.room.nbytes + sum(vector.nbytes for vector in self.vectors.values())

    def _load_groups(
        self, repacking: "_Repacking", groups: list[list[str]], sizes: list[list[int]]
    ) -> None:
        start = 0
        for group, of_group in zip(groups, sizes, strict=True):
            self._load_group(repacking, group, of_group, start)
            start += padded(sum(of_group), 64)
        repacking.finish()

    def _load_group(
        self, repacking: "_Repacking", names: list[str], sizes: list[int], start: int
    ) -> None:
        """Matrices that share an input, one behind the other."""
        for name, size in zip(names, sizes, strict=True):
            info = repacking.loader.file.tensors[name]
            repacking.load(name, self.room[start : start + size])
            address = self.room.ctypes.data + start
            self.matrices[name] = Matrix(info.type.name, info.shape[0], info.shape[1], address)
            start += size

    def free(self) -> None:
        self.room, self.matrices, self.vectors = np.zeros(0, np.uint8), {}, {}


def _size(file: GGUF, name: str) -> int:
    info = file.tensors[name]
    return repacked_bytes(info.type.name, info.shape[0], info.shape[1])


def neighbours(graph: Graph) -> list[list[str]]:
    """Names of matrices, those that share an input together, so that they can be fused."""
    groups = [[node.weight or "" for node in group] for group in products(graph)]
    known = {name for group in groups for name in group}
    lookups = [n.weight for n in graph.nodes if n.op == "embed" and n.weight]
    return [[name] for name in lookups if name not in known] + groups


class _Repacking:
    """Pieces of matrices under way from the file to their places."""

    def __init__(self, loader: Loader, pool: ThreadPoolExecutor, most: int) -> None:
        self.loader, self._pool, self._most = loader, pool, most
        self._under_way: deque[tuple[Future[None], NDArray[np.uint8]]] = deque()

    def load(self, name: str, out: NDArray[np.uint8]) -> None:
        """Read a matrix and have it repacked into `out`, at once or soon."""
        info = self.loader.file.tensors[name]
        kind, columns = info.type.name, info.shape[1]
        group = repacked_bytes(kind, abi.LANES, columns)
        for first, raw in self.loader.pieces(name, abi.LANES):
            at = first // abi.LANES * group
            piece = out[at : at + repacked_bytes(kind, len(raw), columns)]
            future = self._pool.submit(repack, kind, raw, columns, piece)
            self._under_way.append((future, raw))
            if len(self._under_way) > self._most:
                self._finish_one()

    def finish(self) -> None:
        while self._under_way:
            self._finish_one()

    def _finish_one(self) -> None:
        future, raw = self._under_way.popleft()
        future.result()
        self.loader.give_back(raw)
