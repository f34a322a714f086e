"""What a model needs in memory, by purpose, before it is loaded: for a file, or for a shape alone.

The sizes of weights, caches and rooms are those that the runtimes work with. What no formula gives
(the interpreter, libraries, a tokenizer) was measured, on Linux with 64-bit processors, and stands
here as constants. Knows nothing about how a model is run.
"""

import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgellama.config import ModelConfig
from edgellama.errors import ParameterError, require_choice, require_integer
from edgellama.ggml import BY_NAME
from edgellama.gguf import open_gguf
from edgellama.graph import Graph, decoder
from edgellama.machine import available_memory, usable_cores
from edgellama.opening import chosen_runtime
from edgellama.paths import model_path
from edgellama.weights import check_tensors, expected_shapes, model_config

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgellama.runtimes.places import CacheShape, Matrix
    from edgellama.runtimes.program import Batch

KV_TYPES = ("f16", "f32", "q8_0")
FLOAT_KV = ("f16", "f32")
KV_ALLOWED = {  # by runtime, or by a device that wants its own: what `load` takes
    "cpu": KV_TYPES,
    "onnx": FLOAT_KV,
    "cuda": FLOAT_KV[:1],
    "reference": KV_TYPES,
    "llama.cpp": FLOAT_KV,
}
MB = 1_000_000
PROGRAM = {  # resident: the interpreter, the libraries that a runtime imports, machine code
    "cpu": 88 * MB,
    "onnx": 68 * MB,
    "reference": 38 * MB,
    "llama.cpp": 50 * MB,
}
ONNX_COPIES = 1.7  # ONNX Runtime packs weights anew, and gives part of the first copy back
CUDA_ON_HOST = 500 * MB  # what the CUDA libraries add to the process
CUDA_CONTEXT = 700 * MB  # and take of the GPU's memory for themselves
ONNX_CHUNK = 256  # tokens that ONNX Runtime is given at once
TOKEN = 180  # bytes of a token in the vocabulary and its indices
ROUGH = (
    "the sizes of ONNX Runtime's own rooms are not known before it runs: a rough estimate",
    "llama.cpp does not tell what it needs besides weights, keys and values",
    "attention of the reference runtime needs more at times",
)


@dataclass(frozen=True)
class Estimate:
    """Bytes by purpose, with every token of the context in use.

    `memory` is resident memory of the process: `weights`, `kv_cache` (of one session), `scratch`
    (the rooms of a program), `loading` (pieces on their way, which stay with the allocator),
    `tokenizer`, `program` (interpreter, libraries, machine code). `device_memory` is that of a
    GPU, empty without one.
    """

    runtime: str
    device: str
    threads: int
    context: int
    kv_type: str
    memory: dict[str, int]
    device_memory: dict[str, int] = field(default_factory=dict)
    available: int | None = None  # bytes that this machine could give now; None if unknown
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def device_total(self) -> int:
        return sum(self.device_memory.values())


@dataclass(frozen=True)
class _Case:
    """What is to be estimated: `types` are the GGUF types of all weights."""

    graph: Graph
    types: Mapping[str, str]
    context: int
    threads: int
    kv_type: str
    how: str = "exact"  # containers of an ONNX folder


def estimate(
    path: "str | os.PathLike[str]",
    *,
    context: int | None = None,
    runtime: str = "auto",
    device: str = "auto",
    kv_type: str = "f16",
    threads: int | None = None,
) -> Estimate:
    """What a model needs, from its header alone: a `.gguf` file, a folder for ONNX Runtime, or the
    name of a model already pulled.

    Arguments are those of `edgellama.load`; context None is the model's own. Nothing is refused
    for being too large. Raises what `load` raises for the file, and ParameterError.
    """
    chosen = model_path(os.fspath(path))
    if chosen.is_dir():
        require_choice("runtime", runtime, ("auto", "onnx"))
        config, types, how = _folder(chosen)
        runtime = "onnx"
    else:
        with open_gguf(chosen) as file:
            config, how = model_config(file), ""
            check_tensors(file, config)
            types = {name: file.tensors[name].type.name for name in expected_shapes(config)}
    return estimate_shape(
        config,
        types,
        context=context,
        runtime=runtime,
        device=device,
        kv_type=kv_type,
        threads=threads,
        containers=how,
    )


def _folder(path: Path) -> tuple[ModelConfig, dict[str, str], str]:
    from edgellama.runtimes.onnx_folder import open_folder

    folder = open_folder(path, checksums=False)
    try:
        return folder.layout.graph.config, dict(folder.layout.types), folder.layout.how
    finally:
        folder.close()


def estimate_shape(
    config: ModelConfig,
    types: str | Mapping[str, str],
    *,
    context: int | None = None,
    runtime: str = "auto",
    device: str = "auto",
    kv_type: str = "f16",
    threads: int | None = None,
    containers: str = "",
) -> Estimate:
    """The same for a model that need not exist. types: one type for all matrices, or the type of
    every weight by name; vectors are F32. containers: how an ONNX folder keeps types that have a
    minimum, "exact" or "8-bit"; "" for what the device wants.
    """
    runtime = chosen_runtime(runtime, device)
    on_gpu = device == "cuda"
    tokens = config.context_length if context is None else context
    case = _Case(
        decoder(config),
        _types(config, types),
        require_integer("context", tokens, 1, config.context_length),
        usable_cores() if threads is None else require_integer("threads", threads, 1, 1024),
        require_choice("kv_type", kv_type, KV_ALLOWED["cuda" if on_gpu else runtime]),
        containers or ("8-bit" if on_gpu else "exact"),
    )
    found = _cuda(case) if on_gpu else _ON_CPU[runtime](case)
    always = {"tokenizer": config.vocab_size * TOKEN, "program": PROGRAM[runtime]}
    return Estimate(
        runtime,
        "cuda" if on_gpu else "cpu",
        case.threads,
        case.context,
        _kept(runtime, on_gpu, kv_type),
        ({"scratch": CUDA_ON_HOST} if on_gpu else found) | always,
        found if on_gpu else {},
        available_memory(),
        _notes(runtime),
    )


def _notes(runtime: str) -> list[str]:
    order = ("onnx", "llama.cpp", "reference")
    return [ROUGH[order.index(runtime)]] if runtime in order else []


def _kept(runtime: str, on_gpu: bool, kv_type: str) -> str:
    """How keys and values are really kept."""
    if runtime == "reference" or (runtime == "onnx" and not on_gpu):
        return "f32"
    return kv_type


def _types(config: ModelConfig, types: str | Mapping[str, str]) -> dict[str, str]:
    shapes = expected_shapes(config)
    if isinstance(types, str):
        require_choice("types", types, BY_NAME)
        types = {name: types for name, shape in shapes.items() if len(shape) > 1}
    found = {name: types.get(name, "F32") for name in shapes}
    for name, kind in found.items():
        if shapes[name][-1] % BY_NAME[kind].block:
            columns, block = shapes[name][-1], BY_NAME[kind].block
            problem = f"{name} has rows of {columns} columns; {kind} has blocks of {block}"
            raise ParameterError(problem, field="types", value=kind)
    return found


# --- runtimes ------------------------------------------------------------------------------------


def _cpu(case: _Case) -> dict[str, int]:
    """Weights as they are repacked; the rooms are those of programs lowered onto no weights."""
    from edgellama.runtimes import levels
    from edgellama.runtimes.abi import KV_TYPES as KINDS
    from edgellama.runtimes.cpu import batches_of
    from edgellama.runtimes.loading import PIECE
    from edgellama.runtimes.places import CacheShape
    from edgellama.runtimes.program import scratch_bytes

    c = case.graph.config
    cache = CacheShape(c.n_layers, c.n_kv_heads, c.head_dim, case.context, KINDS[case.kv_type])
    batches = batches_of(levels.choose()[0])
    weights, matrices, vectors = _repacked(case)
    angles = case.context * (c.rope.dim // 2) * 8
    private = case.threads * max(scratch_bytes(case.graph, batch) for batch in batches)
    rooms = [_rooms(case.graph, matrices, vectors, cache, batch) for batch in batches]
    return {
        "weights": weights,
        "kv_cache": cache.total_bytes,
        "scratch": angles + private + sum(rooms),
        "loading": min(weights, (2 * case.threads + 2) * PIECE),
    }


def _repacked(case: _Case) -> "tuple[int, dict[str, Matrix], dict[str, NDArray[np.float32]]]":
    """Bytes of all weights; where each matrix would lie; vectors, which share one room here."""
    import numpy as np

    from edgellama.runtimes import abi
    from edgellama.runtimes.cpu_weights import neighbours
    from edgellama.runtimes.places import Matrix
    from edgellama.runtimes.repack import padded, repacked_bytes

    shapes, at = expected_shapes(case.graph.config), 0
    matrices = {}
    for group in neighbours(case.graph):
        for name in group:
            rows, columns = shapes[name]
            matrices[name] = Matrix(case.types[name], rows, columns, at)
            at += repacked_bytes(case.types[name], rows, columns)
        at = padded(at, 64)
    widths = {name: padded(s[0], abi.BLOCK) for name, s in shapes.items() if len(s) == 1}
    vector = np.zeros(max(widths.values()), np.float32)
    return at + 4 * sum(widths.values()), matrices, dict.fromkeys(widths, vector)


def _rooms(
    graph: Graph,
    matrices: "dict[str, Matrix]",
    vectors: "dict[str, NDArray[np.float32]]",
    cache: "CacheShape",
    batch: "Batch",
) -> int:
    """Of a program's memory, what is touched where one token's logits are wanted."""
    from edgellama.runtimes.program import lower

    program = lower(graph, matrices, vectors, defaultdict(int), cache, batch)
    return program.scratch_bytes - program.logits.nbytes * (batch.tokens - 1) // batch.tokens


def _onnx(case: _Case) -> dict[str, int]:
    sizes = _in_onnx(case, item=4)
    return sizes | {"weights": int(ONNX_COPIES * sizes["weights"])}


def _cuda(case: _Case) -> dict[str, int]:
    return _in_onnx(case, item=2) | {"context": CUDA_CONTEXT}


def _in_onnx(case: _Case, item: int) -> dict[str, int]:
    """item: bytes of a number in the cache and between operators."""
    from edgellama.runtimes.onnx_layout import Layout
    from edgellama.runtimes.onnx_lowering import cache_width

    c = case.graph.config
    a_token = 2 * (c.dim + c.q_dim) + 3 * c.ffn_dim
    return {
        "weights": Layout(case.graph, case.types, case.how).size,
        "kv_cache": 2 * c.n_layers * c.n_kv_heads * cache_width(c) * item * case.context,
        "scratch": ONNX_CHUNK * a_token * item,
    }


def _reference(case: _Case) -> dict[str, int]:
    c = case.graph.config
    scores = 64 * c.n_heads * case.context * 4 * 3  # of a chunk of tokens; as exponents; normed
    return {
        "weights": c.n_parameters * 4,
        "kv_cache": 2 * c.n_layers * c.kv_dim * 4 * case.context,
        "scratch": scores,
    }


def _llamacpp(case: _Case) -> dict[str, int]:
    c, shapes = case.graph.config, expected_shapes(case.graph.config)
    kinds = {name: BY_NAME[case.types[name]] for name in shapes}
    weights = sum(math.prod(s) // kinds[n].block * kinds[n].size for n, s in shapes.items())
    numbers = 2 * c.n_layers * c.kv_dim * case.context
    item = {"f32": 4.0, "q8_0": 34 / 32}.get(case.kv_type, 2.0)
    return {"weights": weights, "kv_cache": int(numbers * item), "scratch": 0}


_ON_CPU = {"cpu": _cpu, "onnx": _onnx, "reference": _reference, "llama.cpp": _llamacpp}
