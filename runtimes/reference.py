"""The decoder graph in plain NumPy: slow, obvious, and what every other runtime is compared with.

One method per operator. Weights are decoded to the runtime's dtype, and the key/value cache keeps
that dtype whatever `kv_type` says: an oracle rounds nothing. Knows nothing about layers or files.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgellama import rope
from edgellama.control import CancelToken
from edgellama.errors import ParameterError, require_choice
from edgellama.fingerprint import fingerprint
from edgellama.gguf import GGUF
from edgellama.graph import Graph, Node
from edgellama.runtimes.base import Options
from edgellama.runtimes.loading import Loader
from edgellama.weights import rope_factors

Array = NDArray[Any]
DTYPES = {"float32": np.float32, "float64": np.float64}
CHUNK = 64  # tokens computed at once: bounds the scores' (heads, tokens, positions)


class Reference:
    """One model's weights, decoded."""

    def __init__(self, file: GGUF, graph: Graph, options: Options) -> None:
        name = require_choice("dtype", options.dtype or "float32", DTYPES)
        self.graph, self.options = graph, options
        self.dtype: Any = DTYPES[name]
        total = sum(file.tensors[weight].n_bytes for weight in graph.weights)
        loader = Loader(file, options, total)
        self.weights = {w: loader.array(w).astype(self.dtype, copy=False) for w in graph.weights}
        self.warnings = loader.warnings
        self.fingerprint = fingerprint(file, graph)
        self.rope_factors = rope_factors(file, graph.config)

    def session(self) -> "ReferenceSession":
        return ReferenceSession(self)

    def describe(self) -> dict[str, Any]:
        dtype = np.dtype(self.dtype).name
        return {"runtime": "reference", "device": "cpu", "threads": 1, "dtype": dtype}

    def memory(self) -> dict[str, int]:
        c = self.graph.config
        per_token = 2 * c.n_layers * c.kv_dim * np.dtype(self.dtype).itemsize
        weights = sum(w.nbytes for w in self.weights.values())
        return {"weights": weights, "kv_cache": per_token * self.options.context, "scratch": 0}

    def close(self) -> None:
        self.weights = {}


class Decoded(Protocol):
    """What the operators ask of a model."""

    graph: Graph
    dtype: Any  # np.float32 or np.float64
    rope_factors: list[float] | None
    weights: dict[str, Array]


class ReferenceSession:
    """One conversation: keys and values by layer, each (positions, n_kv_heads, head_dim)."""

    def __init__(self, model: Decoded) -> None:
        self.model, self.config = model, model.graph.config
        self.position, self.stopped = 0, False
        empty = np.zeros((0, self.config.n_kv_heads, self.config.head_dim), model.dtype)
        self.cache = [(empty, empty) for _ in range(self.config.n_layers)]
        self.cache_kind = f"reference {np.dtype(model.dtype).name}"
        self.cache_origin = "NumPy"

    def forward(
        self, ids: Sequence[int], *, all_logits: bool = False, cancel: CancelToken | None = None
    ) -> NDArray[np.float32]:
        before = self.position
        rows = []
        try:
            for start in range(0, len(ids), CHUNK):
                if cancel:
                    cancel.check("forward")
                chunk = ids[start : start + CHUNK]
                wanted = range(len(chunk)) if all_logits else range(len(chunk) - 1, len(chunk))
                rows.append(self.run(chunk, list(wanted))["output"])
        except BaseException:
            self.truncate(before)
            raise
        if all_logits:
            return np.concatenate(rows).astype(np.float32)
        last: NDArray[np.float32] = rows[-1][-1].astype(np.float32)
        return last

    def run(self, ids: Sequence[int], rows: Sequence[int]) -> dict[str, Array]:
        """Execute the graph on some tokens; every value by its name."""
        n = len(ids)
        values: dict[str, Array] = {
            "tokens": np.asarray(ids, np.int64),
            "positions": np.arange(self.position, self.position + n),
            "rows": np.asarray(rows, np.int64),
        }
        for node in self.model.graph.nodes:
            operator: Callable[..., Array] = getattr(self, node.op)
            values[node.output] = operator(node, *(values[name] for name in node.inputs))
        self.position += n
        return values

    def truncate(self, n: int) -> None:
        self.cache = [(keys[:n], values[:n]) for keys, values in self.cache]
        self.position = n

    def cache_bytes(self, n: int) -> int:
        item: int = np.dtype(self.model.dtype).itemsize
        return 2 * self.config.n_layers * n * self.config.kv_dim * item

    def export(self) -> Iterator[NDArray[np.uint8]]:
        for layer in self.cache:
            for array in layer:
                yield np.ascontiguousarray(array[: self.position]).reshape(-1).view(np.uint8)

    def adopt(self, n: int, fill: Callable[[NDArray[np.uint8]], None]) -> None:
        shape = (n, self.config.n_kv_heads, self.config.head_dim)
        for layer in range(self.config.n_layers):
            keys, values = (np.empty(shape, self.model.dtype) for _ in range(2))
            fill(keys.reshape(-1).view(np.uint8))
            fill(values.reshape(-1).view(np.uint8))
            self.cache[layer] = keys, values
        self.position = n

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self.cache = []

    # --- operators ------------------------------------------------------------------------------

    def weight(self, node: Node) -> Array:
        """Raises ParameterError once another thread has closed the session, or the model."""
        assert node.weight is not None
        weights = self.model.weights  # that is empty then
        if self.stopped or not weights:
            raise ParameterError(f"the {'session' if weights else 'model'} is closed")
        return weights[node.weight]

    def embed(self, node: Node, tokens: Array) -> Array:
        rows: Array = self.weight(node)[tokens]  # (t, dim)
        return rows

    def norm(self, node: Node, x: Array) -> Array:
        """Zhang and Sennrich 2019, arXiv:1910.07467."""
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        eps = self.model.dtype(self.config.norm_eps)
        normed: Array = x / np.sqrt(mean_square + eps) * self.weight(node)
        return normed

    def linear(self, node: Node, x: Array) -> Array:
        result: Array = x @ self.weight(node).T
        return result

    def rope(self, node: Node, x: Array, positions: Array) -> Array:
        """Su et al. 2021, arXiv:2104.09864; GGUF keeps LLaMA's pairs side by side: (2i, 2i + 1)."""
        start, stop = int(positions[0]), int(positions[-1]) + 1
        cos, sin = rope.angles(self.config.rope, start, stop, self.model.rope_factors)
        heads = x.reshape(len(x), -1, self.config.head_dim).copy()  # (t, heads, head_dim)
        turning = heads[..., : self.config.rope.dim]
        even, odd = turning[..., 0::2].copy(), turning[..., 1::2].copy()
        turning[..., 0::2] = even * cos[:, None] - odd * sin[:, None]
        turning[..., 1::2] = even * sin[:, None] + odd * cos[:, None]
        return heads.reshape(x.shape)

    def attention(self, node: Node, q: Array, k: Array, v: Array) -> Array:
        """Causal softmax(q k / sqrt(head_dim)) v, heads sharing keys in groups."""
        assert node.layer is not None
        c, n = self.config, len(q)
        keys, values = self._append(node.layer, k, v)  # (positions, n_kv_heads, head_dim)
        grouped = q.reshape(n, c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim)
        scores = np.einsum("tkgd,pkd->kgtp", grouped, keys) / self.model.dtype(c.head_dim**0.5)
        query, key = np.arange(self.position, self.position + n)[:, None], np.arange(len(keys))
        visible = key <= query
        if c.sliding_window is not None:
            visible &= key > query - c.sliding_window
        scores = np.where(visible, scores, -np.inf)
        grown = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = grown / grown.sum(axis=-1, keepdims=True)
        mixed: Array = np.einsum("kgtp,pkd->tkgd", weights, values)
        return mixed.reshape(n, c.q_dim)

    def _append(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        shape = (len(k), self.config.n_kv_heads, self.config.head_dim)
        keys, values = self.cache[layer]
        self.cache[layer] = (
            np.concatenate([keys[: self.position], k.reshape(shape)]),
            np.concatenate([values[: self.position], v.reshape(shape)]),
        )
        return self.cache[layer]

    def swiglu(self, node: Node, gate: Array, up: Array) -> Array:
        """Shazeer 2020, arXiv:2002.05202."""
        with np.errstate(over="ignore"):  # exp(-gate) = inf gives the right 0
            gated: Array = gate / (1 + np.exp(-gate)) * up
        return gated

    def add(self, node: Node, a: Array, b: Array) -> Array:
        return a + b

    def select(self, node: Node, x: Array, rows: Array) -> Array:
        chosen: Array = x[rows]
        return chosen
