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
from edgellama.runtimes.program import Matrix, aligned, products
from edgellama.runtimes.repack import padded, repack, repacked_bytes


class Weights:
    """The graph's weights. Loading raises what `Loader` raises, NonFiniteError and Cancelled."""

    def __init__(self, file: GGUF, graph: Graph, options: Options) -> None:
        infos = {name: file.tensors[name] for name in graph.weights}
        loader = Loader(file, options, sum(info.n_bytes for info in infos.values()))
        self.matrices: dict[str, Matrix] = {}
        self.vectors: dict[str, NDArray[np.float32]] = {}
        self.rooms: list[NDArray[np.uint8]] = []
        with ThreadPoolExecutor(options.threads, "edgellama-load") as pool:
            repacking = _Repacking(loader, pool, 2 * options.threads)
            for group in _neighbours(graph):
                self._load_group(repacking, group)
            repacking.finish()
        for name, info in infos.items():
            if len(info.shape) == 1:
                vector = aligned(padded(info.shape[0], abi.BLOCK) * 4).view(np.float32)
                vector[: info.shape[0]] = loader.array(name)
                self.vectors[name] = vector
        self.warnings = loader.warnings
        self.n_bytes = sum(room.nbytes for room in self.rooms)
        self.n_bytes += sum(vector.nbytes for vector in self.vectors.values())

    def _load_group(self, repacking: "_Repacking", names: list[str]) -> None:
        infos = [repacking.loader.file.tensors[name] for name in names]
        sizes = [repacked_bytes(i.type.name, i.shape[0], i.shape[1]) for i in infos]
        room = aligned(sum(sizes))
        self.rooms.append(room)
        start = 0
        for name, info, size in zip(names, infos, sizes, strict=True):
            repacking.load(name, room[start : start + size])
            address = room.ctypes.data + start
            self.matrices[name] = Matrix(info.type.name, info.shape[0], info.shape[1], address)
            start += size

    def free(self) -> None:
        self.rooms, self.matrices = [], {}


def _neighbours(graph: Graph) -> list[list[str]]:
    """Names of matrices, those that share an input together, so that they can be fused."""
    groups = [[node.weight or "" for node in group] for group in products(graph)]
    known = {name for group in groups for name in group}
    lookups = [n.weight for n in graph.nodes if n.op == "embed" and n.weight]
    return [[name] for name in lookups if name not in known] + groups


class _Repacking:
    """Pieces of matrices under way from the file to their places."""

    def __init__(self, loader: Loader, pool: ThreadPoolExecutor, most: int) -> None:
        self.loader, self._pool, self._most = loader, pool, most
        self._under_way: deque[Future[None]] = deque()

    def load(self, name: str, out: NDArray[np.uint8]) -> None:
        """Read a matrix and have it repacked into `out`, at once or soon."""
        info = self.loader.file.tensors[name]
        kind, columns = info.type.name, info.shape[1]
        group = repacked_bytes(kind, abi.LANES, columns)
        for first, raw in self.loader.pieces(name, abi.LANES):
            at = first // abi.LANES * group
            piece = out[at : at + repacked_bytes(kind, len(raw), columns)]
            self._under_way.append(self._pool.submit(repack, kind, raw, columns, piece))
            if len(self._under_way) > self._most:
                self._under_way.popleft().result()

    def finish(self) -> None:
        while self._under_way:
            self._under_way.popleft().result()
