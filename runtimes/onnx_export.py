"""Writing an ONNX folder: the graph, the data file, and the metadata without weights.

Weights come as rows of GGUF blocks, in any order, and go
to the places of the layout. Knows nothing about where they come from, nor how the folder gets its
name.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgellama.control import CancelToken, Progress
from edgellama.graph import Graph
from edgellama.quantize.blocks import decode
from edgellama.quantize.plan import PlannedTensor
from edgellama.quantize.writer import Writer
from edgellama.runtimes import onnx_containers as containers
from edgellama.runtimes.onnx_builder import DATA_FILE
from edgellama.runtimes.onnx_layout import Layout
from edgellama.runtimes.onnx_lowering import Manner, lower
from edgellama.weights import ROPE_FACTORS

MANIFEST, MODEL_FILE, METADATA_FILE = "edgellama.json", "model.onnx", "tokenizer.gguf"
FORMAT, VERSION = "edgellama-onnx", 1
HASHED = 4 << 20  # bytes hashed between two looks at the cancel token
CHECKING = "checking the ONNX folder"
_GIVEN_ANEW = ("general.alignment", "split.")  # keys that describe the file at hand


@dataclass
class FolderWriter:
    """An ONNX folder in the making. `write` may be called in any order, from one thread."""

    folder: Path
    graph: Graph
    types: Mapping[str, str]
    how: str = containers.EXACT
    errors: dict[str, float] = field(default_factory=dict)  # by type: the largest found, see notes

    def __post_init__(self) -> None:
        self.layout = Layout(self.graph, self.types, self.how)
        self._data: BinaryIO = open(self.folder / DATA_FILE, "xb")  # noqa: SIM115 - `finish` closes
        self._data.truncate(self.layout.size)
        self._measured: set[str] = set()

    def write(self, name: str, first: int, raw: NDArray[np.uint8]) -> None:
        """Rows of a weight from `first` on, as GGUF has them, (rows, row_bytes)."""
        kind = self.types[name]
        if len(self.layout.shapes[name]) == 1:
            found = {containers.VALUES: decode(kind, raw).reshape(-1)}
        else:
            found = containers.parts(kind, raw, self.how)
            self._measure(name, raw, found)
        for part, rows in found.items():
            self._put(name, part, first, rows)

    def _put(self, name: str, part: str, first: int, rows: NDArray[Any]) -> None:
        place = self.layout.places[name, part]
        self._data.seek(place.offset + first * place.row_bytes)
        self._data.write(np.ascontiguousarray(rows).data)

    def _measure(self, name: str, raw: NDArray[np.uint8], found: containers.Parts) -> None:
        """Compare a weight's first rows with what the GGUF blocks mean."""
        form = self.layout.form(name)
        if name in self._measured or not (form.correction or form.zero_points):
            return
        self._measured.add(name)
        wanted = decode(self.types[name], raw)
        error = np.abs(containers.values(found, form) - wanted).max(initial=0)
        relative = float(error / max(float(np.abs(wanted).max(initial=0)), 1e-30))
        kind = self.types[name]
        self.errors[kind] = max(self.errors.get(kind, 0.0), relative)

    def finish(
        self,
        metadata: Mapping[str, Any],
        kinds: Mapping[str, str],
        rope_factors: list[float] | None = None,
        cancel: CancelToken | None = None,
        **more: Any,
    ) -> None:
        """Write the rest: graph, metadata, manifest with checksums. `more` goes to the manifest."""
        self._fill_zero_points()
        self._data.flush()
        os.fsync(self._data.fileno())
        model = lower(self.graph, self.layout, Manner())
        _write(self.folder / MODEL_FILE, model.to_bytes())
        self._write_metadata(metadata, kinds, rope_factors)
        files = {
            name: {"bytes": (self.folder / name).stat().st_size, "sha256": digest}
            for name in (MODEL_FILE, DATA_FILE, METADATA_FILE)
            if (digest := sha256(self.folder / name, cancel))
        }
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "containers": self.how,
            "tied_output": self.graph.config.tied_output,
            "vocab_size": self.graph.config.vocab_size,
            "tensors": dict(self.types),
            "files": files,
            "notes": self.notes,
            **more,
        }
        _write(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        self._data.close()

    @property
    def notes(self) -> list[str]:
        """Which types are kept otherwise than to the bit, and how far off."""
        found = []
        for kind, error in sorted(self.errors.items()):
            form = containers.container(kind, self.how)
            way = "8-bit codes" if form.zero_points else f"{form.bits}-bit codes and corrections"
            found.append(
                f"{kind} is kept as {way}: the largest difference among the weights compared is "
                f"{error:.1e} of the largest weight"
            )
        return found

    def close(self) -> None:
        self._data.close()

    def _fill_zero_points(self) -> None:
        """Gathering wants them said, also where all are alike."""
        name = self.layout.embedding or ""
        place = self.layout.places.get((name, containers.ZERO_POINTS))
        form = self.layout.form(name)
        if place is not None and not form.zero_points:
            row = np.full((1, *place.shape[1:]), form.zero, np.uint8)
            for first in range(0, place.shape[0], 4096):
                rows = min(4096, place.shape[0] - first)
                self._put(name, containers.ZERO_POINTS, first, row.repeat(rows, axis=0))

    def _write_metadata(
        self, metadata: Mapping[str, Any], kinds: Mapping[str, str], factors: list[float] | None
    ) -> None:
        """A GGUF file with every key and no weights, for the reader that checks them."""
        kept = {k: v for k, v in metadata.items() if not k.startswith(_GIVEN_ANEW)}
        planned = []
        if factors is not None:
            planned = [PlannedTensor(ROPE_FACTORS, (len(factors),), "F32", "F32", "")]
        with open(self.folder / METADATA_FILE, "xb") as file:
            writer = Writer(file, kept, planned, kinds=kinds)
            for tensor in planned:
                writer.write(np.array(factors, "<f4").tobytes())
                writer.end_tensor(tensor)
            file.flush()
            os.fsync(file.fileno())


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sha256(path: Path, cancel: CancelToken | None = None, progress: Progress | None = None) -> str:
    """Of a whole file, in hexadecimal."""
    digest, size, done = hashlib.sha256(), path.stat().st_size, 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(HASHED):
            digest.update(chunk)
            done += len(chunk)
            if cancel:
                cancel.check(CHECKING)
            if progress:
                progress(done, size, CHECKING)
    return digest.hexdigest()
