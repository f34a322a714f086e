"""Decoding in torch with half-precision weights: what speeds are compared with on CUDA.

One step of a decoder of a given shape with random weights, products and attention as torch offers
them, captured as a CUDA graph so that torch's own launches cost nothing. What the weights say does
not matter; logits are looked at by nobody.
"""

from typing import Any

import torch
import torch.nn.functional as F

from edgellama.config import ModelConfig


class Step:
    """One token after `past` others; call it again for the next."""

    def __init__(self, config: ModelConfig, device: str, dtype: torch.dtype, past: int) -> None:
        self.config, c = config, config
        options: dict[str, Any] = {"device": device, "dtype": dtype}

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, **options).mul_(columns**-0.5)

        self.layers = [
            {
                "qkv": matrix(c.q_dim + 2 * c.kv_dim, c.dim),
                "out": matrix(c.dim, c.q_dim),
                "gate_up": matrix(2 * c.ffn_dim, c.dim),
                "down": matrix(c.dim, c.ffn_dim),
                "keys": torch.zeros(1, c.n_kv_heads, past + 1, c.head_dim, **options),
                "values": torch.zeros(1, c.n_kv_heads, past + 1, c.head_dim, **options),
            }
            for _ in range(c.n_layers)
        ]
        self.embedding = matrix(c.vocab_size, c.dim)
        self.head = self.embedding if c.tied_output else matrix(c.vocab_size, c.dim)
        self.ones = torch.ones(c.dim, **options)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.cos = torch.ones(c.head_dim, **options)
        self.sin = torch.zeros(c.head_dim, **options)
        self.past = past

    @property
    def weight_bytes(self) -> int:
        """Read for one token."""
        names = ("qkv", "out", "gate_up", "down")
        n_bytes = sum(layer[name].nbytes for layer in self.layers for name in names)
        return n_bytes + self.head.nbytes

    @torch.no_grad()
    def __call__(self) -> None:
        c = self.config
        x = self.embedding[self.token]
        for layer in self.layers:
            h = F.rms_norm(x, (c.dim,), self.ones, c.norm_eps)
            qkv = F.linear(h, layer["qkv"]).view(1, -1, 1, c.head_dim)
            q, k, v = qkv.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], 1)
            layer["keys"][:, :, self.past :] = self.turned(k)
            layer["values"][:, :, self.past :] = v
            mixed = F.scaled_dot_product_attention(
                self.turned(q), layer["keys"], layer["values"], enable_gqa=c.n_heads > c.n_kv_heads
            )
            x = x + F.linear(mixed.reshape(1, -1), layer["out"])
            h = F.rms_norm(x, (c.dim,), self.ones, c.norm_eps)
            gate, up = F.linear(h, layer["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        x = F.rms_norm(x, (c.dim,), self.ones, c.norm_eps)
        self.token.copy_(F.linear(x, self.head).argmax(-1))

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin


def captured(step: Step) -> torch.cuda.CUDAGraph:
    """The step as a graph; `replay()` is one token."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
