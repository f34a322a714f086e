"""A checkpoint as a source: its tensors under GGUF names, its configuration as GGUF metadata.

Knows nothing about the checkpoint's files; `checkpoint.py` opens them.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellama.config import ModelConfig, config_from_gguf
from edgellama.errors import ModelConfigError, ModelFormatError, shown
from edgellama.quantize.architectures import hf_metadata, hf_rope, is_tied
from edgellama.quantize.fields import spelled
from edgellama.quantize.meta_params import meta_metadata, meta_rope
from edgellama.quantize.names import gguf_names, listed, own_name
from edgellama.quantize.source import Source, SourceTensor
from edgellama.quantize.tensor import FLOATS, UNPACKED, Tensor, unsupported_type
from edgellama.weights import ROPE_FACTORS, expected_shapes

if TYPE_CHECKING:
    from edgellama.quantize.checkpoint import Checkpoint

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
COMPARED = 4 * 2**20  # elements of two tensors compared at a time

Tensors = dict[str, Tensor]  # by GGUF name


def open_checkpoint_source(path: Path) -> Source:
    """Open a Hugging Face or Meta folder; errors as `open_source`."""
    from edgellama.quantize.checkpoint import open_checkpoint
    from edgellama.quantize.vocabularies import tokenizer_metadata

    with ExitStack() as files:
        checkpoint = files.enter_context(open_checkpoint(path))
        folder = _folder(checkpoint)
        notes: list[str] = []
        source = checkpoint_source(
            checkpoint,
            lambda rows: tokenizer_metadata(folder, rows, notes),
        )
        source.notes += notes
        source.close = files.pop_all().close
        return source


def checkpoint_source(
    checkpoint: "Checkpoint", tokenizer: Callable[[int], Mapping[str, Any]]
) -> Source:
    """The source that an open checkpoint is; closing it is left to the caller.

    `tokenizer` gives the `tokenizer.*` keys for an embedding of so many rows. Raises
    ModelConfigError or UnsupportedModelError for the configuration, ModelFormatError for tensors
    that are missing, ModelConfigError for shapes that it does not imply.
    """
    notes = list(checkpoint.notes)
    names = gguf_names(checkpoint.tensors, checkpoint.kind, checkpoint.path)
    tensors = {ours: checkpoint.tensors[theirs] for ours, theirs in names.items()}
    if EMBEDDING not in tensors:
        raise _missing(checkpoint, [EMBEDDING])
    metadata, factors = _metadata(checkpoint, tensors, notes)
    tied = _settle_head(checkpoint, tensors, notes)
    rows = tensors[EMBEDDING].n_rows
    metadata |= tokenizer(rows)
    where = _config_path(checkpoint)
    config = config_from_gguf(metadata, vocab_rows=rows, tied_output=tied, path=where)
    ordered = _check_tensors(checkpoint, tensors, config)
    arranged = {name: _source_tensor(name, t, checkpoint, config) for name, t in ordered.items()}
    return Source(
        path=checkpoint.path,
        kind=checkpoint.kind,
        config=config,
        metadata=metadata,
        tensors=_rope_tensor(factors) | arranged,
        rope_convention="interleaved" if checkpoint.kind == "meta" else "half",
        notes=notes,
        close=lambda: None,
    )


def _folder(checkpoint: "Checkpoint") -> Path:
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def _config_path(checkpoint: "Checkpoint") -> Path:
    return _folder(checkpoint) / ("params.json" if checkpoint.kind == "meta" else "config.json")


def _metadata(
    checkpoint: "Checkpoint", tensors: Tensors, notes: list[str]
) -> tuple[dict[str, Any], list[float] | None]:
    """(general.* and llama.* keys, the divisors of `rope_freqs.weight` or None)."""
    folder, rows, config = _folder(checkpoint), tensors[EMBEDDING].n_rows, checkpoint.config
    if checkpoint.kind == "meta":
        metadata = meta_metadata(config, folder, notes, vocab_rows=rows)
        rope = meta_rope(config, folder)
    else:
        metadata = hf_metadata(config, folder, notes)
        rope = hf_rope(config, folder)
    if metadata["llama.vocab_size"] != rows:
        key, allowed = "vocab_size", f"{rows}, the rows of the embedding"
        found = spelled(metadata["llama.vocab_size"])
        raise ModelConfigError(
            f"vocab_size = {found}; expected {allowed}",
            path=_config_path(checkpoint),
            where=f"key '{key}'",
            field=key,
            value=metadata["llama.vocab_size"],
            allowed=allowed,
        )
    return metadata, rope.factors


def _settle_head(checkpoint: "Checkpoint", tensors: Tensors, notes: list[str]) -> bool:
    """Whether the head is the embedding; a copy of it is dropped from `tensors`."""
    meta = checkpoint.kind == "meta"
    said = not meta and is_tied(checkpoint.config, _folder(checkpoint))
    if HEAD not in tensors:
        if meta:
            notes.append("output.weight is missing: the embedding serves as the head")
        return said or meta
    if not (said or meta):
        return False
    if _same(tensors[EMBEDDING], tensors[HEAD]):
        del tensors[HEAD]
        notes.append("the head equals the embedding; it is stored once")
        return True
    if said:
        notes.append(
            "tie_word_embeddings is true, but lm_head.weight differs from the embedding: "
            "lm_head.weight is used"
        )
    return False


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values; stops at the first rows that differ."""
    if one.shape != other.shape or len(one.shape) != 2:
        return False
    step = max(1, COMPARED // max(one.shape[1], 1))
    for first in range(0, one.n_rows, step):
        last = min(first + step, one.n_rows)
        if not np.array_equal(one.read(first, last), other.read(first, last)):
            return False
    return True


def _check_tensors(checkpoint: "Checkpoint", tensors: Tensors, config: ModelConfig) -> Tensors:
    """The tensors in the order to write, each of the type and the shape that it must have."""
    expected = expected_shapes(config)
    if missing := [name for name in expected if name not in tensors]:
        raise _missing(checkpoint, missing)
    if surplus := [tensors[name].name for name in tensors if name not in expected]:
        problem = f"the config has {config.n_layers} layers; beyond them are {listed(surplus)}"
        raise _tensor_error(ModelConfigError, checkpoint, surplus[0], problem)
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            problem = f"shape {list(tensor.shape)}; the config implies {list(shape)}"
            raise _tensor_error(ModelConfigError, checkpoint, tensor.name, problem)
        if tensor.dtype not in FLOATS + UNPACKED:
            raise unsupported_type(tensor.name, tensor.dtype)
    return {name: tensors[name] for name in expected}


def _tensor_error(
    kind: type[ModelFormatError] | type[ModelConfigError],
    checkpoint: "Checkpoint",
    name: str,
    problem: str,
) -> ModelFormatError | ModelConfigError:
    return kind(problem, path=checkpoint.path, where=f"tensor {shown(name)}", field=name)


def _missing(checkpoint: "Checkpoint", names: list[str]) -> ModelFormatError | ModelConfigError:
    theirs = [own_name(name, checkpoint.kind) for name in names]
    problem = f"the checkpoint lacks {listed(theirs)}"
    return _tensor_error(ModelFormatError, checkpoint, theirs[0], problem)


def _source_tensor(
    name: str, tensor: Tensor, checkpoint: "Checkpoint", config: ModelConfig
) -> SourceTensor:
    part = name.split(".")[-2]
    turns = part in ("attn_q", "attn_k") and checkpoint.kind != "meta"
    return SourceTensor(
        name=name,
        shape=tensor.shape,
        type="F32" if tensor.dtype in UNPACKED else tensor.dtype,
        fetch=tensor.read,
        fetch_bits=tensor.read_bits,
        row_step=config.head_dim if turns else 1,
    )


def _rope_tensor(factors: list[float] | None) -> dict[str, SourceTensor]:
    if factors is None:
        return {}
    values = np.array(factors, np.float32)

    def part(first: int, last: int) -> Any:
        return values[first:last].copy()

    return {ROPE_FACTORS: SourceTensor(ROPE_FACTORS, values.shape, "F32", part, part)}
