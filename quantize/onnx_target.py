"""A conversion whose output is a folder for ONNX Runtime: which types it can have, and its writing.

Knows nothing about how sources are read or what the folder's graph looks like.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.errors import ParameterError
from edgellama.graph import decoder
from edgellama.quantize.plan import FILE_TYPES, Plan, PlannedTensor
from edgellama.weights import ROPE_FACTORS

if TYPE_CHECKING:
    from edgellama.quantize.convert import Witness
    from edgellama.quantize.stream import Streamer
    from edgellama.runtimes.onnx_export import FolderWriter

SUFFIX = ".onnx"
TYPES = tuple(name for name in FILE_TYPES if "_K" not in name)
INSTEAD = "Q8_0"  # for K types in a mix: ONNX Runtime multiplies blocks of 32 in 8 bits quickly
KEPT = "as the source has it"


def is_onnx(output: Path) -> bool:
    return output.suffix.lower() == SUFFIX


def check_type(name: str) -> None:
    """Refuse targets that ONNX Runtime's operators do not hold. Raises ParameterError."""
    if name not in TYPES:
        allowed = ", ".join(TYPES)
        raise ParameterError(
            f"type = {name}: K types cannot be written for ONNX Runtime; allowed: {allowed}",
            field="type",
            value=name,
            allowed=allowed,
            hint="A .gguf file of that type runs with --runtime onnx",
        )


def fitted(plan: Plan) -> Plan:
    """The plan without K types: a head that the source has in 8 bits stays as it is."""
    return replace(plan, tensors=tuple(_fitted(tensor) for tensor in plan.tensors))


def _fitted(tensor: PlannedTensor) -> PlannedTensor:
    if "_K" not in tensor.type or tensor.type == tensor.source_type:
        return tensor
    if tensor.source_type == INSTEAD:
        return replace(tensor, type=INSTEAD, reason=KEPT, fallback=False)
    chosen = INSTEAD if tensor.shape[-1] % 32 == 0 else "F16"
    return replace(tensor, type=chosen, reason=tensor.reason.replace(tensor.type, chosen))


def write(
    output: Path,
    streamer: "Streamer",
    metadata: Mapping[str, Any],
    witness: "Witness | None",
) -> tuple[int, list[str]]:
    """Write the folder. Returns its size in bytes, and what to note about its weights."""
    from edgellama.runtimes.onnx_atomic import atomic_folder
    from edgellama.runtimes.onnx_export import FolderWriter

    source, planned = streamer.source, streamer.plan
    types = {t.name: t.type for t in planned.tensors if t.name != ROPE_FACTORS}
    with atomic_folder(output) as folder:
        with closing(FolderWriter(folder, decoder(source.config), types)) as writer:
            factors = _write_pieces(writer, streamer, witness)
            kept = dict(metadata)
            if witness:
                kept[witness.key] = witness.testify()
            writer.finish(kept, source.kinds, factors, streamer.cancel, type=planned.type)
        if streamer.cancel is not None:
            streamer.cancel.check("the conversion")  # the last moment at which nothing has changed
        size = sum(entry.stat().st_size for entry in folder.iterdir())
    return size, writer.notes


def _write_pieces(
    writer: "FolderWriter", streamer: "Streamer", witness: "Witness | None"
) -> list[float] | None:
    """Write all weights but the rope factors, which are metadata of a folder: they are returned."""
    factors: list[float] | None = None
    with closing(streamer.pieces()) as pieces:
        for piece in pieces:
            if piece.planned.name == ROPE_FACTORS:
                factors = piece.data.reshape(-1).view("<f4").tolist()
            else:
                writer.write(piece.planned.name, piece.first, piece.data)
            if witness:
                witness.see(piece)
    return factors
