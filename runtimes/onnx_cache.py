"""GGUF files as ONNX folders in the cache: transcoded once, found again while the file is the same.

Every tensor keeps its type; nothing is quantized anew. Knows nothing about how the graph is run.
"""

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

from edgellama.errors import EdgeLlamaError, OutputError
from edgellama.gguf import GGUF
from edgellama.graph import Graph
from edgellama.paths import cache_dir
from edgellama.quantize.strict_json import read_json
from edgellama.runtimes import onnx_containers as containers
from edgellama.runtimes.base import Options
from edgellama.runtimes.loading import Loader
from edgellama.runtimes.onnx_atomic import atomic_folder
from edgellama.runtimes.onnx_export import MANIFEST, VERSION, FolderWriter
from edgellama.runtimes.onnx_folder import OnnxFolder, open_folder
from edgellama.runtimes.onnx_layout import Layout
from edgellama.weights import rope_factors

TRANSCODING = "preparing the model for ONNX Runtime"


def transcoded(
    file: GGUF, graph: Graph, options: Options, how: str = containers.EXACT
) -> tuple[OnnxFolder, list[str]]:
    """The ONNX folder of an open GGUF file, and warnings about its weights.

    Made on the first call: `options` has the cancel token and the progress for that. Raises
    Cancelled, NonFiniteError, OutputError if the cache cannot hold it.
    """
    place, others = _place(file, how)
    try:
        return open_folder(place, checksums=False), []
    except (EdgeLlamaError, FileNotFoundError):
        shutil.rmtree(place, ignore_errors=True)  # there is none, or another release's
    layout = Layout(graph, {n: file.tensors[n].type.name for n in graph.weights}, how)
    _check_room(place, layout)
    warnings: list[str] = []
    with atomic_folder(place) as folder:
        warnings = _transcode(file, graph, options, folder, how)
    for other in others:
        if not _wanted(other, file.path.resolve(), how):
            shutil.rmtree(other, ignore_errors=True)
    return open_folder(place, checksums=False), warnings


def _transcode(file: GGUF, graph: Graph, options: Options, folder: Path, how: str) -> list[str]:
    types = {name: file.tensors[name].type.name for name in graph.weights}
    writer = FolderWriter(folder, graph, types, how)
    try:
        total = sum(file.tensors[name].n_bytes for name in types)
        loader = Loader(file, _named(options), total)
        for name in types:
            for first, raw in loader.pieces(name):
                writer.write(name, first, raw)
                loader.give_back(raw)
        factors = rope_factors(file, graph.config)
        source = os.fspath(file.path.resolve())
        writer.finish(file.metadata, file.kinds, factors, options.cancel, source=source)
    finally:
        writer.close()
    return loader.warnings


def _named(options: Options) -> Options:
    """The same options, progress saying what is going on."""
    told = options.progress
    if told is None:
        return options
    return replace(options, progress=lambda done, total, _: told(done, total, TRANSCODING))


def _place(file: GGUF, how: str) -> tuple[Path, list[Path]]:
    """Where a file's folder lies, and what other folders there are."""
    cache = cache_dir("models") / ".onnx"  # no model's name begins with a dot
    cache.mkdir(mode=0o700, exist_ok=True)
    path = file.path.resolve()
    tensors = [(i.name, i.part, i.type.name, i.offset) for i in file.tensors.values()]
    identity = (_stamps(file), tensors, VERSION)
    stem = _digest(os.fspath(path), how)
    place = cache / f"{stem}-{_digest(repr(identity), how)}.onnx"
    return place, [other for other in cache.glob("*.onnx") if other != place]


def _stamps(file: GGUF) -> list[tuple[int, int]]:
    """Size and time of every part, as it was opened: it may have another file's name by now."""
    found = [os.fstat(raw.fileno()) for raw in file._raw]
    return [(status.st_size, status.st_mtime_ns) for status in found]


def _wanted(folder: Path, path: Path, how: str) -> bool:
    """Whether a cached folder's file is still there; that of `path` itself has changed since."""
    try:
        manifest = read_json(folder / MANIFEST)
        source = Path(str(manifest["source"]))
        return (source, manifest["containers"]) != (path, how) and source.exists()
    except (EdgeLlamaError, KeyError, OSError, ValueError):
        return False


def _digest(text: str, how: str) -> str:
    return hashlib.sha256(f"{how}|{text}".encode(errors="surrogateescape")).hexdigest()[:20]


def _check_room(place: Path, layout: Layout) -> None:
    free = shutil.disk_usage(place.parent).free
    if layout.size > free:
        need = f"{layout.size / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        hint = "EDGELLAMA_CACHE names another place"
        raise OutputError(f"no space left in the cache: {need}", path=place.parent, hint=hint)
