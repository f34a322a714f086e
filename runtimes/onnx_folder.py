"""Opening an ONNX folder: nothing of it reaches ONNX Runtime before it is known to be ours.

The metadata's config and the manifest's types decide what the graph and the data file must be; the
graph is made anew and compared to the byte. Whatever differs is refused, by name where possible.
Knows nothing about how the graph is run.
"""

import hashlib
import hmac
import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgellama.config import MOST_VOCAB, ModelConfig, config_from_gguf
from edgellama.control import CancelToken, Progress
from edgellama.errors import (
    EdgeLlamaError,
    ModelConfigError,
    ModelFormatError,
    UnsafeModelError,
    UnsupportedModelError,
    shown,
)
from edgellama.folders import not_a_model
from edgellama.ggml import BY_NAME, FLOATS, RUNNABLE
from edgellama.gguf import GGUF, TensorInfo, open_gguf
from edgellama.graph import Graph, decoder
from edgellama.quantize.strict_json import parse_json, read_small
from edgellama.runtimes import onnx_containers as containers
from edgellama.runtimes.onnx_builder import DATA_FILE
from edgellama.runtimes.onnx_export import (
    FORMAT,
    MANIFEST,
    METADATA_FILE,
    MODEL_FILE,
    VERSION,
    sha256,
)
from edgellama.runtimes.onnx_inspect import explain
from edgellama.runtimes.onnx_layout import Layout
from edgellama.runtimes.onnx_lowering import Manner, lower
from edgellama.weights import ROPE_FACTORS, expected_shapes, rope_factors

LARGEST_MANIFEST = 16 << 20  # bytes
AGAIN = "Make it again: edgellama quantize CHECKPOINT OUTPUT.onnx --type Q4_0"
FILES = (MODEL_FILE, DATA_FILE, METADATA_FILE)


@dataclass(frozen=True)
class OnnxFolder:
    """A checked folder. `file` holds the metadata and declares the weights; it reads none."""

    path: Path
    file: GGUF
    layout: Layout
    rope_factors: list[float] | None
    notes: list[str]
    fingerprint: bytes  # 32 bytes that tell the model from others

    @property
    def graph(self) -> Graph:
        return self.layout.graph

    def close(self) -> None:
        self.file.close()


def open_folder(
    path: Path,
    *,
    checksums: bool = True,
    cancel: CancelToken | None = None,
    progress: Progress | None = None,
) -> OnnxFolder:
    """Check a folder and open its metadata.

    Raises UnsupportedModelError for what edgellama did not write or another release wrote,
    UnsafeModelError for links and for data outside the folder, ModelFormatError for a folder
    without an ONNX model, that or ModelConfigError for damage, Cancelled.
    """
    _refuse_foreign(path)
    manifest = _manifest(path)
    sizes = {name: _regular(path / name).st_size for name in FILES}
    file = open_gguf(path / METADATA_FILE)
    try:
        config = _config(file, manifest)
        graph = decoder(config)
        layout = Layout(graph, _types(manifest, config, path), manifest["containers"])
        _check_model(path, graph, layout, sizes)
        if checksums:
            _check_sums(path, manifest, cancel, progress)
        factors = rope_factors(file, config)
    except BaseException:
        file.close()
        raise
    file.path, file.n_bytes = path, sum(sizes.values())
    file.tensors |= _declared(layout)
    notes = [str(note) for note in manifest["notes"]]
    return OnnxFolder(path, file, layout, factors, notes, _fingerprint(file, config, manifest))


def _fingerprint(file: GGUF, config: ModelConfig, manifest: dict[str, Any]) -> bytes:
    tokens = file.metadata.get("tokenizer.ggml.tokens", ())
    told = (replace(config, name=""), tokens, manifest["files"][DATA_FILE]["sha256"])
    return hashlib.sha256(repr(told).encode(errors="surrogatepass")).digest()


def _refuse_foreign(path: Path) -> None:
    if path.is_dir() and (path / MANIFEST).exists():
        return
    if path.is_dir() and not any(path.glob("*.onnx")):
        raise not_a_model(path)
    problem = "an ONNX model that edgellama did not write cannot be run"
    hint = "Convert the original: edgellama quantize CHECKPOINT OUTPUT.onnx --type Q4_0"
    if not path.is_dir() and (path.parent / MANIFEST).exists():
        problem, hint = "is one file of an ONNX folder", f"Give the folder, {path.parent.name}"
    raise UnsupportedModelError(problem, path=path, hint=hint)


def _regular(path: Path) -> os.stat_result:
    """A file of the folder itself: no link to it or from it, no pipe, no device."""
    try:
        status = path.lstat()
    except FileNotFoundError as error:
        raise ModelFormatError("the file is missing", path=path, hint=AGAIN) from error
    except OSError as error:
        raise EdgeLlamaError(f"cannot open: {error.strerror or error}", path=path) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "no regular file"
        raise UnsafeModelError(f"is {kind}; a file of the folder itself is expected", path=path)
    if status.st_nlink > 1:
        problem = f"has {status.st_nlink} names: it may change under another one"
        raise UnsafeModelError(problem, path=path, hint="Copy the folder")
    return status


# --- the manifest --------------------------------------------------------------------------------


def _manifest(path: Path) -> dict[str, Any]:
    where = path / MANIFEST
    _regular(where)
    found = parse_json(read_small(where, LARGEST_MANIFEST), where)
    if found.get("format") != FORMAT:
        raise _field(where, "format", found.get("format"), FORMAT, UnsupportedModelError)
    if found.get("version") != VERSION:
        allowed = f"{VERSION}, which this release writes"
        raise _field(where, "version", found.get("version"), allowed, UnsupportedModelError)
    if found.get("containers") not in (containers.EXACT, containers.EIGHT_BIT):
        allowed = f"{containers.EXACT} or {containers.EIGHT_BIT}"
        raise _field(where, "containers", found.get("containers"), allowed)
    kinds = {"tied_output": bool, "vocab_size": int, "tensors": dict, "files": dict, "notes": list}
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise _field(where, name, found.get(name), kind.__name__)
    _check_files(where, found["files"])
    return found


def _check_files(where: Path, files: dict[str, Any]) -> None:
    if set(files) != set(FILES):
        raise _field(where, "files", ", ".join(map(shown, files)), ", ".join(FILES))
    for name, entry in files.items():
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise _field(where, f"files.{name}.sha256", digest, "64 hexadecimal digits")


def _field(
    path: Path,
    name: str,
    value: object,
    allowed: str,
    kind: type[EdgeLlamaError] = ModelFormatError,
) -> EdgeLlamaError:
    problem = f"{name} = {shown(value)}; expected {allowed}"
    return kind(problem, path=path, field=name, value=value, allowed=allowed, hint=AGAIN)


def _config(file: GGUF, manifest: dict[str, Any]) -> ModelConfig:
    if others := set(file.tensors) - {ROPE_FACTORS}:
        problem = f"holds the tensor {shown(min(others))}; only metadata belongs here"
        raise ModelFormatError(problem, path=file.path, hint=AGAIN)
    rows, tied = manifest["vocab_size"], manifest["tied_output"]
    if isinstance(rows, bool) or not 1 <= rows <= MOST_VOCAB:
        raise _field(file.path.parent / MANIFEST, "vocab_size", rows, f"1..{MOST_VOCAB}")
    return config_from_gguf(file.metadata, vocab_rows=rows, tied_output=tied, path=file.path)


def _types(manifest: dict[str, Any], config: ModelConfig, path: Path) -> dict[str, str]:
    """The type of every weight, each of which can have it."""
    types, shapes = manifest["tensors"], expected_shapes(config)
    where = path / MANIFEST
    if set(types) != set(shapes):
        name = min(set(types) ^ set(shapes))
        problem = f"tensor {shown(name)} is {'not in the model' if name in types else 'missing'}"
        raise ModelConfigError(problem, path=where, field="tensors", value=name, hint=AGAIN)
    for name, shape in shapes.items():
        kind = types[name]
        allowed = FLOATS if len(shape) == 1 else RUNNABLE
        if not isinstance(kind, str) or kind not in allowed or shape[-1] % BY_NAME[kind].block:
            raise _field(where, f"tensors.{name}", kind, f"one of {', '.join(allowed)} that fits")
    return {name: types[name] for name in shapes}


# --- the graph and the data ----------------------------------------------------------------------


def _check_model(path: Path, graph: Graph, layout: Layout, sizes: dict[str, int]) -> None:
    """The graph must be the one that this release makes; the data file as long as it says."""
    expected = lower(graph, layout, Manner())
    data = expected.to_bytes()
    most = 4 * len(data) + (1 << 20)
    found = read_small(path / MODEL_FILE, most)
    if found != data:
        raise explain(path / MODEL_FILE, found, expected, sizes[DATA_FILE])
    if sizes[DATA_FILE] != layout.size:
        problem = f"has {sizes[DATA_FILE]} bytes; its tensors take {layout.size}"
        raise ModelFormatError(
            problem,
            path=path / DATA_FILE,
            field="size",
            value=sizes[DATA_FILE],
            allowed=str(layout.size),
            hint=f"The copy may be incomplete. {AGAIN}",
        )


def _check_sums(
    path: Path,
    manifest: dict[str, Any],
    cancel: CancelToken | None,
    progress: Progress | None,
) -> None:
    for name in FILES:
        wanted = manifest["files"][name]["sha256"]
        if not hmac.compare_digest(sha256(path / name, cancel, progress), wanted):
            problem = "its SHA-256 is not the manifest's: damaged, or of another conversion"
            raise ModelFormatError(problem, path=path / name, field="sha256", hint=AGAIN)


def _declared(layout: Layout) -> dict[str, TensorInfo]:
    """The weights as a GGUF file would declare them; no part of a file holds them."""
    found = {}
    for name, shape in layout.shapes.items():
        kind = BY_NAME[layout.types[name]]
        n_bytes = shape[-1] // kind.block * kind.size
        for n in shape[:-1]:
            n_bytes *= n
        found[name] = TensorInfo(name, shape, kind, 0, n_bytes, -1)
    return found
