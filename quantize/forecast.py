"""What a source's own weights answer to a few prompts, computed while they stream by.

The decoder graph in float32, on the reference's operators, with weights as the source has them:
rotary embedding turns the pairs that the source's convention says, before any reordering of rows.
No more than one tensor's piece is held. Knows nothing about files or types of weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellama.graph import Graph, Node, decoder
from edgellama.quantize.source import Source
from edgellama.runtimes.reference import Array, ReferenceSession
from edgellama.weights import ROPE_FACTORS

PIECE = 1 << 22  # weights multiplied at a time: small products waste most of the time


@dataclass
class _Weights:
    """A model of which one norm's weight is known at a time; see `reference.Decoded`."""

    graph: Graph
    rope_factors: list[float] | None
    dtype: Any = np.float32
    weights: dict[str, Array] = field(default_factory=dict)


class HalfSplit(ReferenceSession):
    """Rotary embedding as Hugging Face lays rows out: dimension i turns with i + dim / 2."""

    def rope(self, node: Node, x: Array, positions: Array) -> Array:
        pairs = self.config.rope.dim // 2
        heads = x.reshape(len(x), -1, self.config.head_dim).copy()  # (t, heads, head_dim)
        turning = heads[..., : 2 * pairs]
        side_by_side = np.stack([turning[..., :pairs], turning[..., pairs:]], axis=-1)
        heads[..., : 2 * pairs] = side_by_side.reshape(turning.shape)
        turned = super().rope(node, heads.reshape(x.shape), positions).reshape(heads.shape)
        first, second = turned[..., 0 : 2 * pairs : 2], turned[..., 1 : 2 * pairs : 2]
        turned[..., : 2 * pairs] = np.concatenate([first, second], axis=-1)
        result: Array = turned.reshape(x.shape)
        return result


class Forecast:
    """Logits of the last token of each prompt. Weights are to come in the graph's order."""

    def __init__(self, source: Source, prompts: Sequence[Sequence[int]]) -> None:
        self._source, graph = source, decoder(source.config)
        factors = source.tensors.get(ROPE_FACTORS)
        self._model = _Weights(graph, factors.read().tolist() if factors else None)
        session = HalfSplit if source.rope_convention == "half" else ReferenceSession
        self._sessions = [session(self._model) for _ in prompts]
        ends = np.cumsum([len(ids) for ids in prompts])
        self._spans = [slice(end - len(ids), end) for ids, end in zip(prompts, ends, strict=True)]
        self._values: dict[str, Array] = {"tokens": np.concatenate(prompts).astype(np.int64)}
        self._values["rows"] = ends - 1
        self._nodes = list(graph.nodes)
        self._out: Array = np.zeros(0, np.float32)
        self._waiting: list[Array] = []  # rows of the linear node at hand
        self._last_use = {name: node.output for node in graph.nodes for name in node.inputs}

    def see(self, name: str, first: int, rows: Array) -> None:
        """The next rows of a tensor, in the source's order; what the graph does not use is left."""
        if name not in self._model.graph.weights:
            return
        node, n_rows = self._nodes[0], self._source.tensors[name].shape[0]
        assert node.weight == name, (node.weight, name)
        if first == 0:
            self._out = self._room(node, n_rows, rows)
        last = first + len(rows)
        if node.op == "linear":
            self._gather(node, rows, last)
        elif node.op == "embed":
            tokens = self._values["tokens"]
            here = (tokens >= first) & (tokens < last)
            self._out[here] = rows[tokens[here] - first]
        else:
            self._out[first:last] = rows
        if last == n_rows:
            self._finish(node)

    def _gather(self, node: Node, rows: Array, last: int) -> None:
        """Multiply, once enough rows are there."""
        self._waiting.append(rows)
        n_rows = sum(map(len, self._waiting))
        if n_rows * rows.shape[1] >= PIECE or last == self._out.shape[1]:
            together = np.concatenate(self._waiting) if len(self._waiting) > 1 else rows
            self._out[:, last - n_rows : last] = self._values[node.inputs[0]] @ together.T
            self._waiting = []

    def logits(self) -> NDArray[np.float32]:
        """(prompts, vocab_size), once all weights were seen; a tied head is read again."""
        while self._nodes:
            name = self._nodes[0].weight
            assert name is not None
            tensor = self._source.tensors[name]
            count = max(1, PIECE // tensor.shape[1])
            for first in range(0, tensor.shape[0], count):
                self.see(name, first, tensor.read(first, min(first + count, tensor.shape[0])))
        return self._values["output"]

    def _room(self, node: Node, n_rows: int, rows: Array) -> Array:
        """Where a node's result, or a norm's weight, is gathered."""
        if node.op == "norm":
            return np.empty(n_rows, np.float32)
        wide = n_rows if node.op == "linear" else rows.shape[1]
        return np.zeros((len(self._values[node.inputs[0]]), wide), np.float32)

    def _finish(self, node: Node) -> None:
        if node.op == "norm":
            assert node.weight is not None
            self._model.weights = {node.weight: self._out}
            self._out = self._sessions[0].norm(node, self._values[node.inputs[0]])
        self._keep(node, self._out)
        while self._nodes and self._nodes[0].weight is None:
            self._keep(self._nodes[0], self._run(self._nodes[0]))

    def _run(self, node: Node) -> Array:
        inputs = [self._values[name] for name in node.inputs if name != "positions"]
        if node.op not in ("rope", "attention"):
            result: Array = getattr(self._sessions[0], node.op)(node, *inputs)
            return result
        parts = []
        for session, span in zip(self._sessions, self._spans, strict=True):
            own = [x[span] for x in inputs]
            more = [np.arange(len(own[0]))] if node.op == "rope" else []
            parts.append(getattr(session, node.op)(node, *own, *more))
        return np.concatenate(parts)

    def _keep(self, node: Node, value: Array) -> None:
        """Note a node's result; forget what nothing reads any more."""
        self._nodes.pop(0)
        self._values[node.output] = value
        for name in node.inputs:
            if self._last_use[name] == node.output and name != "positions":
                del self._values[name]
