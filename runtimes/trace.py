"""Every value of the decoder graph that a runtime can show, for some tokens.

The reference has all of them; ONNX Runtime gives them as outputs of a graph; the cpu runtime's
program runs in slices, and what lies in its buffers in between is read. Knows nothing about what
the values are compared for.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgellama.errors import ParameterError
from edgellama.graph import Node
from edgellama.runtimes import kernel_cache
from edgellama.runtimes.base import Runtime
from edgellama.runtimes.cpu import Cpu
from edgellama.runtimes.observe import OBSERVED, part, unpacked
from edgellama.runtimes.places import Packing
from edgellama.runtimes.program import Place, kernel_names, lower
from edgellama.runtimes.reference import Reference

Values = dict[str, NDArray[np.float32]]  # by the graph's names, each (tokens, width)
MOST_TOKENS = OBSERVED.tokens


class Tracer(Protocol):
    """Shows a runtime's values."""

    def values(self, ids: list[int]) -> Values:
        """Of at most MOST_TOKENS tokens of a new conversation, those of the graph's names that
        this runtime ever writes down, the logits of all tokens among them."""
        ...


def tracer(runtime: Runtime, fused: bool = False) -> Tracer:
    """For a loaded runtime. `fused`: of onnx, the graph that it runs in earnest.

    Raises ParameterError for a runtime that shows no values.
    """
    if isinstance(runtime, Reference):
        return _OfReference(runtime)
    if isinstance(runtime, Cpu):
        return _OfCpu(runtime)
    from edgellama.runtimes.ort import Ort
    from edgellama.runtimes.ort_trace import OfOrt

    if isinstance(runtime, Ort):
        return OfOrt(runtime, fused)
    name = runtime.describe()["runtime"]
    raise ParameterError(f"the {name} runtime does not show its values", field="runtime")


class _OfReference:
    def __init__(self, runtime: Reference) -> None:
        self.runtime, self.names = runtime, [n.output for n in runtime.graph.nodes]

    def values(self, ids: list[int]) -> Values:
        found = self.runtime.session().run(ids, range(len(ids)))
        return {name: np.asarray(found[name], np.float32) for name in self.names}


class _OfCpu:
    """A program like the one that runs in earnest, with what products take written down too.

    Values that are only ever added to others, or kept in the cache, are not seen.
    """

    def __init__(self, runtime: Cpu) -> None:
        self.runtime = runtime
        graph, weights = runtime.graph, runtime.weights
        types = {name: matrix.type for name, matrix in weights.matrices.items()}
        names = kernel_names(graph, types, [runtime.cache.kv_type], OBSERVED)
        kernels = kernel_cache.addresses(names, runtime.level)
        parts = (graph, weights.matrices, weights.vectors, kernels, runtime.cache, OBSERVED)
        self.program = lower(*parts)
        self.packed_as = {n.weight: n.inputs[0] for n in graph.nodes if n.op == "linear"}
        self.widths = {n.output: self._width(n) for n in graph.nodes}

    def _width(self, node: Node) -> int:
        """Of a value that is not packed."""
        if node.op == "linear":
            return self.runtime.weights.matrices[node.weight or ""].rows
        return self.runtime.graph.config.dim

    def values(self, ids: list[int]) -> Values:
        assert len(ids) <= MOST_TOKENS, len(ids)
        tokens, rows = np.array(ids, np.int64), np.arange(len(ids))
        found: Values = {}
        session, at = self.runtime.session(), 0
        with self.runtime.turns.turn():
            for end, name, place in sorted(self._points(), key=lambda point: point[0]):
                session.position = 0  # each part moves it on
                if end > at:
                    session._run(part(self.program, at, end), tokens, rows, None)
                at = max(at, end)
                found[name] = self._read(name, place, len(ids))
        session.close()
        return found

    def _points(self) -> Iterator[tuple[int, str, Place | Packing]]:
        """After how many instructions which value lies where."""
        for name, (end, place) in self.program.written.items():
            yield end, name, place
        for packing in self.program.packings:
            yield packing.instructions, self.packed_as[packing.weights[0]], packing

    def _read(self, name: str, place: Place | Packing, n_tokens: int) -> NDArray[np.float32]:
        if isinstance(place, Packing):
            return unpacked(self.program, place, n_tokens).copy()
        start = place.address
        room = next(b for b in self.program.buffers if 0 <= start - b.ctypes.data < b.nbytes)
        rows = room[start - room.ctypes.data :].view(np.float32)
        stride = place.stride // 4
        return np.stack([rows[t * stride :][: self.widths[name]] for t in range(n_tokens)])
