"""Single operators of ONNX Runtime against float64: MatMulNBits and GroupQueryAttention.

What is compared with is worked out here in NumPy, in float64, from the very operands in the
operator's own dtype, so a difference is the operator's arithmetic alone.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from gpu import provider
from gpu.parts import Given, Task

MICROSOFT = "com.microsoft"
TOKENS = (1, 2, 16, 17, 64)  # both sides of where CUDA changes kernels
SIZES = ((576, 1536), (2048, 2048))  # k, n
BOUNDS = {"float32": 1e-11, "float16": 1e-5, "level 4": 3e-4}  # NMSE


@dataclass(frozen=True)
class Product:
    """x (m, k) times quantized weights (n, k)."""

    bits: int
    m: int
    k: int
    n: int
    dtype: str = "float16"
    level: int = 0  # accuracy_level; 4: the CPU rounds activations to 8 bits
    fpa: bool = False  # CUDA's other kernels for symmetric blocks of 32


@dataclass(frozen=True)
class Attention:
    """`new` tokens after `past`, in a cache shared by past and present."""

    heads: int
    kv_heads: int
    head_dim: int
    past: int
    new: int
    dtype: str = "float16"
    pinned: bool = False  # total_sequence_length says the cache's size, not the tokens'
    size: int = 256  # of the cache


OPS = {Product: "MatMulNBits", Attention: "GroupQueryAttention"}


def cases(device: str, quick: bool = False) -> list[Product | Attention]:
    """All that are run on a device."""
    found: list[Product | Attention] = []
    for k, n in SIZES[: 1 if quick else None]:
        for bits in (4, 8):
            for m in TOKENS:
                found += _products(device, bits, m, k, n)
    dtypes = ("float16",) if device == "cuda" else ("float32", "float16")
    shapes = [(4, 4, 32), (9, 3, 64), (32, 8, 128)]
    for heads, kv_heads, head_dim in shapes[: 2 if quick else None]:
        for dtype in dtypes:
            for past, new, pinned in (
                (0, 17, False),
                (40, 1, False),
                (40, 1, True),
                (64, 16, True),
            ):
                found.append(Attention(heads, kv_heads, head_dim, past, new, dtype, pinned))
    return found


def _products(device: str, bits: int, m: int, k: int, n: int) -> list[Product]:
    if device == "cpu":
        levels = [Product(bits, m, k, n, "float32", level) for level in (0, 4)]
        return [*levels, Product(bits, m, k, n, "float16")]
    return [Product(bits, m, k, n), Product(bits, m, k, n, fpa=True)]


def tasks(given: Given) -> Iterator[Task]:
    provider.require(given.device)
    for case in cases(given.device, given.quick):
        yield {"op": OPS[type(case)]} | asdict(case), partial(run, given.device, case)


def run(device: str, case: Product | Attention) -> dict[str, Any]:
    """How far a case is off, and whether that is within its bound."""
    result = product(device, case) if isinstance(case, Product) else attention(device, case)
    four = isinstance(case, Product) and case.level == 4
    bound = BOUNDS["level 4" if four else case.dtype]
    return result | {
        "bound": bound,
        "ok": max(result["nmse"], result.get("cache_nmse", 0)) <= bound,
    }


def compared(wanted: np.ndarray, got: np.ndarray) -> dict[str, float]:
    error = got.astype(np.float64) - wanted
    return {
        "nmse": float((error**2).sum() / (wanted**2).sum()),
        "max_error": float(np.abs(error).max() / np.sqrt((wanted**2).mean())),
    }


# --- MatMulNBits ---------------------------------------------------------------------------------


def product(device: str, case: Product) -> dict[str, float]:
    """Errors of one product; blocks of 32, symmetric, as GGUF's Q4_0 and Q8_0."""
    rng = np.random.default_rng([case.bits, case.m, case.k, case.n])
    dtype = np.dtype(case.dtype)
    codes = rng.integers(0, 2**case.bits, (case.n, case.k), np.uint8)
    scales = rng.uniform(0.5, 1.5, (case.n, case.k // 32)) / 2**case.bits / case.k**0.5
    scales, x = scales.astype(dtype), rng.standard_normal((case.m, case.k)).astype(dtype)
    weight = (codes.astype(np.float64) - 2 ** (case.bits - 1)).reshape(case.n, -1, 32)
    weight = (weight * scales.astype(np.float64)[..., None]).reshape(case.n, case.k)
    wanted = x.astype(np.float64) @ weight.T
    entries = {"ep__cuda__fpa_intb_gemm": "1"} if case.fpa else {}
    made = provider.session(_product_model(case, codes, scales), device, **entries)
    return compared(wanted, made.run(None, {"x": x})[0])


def _product_model(case: Product, codes: np.ndarray, scales: np.ndarray) -> bytes:
    from onnx import helper, numpy_helper

    low_first = codes if case.bits == 8 else codes[:, 0::2] | codes[:, 1::2] << 4
    packed = low_first.reshape(case.n, case.k // 32, -1)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain=MICROSOFT,
        K=case.k,
        N=case.n,
        bits=case.bits,
        block_size=32,
        accuracy_level=case.level,
    )
    stored = [
        numpy_helper.from_array(np.ascontiguousarray(packed), "codes"),
        numpy_helper.from_array(scales, "scales"),
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
    inputs = [helper.make_tensor_value_info("x", kind, ["m", case.k])]
    outputs = [helper.make_tensor_value_info("y", kind, ["m", case.n])]
    return _model(node, inputs, outputs, stored)


def _model(node: Any, inputs: list[Any], outputs: list[Any], stored: list[Any]) -> bytes:
    from onnx import helper

    graph = helper.make_graph([node], "one", inputs, outputs, stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


# --- GroupQueryAttention -------------------------------------------------------------------------


def attention(device: str, case: Attention) -> dict[str, float]:
    """Errors of attention with rotation inside, of its output and of the cache it leaves."""
    rng = np.random.default_rng([case.heads, case.head_dim, case.past, case.new])
    dtype, total = np.dtype(case.dtype), case.past + case.new
    q = rng.standard_normal((1, case.new, case.heads * case.head_dim)).astype(dtype)
    k, v = rng.standard_normal((2, 1, case.new, case.kv_heads * case.head_dim)).astype(dtype)
    cache = np.zeros((2, 1, case.kv_heads, case.size, case.head_dim), dtype)
    past = rng.standard_normal((2, 1, case.kv_heads, case.past, case.head_dim))
    cache[..., : case.past, :] = past.astype(dtype)
    angle = np.outer(np.arange(case.size), 1e4 ** (-np.arange(0, case.head_dim, 2) / case.head_dim))
    feeds = {"q": q, "k": k, "v": v, "past_k": cache[0], "past_v": cache[1]}
    feeds |= {"last": np.array([total - 1], np.int32)}
    feeds |= {"total": np.array(case.size if case.pinned else total, np.int32)}
    feeds |= {"cos": np.cos(angle).astype(dtype), "sin": np.sin(angle).astype(dtype)}
    got, keys = _run_attention(device, case, feeds)
    wanted, wanted_keys = attention64(case, feeds)
    found = compared(wanted, got)
    return found | {"cache_nmse": compared(wanted_keys, keys[0, :, :total])["nmse"]}


def _run_attention(
    device: str, case: Attention, feeds: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(output (new, heads * head_dim), keys): past and present are the same memory."""
    made = provider.session(_attention_model(case), device)
    values = {
        name: provider.bound(value, "cpu" if name == "total" else device)
        for name, value in feeds.items()
    }
    binding = made.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y", device)
    for name in ("k", "v"):
        binding.bind_ortvalue_output(f"present_{name}", values[f"past_{name}"])
    made.run_with_iobinding(binding)
    outputs = dict(zip(("y", "k", "v"), binding.copy_outputs_to_cpu(), strict=True))
    return outputs["y"][0], values["past_k"].numpy()


def attention64(case: Attention, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The same in float64: (new, heads * head_dim) and keys (kv_heads, total, head_dim)."""
    f = {name: np.asarray(value, np.float64) for name, value in feeds.items()}
    at = slice(case.past, case.past + case.new)

    def heads(name: str, turn: bool) -> np.ndarray:  # (heads, new, head_dim)
        x = f[name][0].reshape(case.new, -1, case.head_dim).transpose(1, 0, 2)
        if not turn:
            return x
        spun = (x[..., 0::2] + 1j * x[..., 1::2]) * (f["cos"][at] + 1j * f["sin"][at])
        return np.stack([spun.real, spun.imag], -1).reshape(x.shape)

    k = np.concatenate([f["past_k"][0, :, : case.past], heads("k", True)], 1)
    v = np.concatenate([f["past_v"][0, :, : case.past], heads("v", False)], 1)
    shared = case.heads // case.kv_heads
    scores = heads("q", True) @ np.repeat(k, shared, 0).transpose(0, 2, 1) / case.head_dim**0.5
    future = np.arange(case.past + case.new) > np.arange(at.start, at.stop)[:, None]
    scores = np.where(future, -np.inf, scores)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = scores / scores.sum(-1, keepdims=True) @ np.repeat(v, shared, 0)
    return mixed.transpose(1, 0, 2).reshape(case.new, -1), k


def _attention_model(case: Attention) -> bytes:
    from onnx import TensorProto, helper

    names = ("q", "k", "v", "past_k", "past_v", "last", "total", "cos", "sin")
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["y", "present_k", "present_v"],
        domain=MICROSOFT,
        num_heads=case.heads,
        kv_num_heads=case.kv_heads,
        do_rotary=1,
        rotary_interleaved=1,
    )
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
    kv, cache = case.kv_heads * case.head_dim, [1, case.kv_heads, case.size, case.head_dim]
    dims = {
        "q": [1, "t", case.heads * case.head_dim],
        **{"k": [1, "t", kv], "v": [1, "t", kv], "past_k": cache, "past_v": cache},
        **{"cos": [case.size, case.head_dim // 2], "sin": [case.size, case.head_dim // 2]},
        **{"y": [1, "t", case.heads * case.head_dim], "present_k": cache, "present_v": cache},
    }

    def value(name: str) -> Any:
        if name in dims:
            return helper.make_tensor_value_info(name, kind, dims[name])
        return helper.make_tensor_value_info(name, TensorProto.INT32, [1] * (name == "last"))

    outputs = [value(name) for name in ("y", "present_k", "present_v")]
    return _model(node, [value(name) for name in names], outputs, [])
