"""A model file's tensors against its config: the check that keeps kernels inside their buffers.

Every name and shape a runtime may touch follows from the config; a file that disagrees is refused
here, before a kernel sees it. Knows nothing about how weights are stored in memory.
"""

import math
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from edgellama.config import ModelConfig, config_from_gguf
from edgellama.errors import (
    EdgeLlamaError,
    ModelConfigError,
    ModelFormatError,
    NonFiniteError,
    UnsupportedModelError,
    shown,
)
from edgellama.ggml import FLOATS, HALVES, RUNNABLE
from edgellama.gguf import GGUF, TensorInfo
from edgellama.graph import decoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROPE_FACTORS = "rope_freqs.weight"
LISTED = 5  # names that a warning or an error lists at most

_BLOCK = re.compile(r"blk\.([^.]*)\.(.+)")
_MATTERS = re.compile(  # tensors of a block that change its output: none may be ignored
    r".*\.bias|.*\.scale|.*norm.*\.weight|ffn_.*(exps|shexp|inp).*|attn_qkv\..*"
)
_FILE_TYPES = {  # `general.file_type`, and the tensor type that such a file must contain
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    32: "BF16",
}


def _error(
    kind: type[EdgeLlamaError],
    file: GGUF,
    name: str,
    problem: str,
    *,
    field: str | None = None,
    value: object = None,
    allowed: str | None = None,
    hint: str | None = None,
) -> EdgeLlamaError:
    return kind(
        problem,
        path=file.path,
        where=f"tensor {shown(name)}",
        field=field,
        value=value,
        allowed=allowed,
        hint=hint,
    )


def model_config(file: GGUF) -> ModelConfig:
    """The config of an open model; a file without `output.weight` shares the embedding's.

    Raises what `config_from_gguf` raises, and ModelFormatError without a `token_embd.weight`.
    """
    embedding = file.tensors.get("token_embd.weight")
    tied = "output.weight" not in file.tensors
    rows = embedding.shape[0] if embedding and len(embedding.shape) == 2 else None
    config = config_from_gguf(file.metadata, vocab_rows=rows, tied_output=tied, path=file.path)
    if embedding is None:
        problem = f"the tensor is missing; expected shape {[config.vocab_size, config.dim]}"
        raise _error(ModelFormatError, file, "token_embd.weight", problem)
    return config


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight that the decoder's graph reads, slowest dimension first."""
    c = config
    linears = {
        "attn_q": (c.q_dim, c.dim),
        "attn_k": (c.kv_dim, c.dim),
        "attn_v": (c.kv_dim, c.dim),
        "attn_output": (c.dim, c.q_dim),
        "ffn_gate": (c.ffn_dim, c.dim),
        "ffn_up": (c.ffn_dim, c.dim),
        "ffn_down": (c.dim, c.ffn_dim),
        "token_embd": (c.vocab_size, c.dim),
        "output": (c.vocab_size, c.dim),
    }
    norm = (c.dim,)
    return {name: linears.get(name.split(".")[-2], norm) for name in decoder(c).weights}


def check_tensors(file: GGUF, config: ModelConfig) -> list[str]:
    """Compare the file's tensors with the config; returns warnings.

    Raises ModelConfigError if shapes or the number of blocks disagree, ModelFormatError if a
    tensor is missing or misnamed, UnsupportedModelError for a type or a tensor that edgellama
    does not run.
    """
    expected = expected_shapes(config)
    _check_blocks(file, config)
    unknown = [name for name in file.tensors if name not in expected and name != ROPE_FACTORS]
    for name in unknown:
        _refuse_if_it_matters(file, name)
    for name, shape in expected.items():
        _check_tensor(file, name, shape)
    warnings = _file_type_warning(file)
    if unknown:
        more = ", ..." if len(unknown) > LISTED else ""
        names = ", ".join(shown(name) for name in unknown[:LISTED])
        warnings.append(f"{len(unknown)} unknown tensors are ignored: {names}{more}")
    return warnings


def _check_blocks(file: GGUF, config: ModelConfig) -> None:
    """Block numbers in names are canonical decimals, and run from 0 to n_layers - 1."""
    found = set()
    for name in file.tensors:
        match = _BLOCK.match(name)
        if match is None:
            continue
        number = match[1]
        if not re.fullmatch(r"0|[1-9][0-9]{0,8}", number):
            problem = f"{shown(number)} is not a block's number"
            allowed = f"a decimal number, 0..{config.n_layers - 1}"
            raise _error(
                ModelFormatError, file, name, problem, field="name", value=number, allowed=allowed
            )
        found.add(int(number))
    if found != set(range(config.n_layers)):
        key = "llama.block_count"
        raise ModelConfigError(
            f"block_count = {config.n_layers}, but {_listed(found)} in the file",
            path=file.path,
            where=f"key '{key}'",
            field=key,
            value=config.n_layers,
            allowed=str(len(found)),
        )


def _listed(blocks: set[int]) -> str:
    if not blocks:
        return "no blocks are"
    first, last = min(blocks), max(blocks)
    if len(blocks) == last - first + 1:
        return f"blocks {first}..{last} are"
    gap = next(i for i in range(first, last) if i not in blocks)
    return f"{len(blocks)} of the blocks {first}..{last}, without block {gap}, are"


def _refuse_if_it_matters(file: GGUF, name: str) -> None:
    """Ignoring a bias, a further norm or an expert would give wrong answers without a word."""
    match = _BLOCK.match(name)
    outer = name in ("output.bias", "output_norm.bias", "token_embd_norm.weight")
    if outer or (match and _MATTERS.fullmatch(match[2])):
        problem = "the tensor is not part of a dense LLaMA decoder"
        hint = "Biases, extra norms, fused projections and experts are not supported"
        raise _error(UnsupportedModelError, file, name, problem, field="name", hint=hint)


def _check_tensor(file: GGUF, name: str, shape: tuple[int, ...]) -> None:
    info = file.tensors.get(name)
    if info is None:
        problem = f"the tensor is missing; expected shape {list(shape)}"
        raise _error(ModelFormatError, file, name, problem, field="name", allowed=str(list(shape)))
    if info.shape != shape:
        problem = f"shape {list(info.shape)}; the config implies {list(shape)}"
        raise _error(
            ModelConfigError,
            file,
            name,
            problem,
            field="shape",
            value=info.shape,
            allowed=str(list(shape)),
        )
    types = FLOATS if len(shape) == 1 else RUNNABLE
    if info.type.name not in types:
        problem = f"type {info.type.name} is not supported here; supported: {', '.join(types)}"
        raise _error(
            UnsupportedModelError,
            file,
            name,
            problem,
            field="type",
            value=info.type.name,
            allowed=", ".join(types),
            hint="Quantize the original checkpoint to one of these",
        )


def _file_type_warning(file: GGUF) -> list[str]:
    declared = file.metadata.get("general.file_type")
    name = _FILE_TYPES.get(declared) if isinstance(declared, int) else None
    if name is None or any(info.type.name == name for info in file.tensors.values()):
        return []
    return [f"general.file_type says {name}, but no tensor is of that type; the tensors count"]


def rope_factors(file: GGUF, config: ModelConfig) -> list[float] | None:
    """The divisors of Llama 3.1's rope scaling, (rope.dim / 2,), or None if the file has none.

    Raises ModelFormatError if they are of another length or type, or not finite and above 0.
    """
    info = file.tensors.get(ROPE_FACTORS)
    if info is None:
        return None
    shape = (config.rope.dim // 2,)
    if info.shape != shape or info.type.name != "F32":
        found, allowed = f"{info.type.name} {list(info.shape)}", f"F32 {list(shape)}"
        problem = f"{found}; the config implies {allowed}"
        raise _error(
            ModelFormatError,
            file,
            ROPE_FACTORS,
            problem,
            field="shape",
            value=found,
            allowed=allowed,
        )
    raw = bytearray(info.n_bytes)
    file.read_into(ROPE_FACTORS, raw)
    factors = list(struct.unpack(f"<{shape[0]}f", raw))
    for i, factor in enumerate(factors):
        if not (math.isfinite(factor) and factor > 0.0):
            problem = f"element {i} is {factor}; expected a finite number above 0"
            raise _error(ModelFormatError, file, ROPE_FACTORS, problem, value=factor)
    return factors


def check_finite(
    info: TensorInfo,
    raw: "NDArray[np.uint8]",
    first_block: int = 0,
    path: str | Path | None = None,
) -> bool:
    """Refuse NaN and infinity in a chunk of a tensor's bytes; True if the chunk is all zeros.

    `raw` holds whole blocks, the first being number `first_block` of the tensor. Looks at the
    bits, of quantized types only at the scales: a small part of the bytes. Raises NonFiniteError
    naming the tensor, the first such block and how many values are not finite.
    """
    import numpy as np

    name = info.type.name
    if name in FLOATS:
        bits = raw.reshape(-1, info.type.size).view("<u4" if name == "F32" else "<u2")  # (n, 1)
    else:
        halves = raw.reshape(-1, info.type.size).view("<u2")
        bits = halves[:, [at // 2 for at in HALVES[name]]]  # (n, scales a block)
    infinity = {"F32": 0x7F80_0000, "BF16": 0x7F80}.get(name, 0x7C00)  # NaNs lie above it
    magnitude = bits & (0x7FFF_FFFF if name == "F32" else 0x7FFF)
    if (largest := magnitude.max(initial=0)) < infinity:
        return bool(largest == 0)
    wrong = magnitude >= infinity  # (n, values a block)
    block = first_block + int(np.argmax(wrong.any(axis=1)))
    raise _not_finite(info, block, int(np.count_nonzero(wrong)), path)


def _not_finite(
    info: TensorInfo, block: int, count: int, path: str | Path | None
) -> NonFiniteError:
    what = "value" if info.type.name in FLOATS else "scale"
    return NonFiniteError(
        f"block {block}: a {what} is NaN or infinite; {count} such {what}s in this part",
        path=path,
        where=f"tensor {shown(info.name)}",
        field=what,
        value=count,
        allowed="finite numbers",
        hint="The file is damaged, or the conversion overflowed",
    )
