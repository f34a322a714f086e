"""Where the cpu runtime's numbers lie in memory: weights, caches, and room for them.

Knows nothing about instructions or threads.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellama.runtimes import abi
from edgellama.runtimes.repack import LAYOUTS, padded


@dataclass(frozen=True)
class Matrix:
    """A repacked weight in memory."""

    type: str
    rows: int
    columns: int
    address: int

    @property
    def groups(self) -> int:
        return padded(self.rows, abi.LANES) // abi.LANES

    @property
    def integer(self) -> bool:
        return LAYOUTS[self.type].integer


@dataclass(frozen=True)
class Packing:
    """What goes into some products, there once so many instructions of a program have run.

    float32 (columns / 8, tokens, 8), columns padded with zeros to a multiple of 32.
    """

    instructions: int
    weights: tuple[str, ...]
    columns: int
    address: int


@dataclass(frozen=True)
class CacheShape:
    """How keys and values lie in a session's cache; see `kernels_cache.py`."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    context: int
    kind: int  # abi.KV_F32, KV_F16 or KV_Q8_0

    @property
    def name(self) -> str:
        """For saved sessions: to be changed when keys or values come to lie otherwise."""
        return "q8_0, 64 scales together" if self.kind == abi.KV_Q8_0 else self.kv_type

    @property
    def kv_type(self) -> str:
        return next(name for name, kind in abi.KV_TYPES.items() if kind == self.kind)

    @property
    def layer_bytes(self) -> int:
        """Of one layer in one block."""
        keys = abi.ATTENTION_BLOCK // abi.LANES * abi.key_bytes(self.kind, self.head_dim)
        values = abi.ATTENTION_BLOCK * abi.value_bytes(self.kind, self.head_dim)
        return padded(self.n_kv_heads * (keys + values), 64)

    @property
    def block_bytes(self) -> int:
        return self.n_layers * self.layer_bytes

    @property
    def total_bytes(self) -> int:
        return padded(self.context, abi.ATTENTION_BLOCK) // abi.ATTENTION_BLOCK * self.block_bytes

    def blank(self, block: NDArray[np.uint8], used: int) -> None:
        """Zero, in one block, the keys and values of all but its first `used` positions (0..64)."""
        size, lanes = abi.ATTENTION_BLOCK, abi.LANES
        middle = self.n_kv_heads * size // lanes * abi.key_bytes(self.kind, self.head_dim)
        end = middle + self.n_kv_heads * size * abi.value_bytes(self.kind, self.head_dim)
        layers = block.reshape(self.n_layers, self.layer_bytes)
        values = layers[:, middle:end].reshape(self.n_layers, self.n_kv_heads, -1)
        if self.kind == abi.KV_Q8_0:
            records = values.reshape(self.n_layers, self.n_kv_heads, -1, (abi.BLOCK + 2) * size)
            records[..., used * abi.BLOCK : size * abi.BLOCK] = 0
            records[..., size * abi.BLOCK + used * 2 :] = 0
        else:
            values.reshape(self.n_layers, self.n_kv_heads, size, -1)[:, :, used:] = 0
        groups = (self.n_layers, self.n_kv_heads, size // lanes)
        keys = layers[:, :middle].reshape(*groups, -1)
        if self.kind == abi.KV_Q8_0:
            records = keys.reshape(*groups, -1, (abi.BLOCK + 2) * lanes)
            codes = abi.BLOCK * lanes
            parts = [records[..., :codes].reshape(*groups, -1, abi.BLOCK, lanes, 1)]
            parts += [records[..., codes:].reshape(*groups, -1, 1, lanes, 2)]
        else:
            parts = [keys.reshape(*groups, 1, self.head_dim, lanes, -1)]
        for part in parts:  # (layers, heads, 4, records, columns, 16 positions, bytes)
            for position in range(used, size):
                part[:, :, position // lanes, :, :, position % lanes] = 0

    @property
    def most_splits(self) -> int:
        return -(-self.context // abi.ATTENTION_SPLIT)


def aligned(n_bytes: int) -> NDArray[np.uint8]:
    """Zeroed memory that begins on a cache line; pages are touched when first written."""
    room = np.zeros(n_bytes + 64, np.uint8)
    skip = -room.ctypes.data % 64
    return room[skip : skip + n_bytes]


def part_bytes(head_dim: int) -> int:
    """Of what attention sums up for one query; see `attention_block.soften`."""
    return padded(head_dim, abi.LANES) * 4 + 128


def attention_bytes(group: int, head_dim: int) -> int:
    """Of a thread's memory for attention, with `group` heads to a key head."""
    weights = 2 * abi.QUERIES * abi.ATTENTION_BLOCK * 4
    rows = abi.ATTENTION_TOKENS * group
    return weights + rows * (abi.ROW_BYTES + head_dim * 4 + part_bytes(head_dim))
