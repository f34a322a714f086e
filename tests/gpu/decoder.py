"""A LLaMA decoder in plain torch, written apart from edgellama's runtimes: what goldens come from.

Weights are GGUF tensors decoded by `edgellama.quantize.blocks`; the file is read by the `gguf`
package, rope's frequencies are worked out here. A whole text at once, no cache; everything in
float32, angles in float64.
"""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from edgellama.quantize.blocks import decode


class Decoder:
    """A model's weights on a device; `logits` of a text."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.reader = gguf.GGUFReader(path)
        self.device = device
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.dim = self.key("embedding_length")
        self.layers = self.key("block_count")
        self.heads = self.key("attention.head_count")
        self.kv_heads = self.key("attention.head_count_kv", self.heads)
        self.head_dim = self.key("attention.key_length", self.dim // self.heads)
        self.eps = self.key("attention.layer_norm_rms_epsilon")
        self.weights = {name: self.weight(name) for name in self.tensors}

    def key(self, name: str, default: Any = None) -> Any:
        field = self.reader.fields.get(f"llama.{name}")
        return default if field is None else field.contents()

    def array(self, name: str) -> np.ndarray:
        """A tensor's values, float32, rows first."""
        tensor = self.tensors[name]
        shape = [int(n) for n in reversed(tensor.shape)]
        raw = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(int(np.prod(shape[:-1])), -1)
        return decode(tensor.tensor_type.name, raw).reshape(shape)

    def weight(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.array(name).copy()).to(self.device, torch.float32)

    @torch.no_grad()
    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 (tokens, vocab_size)."""
        cos, sin = self.rotation(len(ids))
        hidden = torch.ones(len(ids), len(ids), dtype=torch.bool, device=self.device).triu(1)
        x = self.weights["token_embd.weight"][torch.tensor(ids, device=self.device)]
        for layer in range(self.layers):
            w = {
                name: self.weights[f"blk.{layer}.{name}.weight"]
                for name in (
                    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
                    *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
                )
            }
            h = self.norm(x, w["attn_norm"])
            q = turned(self.by_head(h @ w["attn_q"].T), cos, sin)
            k = turned(self.by_head(h @ w["attn_k"].T), cos, sin)
            x = x + self.attention(q, k, self.by_head(h @ w["attn_v"].T), hidden) @ (
                w["attn_output"].T
            )
            h = self.norm(x, w["ffn_norm"])
            gate = h @ w["ffn_gate"].T
            x = x + (gate * torch.sigmoid(gate) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
        x = self.norm(x, self.weights["output_norm.weight"])
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        return (x @ head.T).cpu().numpy()

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * weight

    def by_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1, self.head_dim).transpose(0, 1)  # (heads, tokens, head_dim)

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        shared = self.heads // self.kv_heads
        k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        scores = (q @ k.transpose(1, 2) / math.sqrt(self.head_dim)).masked_fill(hidden, -math.inf)
        mixed = torch.softmax(scores, -1) @ v  # (heads, tokens, head_dim)
        return mixed.transpose(0, 1).reshape(len(hidden), -1)

    # --- rope -----------------------------------------------------------------------------------

    def rotation(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each (n, pairs)."""
        frequency, scale = self.frequencies()
        angle = np.outer(np.arange(n, dtype=np.float64), frequency)
        cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
        return (
            torch.from_numpy(cos).to(self.device, torch.float32),
            torch.from_numpy(sin).to(self.device, torch.float32),
        )

    def frequencies(self) -> tuple[np.ndarray, float]:
        """(radians per position of each pair, what cos and sin are multiplied by)."""
        dims = self.key("rope.dimension_count", self.head_dim)
        base = self.key("rope.freq_base", 10000.0)
        frequency = np.power(float(base), -np.arange(0, dims, 2, dtype=np.float64) / dims)
        if "rope_freqs.weight" in self.tensors:
            frequency = frequency / self.array("rope_freqs.weight").astype(np.float64)
        kind, factor = self.key("rope.scaling.type", "none"), self.key("rope.scaling.factor", 1.0)
        if kind == "linear":
            return frequency / factor, 1.0
        if kind == "yarn":
            return self.yarn(frequency, float(factor), dims, float(base))
        assert kind == "none", kind
        return frequency, 1.0

    def yarn(
        self, frequency: np.ndarray, factor: float, dims: int, base: float
    ) -> tuple[np.ndarray, float]:
        """arXiv:2309.00071, sections 3.2 and 3.4: slow pairs stretched, fast pairs kept."""
        assert self.key("rope.scaling.yarn_ext_factor", 1.0) == 1.0
        original = self.key("rope.scaling.original_context_length")
        edges = []
        for turns in (
            self.key("rope.scaling.yarn_beta_fast", 32.0),
            self.key("rope.scaling.yarn_beta_slow", 1.0),
        ):  # the pair that turns so often within the original context
            edges.append(dims * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base)))
        low, high = max(math.floor(edges[0]), 0), min(math.ceil(edges[1]), dims - 1)
        pair = np.arange(dims // 2, dtype=np.float64)
        slow = np.clip((pair - low) / max(high - low, 1e-3), 0, 1)
        scale = self.key("rope.scaling.attn_factor", 1.0) * (0.1 * math.log(factor) + 1.0)
        return frequency * (1 - slow) + frequency / factor * slow, scale


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(heads, tokens, head_dim) with its leading pairs (2i, 2i + 1) turned."""
    width = 2 * cos.shape[-1]
    pairs = torch.view_as_complex(x[..., :width].unflatten(-1, (-1, 2)).contiguous())
    spun = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    return torch.cat([spun, x[..., width:]], -1)
