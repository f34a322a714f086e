"""`verify`: does a file still hold, and compute, what its certificate says?

Reads the whole file once for its checksums, then runs a few prompts. What does not hold is named:
a tensor, a key, a prompt's tokens, or the answers. Knows nothing about how certificates are made:
see `certificate.py`.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellama import opening
from edgellama.config import ModelConfig
from edgellama.control import CancelToken, Progress
from edgellama.errors import shown
from edgellama.ggml import FLOATS
from edgellama.gguf import GGUF, open_gguf
from edgellama.graph import decoder
from edgellama.quantize.certificate import (
    SUM,
    TURNED,
    Certificate,
    Witnessed,
    key_checksums,
    prompt_ids,
    read_certificate,
)
from edgellama.quantize.forecast import HalfSplit
from edgellama.runtimes.base import Options
from edgellama.tokenizer import tokenizer_from_gguf
from edgellama.weights import model_config

if TYPE_CHECKING:
    from edgellama.model import Model

PIECE = 1 << 22  # bytes read between two looks at the cancel token
# Root mean square of the logits' differences over their spread, a common shift left out. Measured
# on the default model, which is small and suffers much from few bits: Q8_0 0.03, Q4_0 0.4.
LIMITS = {**dict.fromkeys(FLOATS, 0.02), "Q8_0": 0.2}
FEW_BITS = 1.5
# Normalized mean square error of a tensor: 0.1 is much for any type, other weights have about 2.
FLOAT_ERROR, ERROR = 1e-4, 0.5


@dataclass(frozen=True)
class Verdict:
    """What was compared; `problems` is empty if all of it holds."""

    path: Path
    runtime: str
    tensors: int  # checksums compared
    keys: int
    prompts: int
    deviation: float | None  # of the logits, see LIMITS; None if they were not compared
    limit: float
    problems: tuple[str, ...]


def verify(
    path: str | os.PathLike[str],
    runtime: str = "auto",
    *,
    device: str = "auto",
    threads: int | None = None,
    cancel: CancelToken | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Replay the certificate of a file, or of a folder for ONNX Runtime, offline.

    Raises EdgeLlamaError if the file has none, what `edgellama.load` raises, Cancelled.
    """
    if Path(path).is_dir():
        from edgellama.quantize.verify_onnx import verify_folder

        return verify_folder(Path(path), runtime, device, threads, cancel, progress)
    return _verify_file(path, runtime, device, threads, cancel, progress)


def _verify_file(
    path: str | os.PathLike[str],
    runtime: str,
    device: str,
    threads: int | None,
    cancel: CancelToken | None,
    progress: Progress | None,
) -> Verdict:
    with open_gguf(path) as file:
        certificate = read_certificate(file.metadata, file.path)
        config = model_config(file)
        problems = [
            *compared("key", certificate.keys, key_checksums(file.metadata)),
            *compared("tensor", certificate.tensors, _tensor_sums(file, cancel, progress)),
            *mixed_up(file, certificate),
            *changed_tokens(file, config, certificate),
        ]
        limit = max(LIMITS.get(info.type.name, FEW_BITS) for info in file.tensors.values())
        with opening.load(
            path,
            runtime,
            device=device,
            threads=threads,
            context=min(config.context_length, 256),
            cancel=cancel,
            progress=progress,
        ) as model:
            found = deviation(model, certificate, cancel)
            used = str(model.device["runtime"])
        if not found <= limit:
            problems.append(_answers(file, config, certificate, found, limit))
    return Verdict(
        path=file.path,
        runtime=used,
        tensors=len(certificate.tensors),
        keys=len(certificate.keys),
        prompts=len(certificate.prompts),
        deviation=found,
        limit=limit,
        problems=tuple(problems),
    )


def compared(what: str, wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What changed, is missing or was added, by name."""
    problems = []
    for name in (*wanted, *(name for name in found if name not in wanted)):
        if name not in found:
            problems.append(f"{what} {shown(name)} is missing")
        elif name not in wanted:
            problems.append(f"{what} {shown(name)} was added")
        elif wanted[name] != found[name]:
            problems.append(f"{what} {shown(name)} was changed")
    return problems


def mixed_up(file: GGUF, certificate: Certificate) -> list[str]:
    """Tensors that were not the source's when they were written."""
    problems = []
    for name, error in certificate.errors.items():
        info = file.tensors.get(name)
        limit = FLOAT_ERROR if info is not None and info.type.name in FLOATS else ERROR
        if not error <= limit:
            problem = f"tensor {shown(name)} was not converted right: error {error:.2g} of its size"
            if name.endswith(TURNED):
                problem += "; its rows may be in the wrong order for rope"
            problems.append(problem)
    return problems


def _tensor_sums(
    file: GGUF, cancel: CancelToken | None, progress: Progress | None
) -> dict[str, str]:
    total, done, sums = sum(info.n_bytes for info in file.tensors.values()), 0, {}
    buffer = bytearray(PIECE)
    for name, info in file.tensors.items():
        digest = hashlib.sha256()
        for start in range(0, info.n_bytes, PIECE):
            if cancel:
                cancel.check("verify")
            view = memoryview(buffer)[: min(PIECE, info.n_bytes - start)]
            file.read_into(name, view, start)
            digest.update(view)
            done += len(view)
            if progress:
                progress(done, total, "checking sums")
        sums[name] = digest.hexdigest()[:SUM]
    return sums


def changed_tokens(file: GGUF, config: ModelConfig, certificate: Certificate) -> list[str]:
    """Prompts that the file's tokenizer turns into other ids than at the conversion."""
    tokenizer = tokenizer_from_gguf(file.metadata, file.path)
    found = prompt_ids(tokenizer, config.vocab_size)
    wanted = [list(p.ids) for p in certificate.prompts]
    if found == wanted:
        return []
    if len(found) != len(wanted):
        return [f"the tokenizer can encode {len(found)} of the {len(wanted)} prompts"]
    number = next(i for i, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
    problem = f"the tokens of prompt {number + 1} changed"
    if wanted[number][1:] == found[number]:
        problem += f": token {wanted[number][0]}, BOS, is no longer put in front"
    elif found[number][1:] == wanted[number]:
        problem += f": token {found[number][0]}, BOS, is put in front now"
    return [problem]


def deviation(model: "Model", certificate: Certificate, cancel: CancelToken | None = None) -> float:
    """How far a model's answers are from the certificate's, see LIMITS; NaN and infinity show."""
    rows = []
    for prompt in certificate.prompts:
        session = model.session()
        rows.append(session.forward(list(prompt.ids), cancel=cancel))
        session.close()
    return distance(certificate.prompts, rows)


def distance(prompts: tuple[Witnessed, ...], rows: Any) -> float:
    """Root mean square over all kept logits of (found - wanted) / spread.

    What all logits of a prompt have in common is left out: it changes no probability.
    """
    parts = []
    for prompt, row in zip(prompts, rows, strict=True):
        apart = row[list(prompt.top)].astype(np.float64) - np.array(prompt.logits)
        parts.append((apart - apart.mean()) / prompt.spread)
    return float(np.sqrt(np.mean(np.concatenate(parts) ** 2)))


def _answers(
    file: GGUF, config: ModelConfig, certificate: Certificate, found: float, limit: float
) -> str:
    """Why the answers differ, as far as it can be told."""
    from edgellama.runtimes.reference import Reference

    options = Options(context=256, threads=1)
    reference = Reference(file, decoder(config), options)
    rows = {}
    for name, kind in (("file", None), ("other", HalfSplit)):
        sessions = [kind(reference) if kind else reference.session() for _ in certificate.prompts]
        answers = [s.forward(p.ids) for s, p in zip(sessions, certificate.prompts, strict=True)]
        rows[name] = distance(certificate.prompts, answers)
    reference.close()
    problem = f"the answers differ by {found:.3f} of their spread; allowed: {limit}"
    if rows["other"] <= limit < rows["file"]:
        return f"{problem}. The rows of attn_q and attn_k are in the wrong order for rope"
    if rows["file"] <= limit:
        return f"{problem}. The float32 reference agrees: the runtime is at fault, not the file"
    return (
        f"{problem}. The float32 reference finds {rows['file']:.3f}: the weights do not answer so"
    )
