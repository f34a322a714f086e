"""Products in bfloat16 tiles: the kernels for tile registers, and their plain twin.

Where a processor lacks the registers, `tile_unit.py` stands in for them.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checked import HERE, Arena, Array, arena, quantized, repacked, run
from tile_unit import missing, tile_registers
from tiny import tiny_config, write_tiny

import edgellama
from edgellama.config import Rope
from edgellama.distance import nmse
from edgellama.ggml import BY_NAME
from edgellama.quantize.blocks import decode
from edgellama.runtimes import abi, kernels_tiles, levels, repack
from edgellama.runtimes.compiler import object_code

KINDS = tuple(kernels_tiles.AFFINE)
BEST = HERE[0]
LEVELS = {"plain_tiles": BEST, "tiles": "amx"}  # by kernel
ERROR = 4e-7  # of the sum of |terms|: float32 additions


@pytest.fixture(params=LEVELS)
def how(request: pytest.FixtureRequest) -> Iterator[str]:
    """A kernel that can be run here."""
    if request.param == "tiles" and (why := missing()):
        pytest.skip(f"kernels for tile registers cannot run here: {why}")
    with tile_registers():
        yield request.param


def to_bf16(x: Array) -> Array:
    """A slow twin of rounding: float32 values that bfloat16 can hold."""
    words = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = words + 0x7FFF + (words >> 16 & 1) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, rounded.view(np.float32))


def records(memory: Arena, x: Array) -> Array:
    """Records (columns / 32, tokens padded to 32, 32 bfloat16) of (tokens, columns)."""
    tokens, columns = x.shape
    room = memory.new((columns // 32, repack.padded(tokens, abi.TILE), 32), np.uint16)
    words = to_bf16(x).view(np.uint32) >> 16
    room[:, :tokens] = words.reshape(tokens, -1, 32).transpose(1, 0, 2)
    return room


def product(
    memory: Arena, kernel: str, raw: Array, x: Array, cuts: list[int], add_to: Array | None = None
) -> Array:
    """x @ weight.T through `tiles:Q4_0`…: float32 (tokens, rows padded to 16)."""
    kind, tokens = kernel.partition(":")[2], len(x)
    wide = repack.padded(len(raw), abi.LANES)
    y = memory.new((tokens, wide), np.float32)
    if add_to is not None:
        y[...] = add_to
    columns = raw.shape[1] // BY_NAME[kind].size * BY_NAME[kind].block
    scratch = memory.new((2, kernels_tiles.TOTALS + columns // 32 * abi.PANEL))
    arguments = (repacked(memory, kind, raw), repack.column_blocks(kind, columns))
    arguments += (records(memory, x), y, wide * 4, int(add_to is not None), abi.N_TOKENS)
    state: dict[int, int | Array] = {abi.N_TOKENS: tokens, abi.SCRATCH: scratch}
    state[abi.SCRATCH_BYTES] = scratch.shape[1]
    groups = wide // abi.LANES
    level = LEVELS[kernel.partition(":")[0]]
    run(memory, level, kernel, (*arguments, groups), -(-groups // 2), state, cuts)
    return y


def data(kind: str, rows: int, blocks: int, tokens: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(rows + tokens)
    columns = blocks * max(32, BY_NAME[kind].block)
    raw = quantized(kind, rng.standard_normal((rows, columns), np.float32))
    return raw, rng.standard_normal((tokens, columns), np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_products_against_float64(kind: str, how: str) -> None:
    for rows, blocks, tokens in ((1, 1, 32), (16, 2, 33), (33, 1, 65), (70, 3, 40)):
        raw, x = data(kind, rows, blocks, tokens)
        w, x64 = to_bf16(decode(kind, raw)).astype(np.float64), to_bf16(x).astype(np.float64)
        # A weight may round the other way where code * scale + least is fused.
        slack = np.abs(x64) @ np.abs(decode(kind, raw) - w).T * 2**-6 + ERROR * (
            np.abs(x64) @ np.abs(w).T
        )
        with arena() as memory:
            y = product(memory, f"{how}:{kind}", raw, x, [])
        assert np.all(np.abs(y[:, :rows] - x64 @ w.T) <= slack)


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_gives_the_same_bits_and_sums_are_added(kind: str, how: str) -> None:
    raw, x = data(kind, 90, 2, 40)
    before = np.random.default_rng(1).standard_normal((40, 96)).astype(np.float32)
    with arena() as memory:
        whole = product(memory, f"{how}:{kind}", raw, x, [])
        parts = product(memory, f"{how}:{kind}", raw, x, [1, 2])
        added = product(memory, f"{how}:{kind}", raw, x, [], before)
    assert np.array_equal(whole, parts)
    assert np.array_equal(added, before + whole)


@pytest.mark.parametrize("level", HERE)
def test_rounding_to_bfloat16(level: str) -> None:
    """Packing rounds to nearest even; infinities and NaN survive."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, (3, 64), np.uint32).view(np.float32)
    x = np.where(np.abs(x) < 1e-37, np.float32(0), x)  # tile units take subnormals for zeros
    x[0, :6] = [np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38]
    x[1, 0] = np.array(0x7FFFFFFF, np.uint32).view(np.float32)
    with arena() as memory:
        rows = memory.copy(x)
        packed = memory.new((2, 32, 32), np.uint16)
        run(memory, level, "pack_rows", (rows, 256, 2, 0, 0, packed), 3, {abi.N_TOKENS: 3})
    wide = packed.astype(np.uint32) << 16
    got = np.ascontiguousarray(wide.transpose(1, 0, 2)[:3].reshape(3, 64)).view(np.float32)
    assert np.array_equal(got, to_bf16(x), equal_nan=True)


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_kernels_for_tile_registers_can_be_compiled(kind: str) -> None:
    """Whether or not this machine could run them."""
    code = object_code("f", kernels_tiles.tiles(kind), levels.LEVELS["amx"])
    tdpbf16ps = re.compile(rb"\xc4\xe2[\x42\x4a]\x5c")  # of tiles 4 or 5 with 6 or 7
    assert len(tdpbf16ps.findall(code)) >= 4


@pytest.fixture
def with_tiles(how: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Prefill takes this kernel."""
    level = replace(levels.LEVELS[LEVELS[how]], tiles=how)
    monkeypatch.setattr(levels, "choose", lambda: (level, "chosen by a test"))
    return how


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_prefill_through_tiles(kind: str, tmp_path: Path, with_tiles: str) -> None:
    """Closer to full precision than plain products, which `deterministic=True` keeps to."""
    config = tiny_config(
        dim=256, n_heads=4, head_dim=64, ffn_dim=512, rope=Rope(64), context_length=512
    )
    path = write_tiny(tmp_path / "tiny.gguf", config, kind)
    tokens = np.random.default_rng(0).integers(3, 60, 300).tolist()

    def logits(n: int = 300, **options: Any) -> Array:
        with edgellama.load(path, context=512, **options) as model:
            return model.session().forward(tokens[:n], all_logits=True)

    wanted, tiled, plain = logits(runtime="reference"), logits(), logits(deterministic=True)
    assert nmse(wanted, tiled) < 0.5 * nmse(wanted, plain) < 1e-3
    assert np.array_equal(tiled, logits(threads=1))  # the same call, the same bits
    assert np.array_equal(logits(31), plain[:31])  # too few tokens for tiles
    with edgellama.load(path, context=512) as model:
        assert nmse(wanted[-1:], model.session().forward(tokens)[None]) < 1e-3
