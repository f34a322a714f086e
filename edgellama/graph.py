"""The LLaMA decoder, written once, as data.

Every runtime executes the nodes that `decoder` lists: it implements the operators, never the
layers. A value carries the name that GGUF gives the tensor it comes from (`blk.3.attn_q`), so a
mismatch between two runtimes has an address.

Knows nothing about bits, devices, files or caches' storage.

Operators (`t` tokens of this call; widths come from the config):

| op          | inputs → output                                                              |
|-------------|------------------------------------------------------------------------------|
| `embed`     | tokens (t,) → (t, dim): rows of the weight                                   |
| `norm`      | (t, dim) → (t, dim): RMS norm times the weight                               |
| `linear`    | (t, k) → (t, n): x @ weight.T, weight (n, k)                                 |
| `rope`      | (t, heads * head_dim), positions (t,) → same: rotary position embedding      |
| `attention` | q, k, v → (t, n_heads * head_dim): appends k, v to the layer's cache, causal |
| `swiglu`    | gate, up (t, ffn_dim) → (t, ffn_dim): silu(gate) * up                        |
| `add`       | a, b → a + b                                                                 |
| `select`    | (t, dim) → (rows, dim): the rows whose logits were asked for                 |
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from edgellama.config import ModelConfig

Op = Literal["embed", "norm", "linear", "rope", "attention", "swiglu", "add", "select"]


@dataclass(frozen=True, slots=True)
class Node:
    """One operation: reads earlier values by name, gives its output a name of its own."""

    op: Op
    output: str
    inputs: tuple[str, ...]
    weight: str | None = None  # the tensor it reads from the model file
    layer: int | None = None  # whose key/value cache an attention node uses


@dataclass(frozen=True, slots=True)
class Graph:
    """The decoder of one model: its config and its nodes, in an order they can run in."""

    config: ModelConfig
    nodes: tuple[Node, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the tensors the graph reads, each once, in first-use order."""
        return tuple(dict.fromkeys(node.weight for node in self.nodes if node.weight))


def decoder(config: ModelConfig) -> Graph:
    """The graph of a LLaMA decoder: inputs `tokens`, `positions`, `rows`; output `output`.

    Source: Touvron et al. 2023 (arXiv:2302.13971), section 2.2; grouped-query attention as in
    Ainslie et al. 2023 (arXiv:2305.13245).
    """
    return Graph(config, tuple(_nodes(config)))


def _nodes(config: ModelConfig) -> Iterator[Node]:
    yield Node("embed", "token_embd", ("tokens",), "token_embd.weight")
    x = "token_embd"
    for layer in range(config.n_layers):
        yield from _block(f"blk.{layer}", layer, x)
        x = f"blk.{layer}.ffn_residual"
    yield Node("select", "selected", (x, "rows"))
    yield Node("norm", "output_norm", ("selected",), "output_norm.weight")
    head = "token_embd.weight" if config.tied_output else "output.weight"
    yield Node("linear", "output", ("output_norm",), head)


def _block(blk: str, layer: int, x: str) -> Iterator[Node]:
    def linear(name: str, source: str) -> Node:
        return Node("linear", f"{blk}.{name}", (f"{blk}.{source}",), f"{blk}.{name}.weight")

    def rope(name: str) -> Node:
        return Node("rope", f"{blk}.{name}.rope", (f"{blk}.{name}", "positions"))

    yield Node("norm", f"{blk}.attn_norm", (x,), f"{blk}.attn_norm.weight")
    yield linear("attn_q", "attn_norm")
    yield linear("attn_k", "attn_norm")
    yield linear("attn_v", "attn_norm")
    yield rope("attn_q")
    yield rope("attn_k")
    qkv = (f"{blk}.attn_q.rope", f"{blk}.attn_k.rope", f"{blk}.attn_v")
    yield Node("attention", f"{blk}.attn", qkv, layer=layer)
    yield linear("attn_output", "attn")
    yield Node("add", f"{blk}.attn_residual", (x, f"{blk}.attn_output"))

    yield Node("norm", f"{blk}.ffn_norm", (f"{blk}.attn_residual",), f"{blk}.ffn_norm.weight")
    yield linear("ffn_gate", "ffn_norm")
    yield linear("ffn_up", "ffn_norm")
    yield Node("swiglu", f"{blk}.ffn_swiglu", (f"{blk}.ffn_gate", f"{blk}.ffn_up"))
    yield linear("ffn_down", "ffn_swiglu")
    yield Node("add", f"{blk}.ffn_residual", (f"{blk}.attn_residual", f"{blk}.ffn_down"))
