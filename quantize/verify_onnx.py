"""`verify` of a folder for ONNX Runtime: its files' sums, its keys and tokens, what it answers.

The certificate's sums are of GGUF's blocks, which the folder holds in another order; opening it
compares the SHA-256 of each file instead. Knows nothing about graphs.
"""

from pathlib import Path

from edgellama import opening
from edgellama.control import CancelToken, Progress
from edgellama.quantize.certificate import key_checksums, read_certificate
from edgellama.quantize.verify import (
    FEW_BITS,
    LIMITS,
    Verdict,
    changed_tokens,
    compared,
    deviation,
    mixed_up,
)
from edgellama.runtimes.onnx_folder import open_folder


def verify_folder(
    path: Path,
    runtime: str,
    device: str,
    threads: int | None,
    cancel: CancelToken | None,
    progress: Progress | None,
) -> Verdict:
    """Raises what `verify` raises; files that changed are refused by `open_folder`."""
    folder = open_folder(path, cancel=cancel, progress=progress)
    with folder.file as file:
        certificate = read_certificate(file.metadata, path)
        problems = [
            *compared("key", certificate.keys, key_checksums(file.metadata)),
            *mixed_up(file, certificate),
            *changed_tokens(file, folder.graph.config, certificate),
        ]
        limit = max(LIMITS.get(kind, FEW_BITS) for kind in folder.layout.types.values())
    context = min(folder.graph.config.context_length, 256)
    with opening.load(
        path,
        runtime,
        device=device,
        threads=threads,
        context=context,
        cancel=cancel,
        progress=progress,
    ) as model:
        found = deviation(model, certificate, cancel)
    if not found <= limit:
        problems.append(f"the answers differ by {found:.3f} of their spread; allowed: {limit}")
    return Verdict(
        path=path,
        runtime="onnx",
        tensors=len(folder.layout.types),
        keys=len(certificate.keys),
        prompts=len(certificate.prompts),
        deviation=found,
        limit=limit,
        problems=tuple(problems),
    )
