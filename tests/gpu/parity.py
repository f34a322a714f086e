"""Runtimes against golden logits: how far, and where they part first.

Compared with are the goldens of this very run, or the ones in the repository if making them
failed; `goldens` in a row tells which.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import edgellama
from gpu import fixtures, models, nodes, provider
from gpu.parts import Given, Row, Skip, Task

CONTEXT = 512
FEW = 64  # positions of the default model where the machine is slow
SHARE = 0.9  # of equal likeliest tokens that a bounded comparison must have, default model


@dataclass(frozen=True)
class Subject:
    """A runtime as `edgellama.load` opens it, and how far it may be off."""

    name: str
    options: dict[str, Any]
    kl_floats: float  # mean KL, of F32 and F16 weights
    kl_quantized: float
    node: float  # NMSE of any value of the graph


HERE, CUDA = {"runtime": "onnx", "device": "cpu"}, {"runtime": "onnx", "device": "cuda"}
ON_CPU = (
    Subject("reference", {"runtime": "reference"}, 1e-9, 1e-9, 1e-9),
    Subject("cpu", {"runtime": "cpu", "kv_type": "f32"}, 1e-9, 5e-3, 5e-3),
    Subject("onnx cpu, level 0", HERE | {"accuracy": 0}, 1e-8, 1e-5, 1e-9),
    Subject("onnx cpu, level 4", HERE | {"accuracy": 4}, 1e-8, 5e-3, 5e-2),
)
ON_CUDA = (
    Subject("onnx cuda, float16", CUDA | {"dtype": "float16"}, 1e-2, 1e-2, 1e-2),
    Subject("onnx cuda, bfloat16", CUDA | {"dtype": "bfloat16"}, 3e-2, 3e-2, 1e-1),
)


def tasks(given: Given) -> Iterator[Task]:
    """The default model first, bfloat16 on tiny ones last: what matters most has the time."""
    subjects = (*ON_CUDA[:1], *ON_CPU, *ON_CUDA[1:]) if given.device == "cuda" else ON_CPU
    for subject in subjects:
        labels = {"kind": "default", "model": "default", "runtime": subject.name}
        yield labels, partial(_default, given, subject)
    for subject in (one for one in subjects if one.name != "reference"):
        for name in ("gqa",) if given.quick else ("gqa", "default"):
            labels = {"kind": "nodes", "model": f"{name}: values", "runtime": subject.name}
            yield labels, partial(_nodes, given, subject, name)
    names = list(models.TINY)[:2] if given.quick else list(models.TINY)
    for subject in subjects:
        for name in names:
            for kind in models.KINDS:
                labels = {"kind": "tiny", "model": name, "type": kind, "runtime": subject.name}
                yield labels, partial(_tiny, given, subject, name, kind)


def _golden(given: Given, name: str) -> tuple[str, fixtures.Golden]:
    for folder in (Path(given.out) / "golden", fixtures.FOLDER):
        if (folder / name).exists():
            golden = fixtures.read(folder / name)
            return f"{golden.about['device']}, {golden.about['date']}", golden
    raise Skip(f"there is no golden {name}")


def _logits(path: Path, ids: list[int], options: dict[str, Any], device: str) -> np.ndarray:
    if options.get("runtime") == "onnx":
        provider.require(device)
    with edgellama.load(path, context=CONTEXT, **options) as model:
        return model.session().forward(ids, all_logits=True)


def _tiny(given: Given, subject: Subject, name: str, kind: str) -> Row:
    where, golden = _golden(given, fixtures.TINY_FILE)
    path, rows = models.write(Path(given.scratch), name, kind), list(models.rows(kind))
    device = subject.options.get("device", "cpu")
    got = _logits(path, models.ids(name), subject.options, device)
    found = fixtures.from_logits(golden.arrays[f"{name}.{kind}"], got[rows])
    bound = subject.kl_floats if kind in ("F32", "F16") else subject.kl_quantized
    return {"goldens": where, "bound": bound, "ok": found["kl_mean"] <= bound} | found


def _default(given: Given, subject: Subject) -> Row:
    if not given.model:
        raise Skip("the default model is not here: `edgellama pull` fetches it")
    where, golden = _golden(given, fixtures.DEFAULT_FILE)
    device = subject.options.get("device", "cpu")
    slow = given.device == "cpu" or subject.name == "reference"
    ids = golden.arrays["tokens"].tolist()[: FEW if slow else None]
    got = _logits(Path(given.model), ids, subject.options, device)
    found = fixtures.from_likeliest(golden.arrays, got)
    bound = subject.kl_quantized
    good = found["kl_mean"] <= bound and found["same_top"] >= SHARE
    return {"type": "own", "goldens": where, "bound": bound, "ok": good} | found


def _nodes(given: Given, subject: Subject, name: str) -> Row:
    """The first value of the graph that is off, in the default model or a tiny one of 4 bits."""
    if name == "default":
        if not given.model:
            raise Skip("the default model is not here: `edgellama pull` fetches it")
        path, ids = Path(given.model), models.text_ids(Path(given.model))
    else:
        path, ids = models.write(Path(given.scratch), name, "Q4_0"), models.ids(name)
    if subject.options["runtime"] == "onnx":
        provider.require(subject.options["device"])
    return nodes.compare(path, ids, subject.options, subject.node)
