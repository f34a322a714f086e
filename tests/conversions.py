"""What the tests of conversions share: sources to convert, and a look at what was written.

Knows nothing about what is expected of a conversion.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config, write_tiny

from edgellama.config import Rope
from edgellama.quantize import Report, convert
from edgellama.quantize.plan import PlannedTensor
from edgellama.quantize.source import open_source
from edgellama.quantize.writer import Writer
from edgellama.weights import expected_shapes

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes and limits")
quantize: Callable[..., Report] = partial(convert.quantize, certificate="none")
WIDE = tiny_config(  # rows of 256 fit every type; the larger matrices are several pieces
    dim=256,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    ffn_dim=1280,
    rope=Rope(64),
)


def values(path: Path, name: str) -> np.ndarray:
    with open_source(path) as source:
        return source.tensors[name].read()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def big_model(path: Path, rows: int) -> Path:
    """A model of zeros, F16, with an embedding of so many rows of 1024; takes no room on disks."""
    config = tiny_config(
        n_layers=1,
        dim=1024,
        n_heads=16,
        n_kv_heads=16,
        head_dim=64,
        rope=Rope(64),
        tied_output=True,
    )
    with open_source(write_tiny(path, config, "F16")) as small:
        metadata = small.metadata | {"llama.vocab_size": rows}
    shapes = expected_shapes(replace(config, vocab_size=rows))
    kinds = {name: "F16" if len(shape) > 1 else "F32" for name, shape in shapes.items()}
    planned = [PlannedTensor(n, s, kinds[n], kinds[n], "") for n, s in shapes.items()]
    with path.open("wb") as file:
        file.truncate(Writer(file, metadata, planned).n_bytes)
    return path
