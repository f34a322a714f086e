"""The synthetic models whose speed is measured: written ahead, in the order of use."""

import os
import shutil
import time
from pathlib import Path

import synthetic

LARGE = (  # what matters most first: the last ones may find no time
    ("llama-3.2-1b", "Q4_0"),
    ("llama-2-7b", "Q4_0"),
    ("llama-3-8b", "Q4_0"),
    ("llama-3.2-1b", "Q8_0"),
    ("llama-2-7b", "Q8_0"),
    ("llama-3.2-1b", "F16"),
)
SMALL = (("smollm2-135m", "Q4_0"),)


def write_all(folder: Path) -> None:
    for shape, kind in LARGE:
        synthetic.write(_path(folder, shape, kind), shape, kind)


def written(folder: Path, shape: str, kind: str, ends: float) -> Path:
    """The file; waits for another process that is writing it, or writes it."""
    path = _path(folder, shape, kind)
    while not path.exists() and any(folder.glob(f".{path.name}.*")) and time.time() < ends:
        time.sleep(0.2)
    return path if path.exists() else synthetic.write(path, shape, kind)


def remove(folder: Path, shape: str, kind: str) -> None:
    """The file, and what ONNX Runtime's cache made of it: they are large."""
    _path(folder, shape, kind).unlink(missing_ok=True)
    shutil.rmtree(Path(os.environ["EDGELLAMA_CACHE"]) / "models" / ".onnx", ignore_errors=True)


def _path(folder: Path, shape: str, kind: str) -> Path:
    return folder / f"{shape}-{kind}.gguf"
