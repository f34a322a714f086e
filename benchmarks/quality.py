"""What each type costs and keeps: size, perplexity and distance, beside llama.cpp's own files.

    python benchmarks/quality.py [SOURCE] [--types T ...] [--weighted T ...] [--text FILE]
        [--calibrate FILE] [--chunks N] [--threads N] [--folder DIR] [--json FILE] [--plot FILE.svg]
    python benchmarks/quality.py --table FILE.json [--plot FILE.svg]

SOURCE (a checkpoint or a GGUF file; the default model) becomes F16, which is the base that all are
compared with and made from. llama-cpp-python quantizes the same file, where it is installed; if all
its tensors are bit for bit ours, one measurement stands for both. --weighted: types that are made
once more, with an importance matrix of another text. The JSON file is written anew after every
type: a run that was interrupted goes on where it was. docs/quantize.md shows a table.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from peer_quantize import available, peer_quantize
from quality_report import draw, markdown

from edgellama.gguf import open_gguf
from edgellama.machine import usable_cores
from edgellama.measure import machine
from edgellama.output import atomic_output
from edgellama.paths import DEFAULT_MODEL, model_path
from edgellama.perplexity import read_text
from edgellama.quantize import quantize
from edgellama.quantize.importance import collect
from edgellama.quantize.plan import FILE_TYPES, type_name
from edgellama.quantize.quality import declared, quality

TYPES = tuple(name for name in FILE_TYPES if name not in ("F32", "F16"))
WEIGHTED = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "IQ4_NL")
WITH = " with importance"
OURS, THEIRS = "edgellama", "llama.cpp"
Importance = Mapping[str, np.ndarray]


def own_texts() -> tuple[str, str]:
    """A text to measure on and one to calibrate with, without a paragraph in common: Python's
    language reference, topic by topic in turn, as this Python's `help` has it."""
    from pydoc_data.topics import topics

    whole = [text.strip() for _, text in sorted(topics.items())]
    measured = "\n\n".join(whole[0::2]).split("\n\n")
    known = set(measured)
    rest = [text for text in "\n\n".join(whole[1::2]).split("\n\n") if text not in known]
    return "\n\n".join(measured), "\n\n".join(rest)


def measured(
    base: Path, label: str, texts: tuple[str, Importance | None], given: argparse.Namespace
) -> dict[str, Any]:
    """Both converters' files of one type: {"edgellama": row, "llama.cpp": row or why not}."""
    text, importance = texts
    kind = label.removesuffix(WITH)
    with tempfile.TemporaryDirectory(dir=given.folder) as at:
        ours, theirs = Path(at, "ours.gguf"), Path(at, "theirs.gguf")
        quantize(base, ours, kind, importance, certificate="none", threads=given.threads)
        found = {OURS: row(ours, base, text, given)}
        if not available():
            return found
        number = FILE_TYPES[kind][0]
        peer_quantize(base, theirs, number, threads=given.threads, importance=importance)
        if tensors(ours) == tensors(theirs):
            found[THEIRS] = {"same_tensors": True, "bytes": theirs.stat().st_size}
        else:
            found[THEIRS] = row(theirs, base, text, given)
        return found


def row(path: Path, base: Path, text: str, given: argparse.Namespace) -> dict[str, Any]:
    how = {"context": given.context, "chunks": given.chunks, "threads": given.threads}
    kind, bits = declared(path)
    return {
        "type": kind,
        "bytes": path.stat().st_size,
        "bits_per_weight": bits,
        "quality": dataclasses.asdict(quality(path, base, text, **how)),
    }


def tensors(path: Path) -> dict[str, tuple[str, str]]:
    """Type and checksum of every tensor."""
    found = {}
    with open_gguf(path) as file:
        for name, info in file.tensors.items():
            data = bytearray(info.n_bytes)
            file.read_into(name, data)
            found[name] = info.type.name, hashlib.sha256(data).hexdigest()
    return found


def labels(given: argparse.Namespace) -> Iterator[str]:
    yield from given.types
    yield from (kind + WITH for kind in given.weighted)


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure what is missing; returns the whole document."""
    source = model_path(given.source)
    given.folder.mkdir(parents=True, exist_ok=True)
    base, matrix = given.folder / f"{source.stem}-F16.gguf", given.folder / "importance.gguf"
    if not base.exists():
        say(f"{source.name} to F16")
        quantize(source, base, "F16", certificate="none", threads=given.threads)
    own = own_texts()
    text = own[0] if given.text is None else read_text(given.text)
    document = resumed(given, introduction(given, source, base, text))
    importance: Importance | None = None
    for label in labels(given):
        if label in document["types"]:
            continue
        say(label)
        weighted = label.endswith(WITH)
        if weighted and importance is None:
            words = own[1] if given.calibrate is None else read_text(given.calibrate)
            how = {"context": given.context, "chunks": given.calibration_chunks}
            importance = collect(base, words, matrix, threads=given.threads, **how).weights()
        texts = text, importance if weighted else None
        document["types"][label] = measured(base, label, texts, given)
        save(given.json, document)
    return document


def introduction(given: argparse.Namespace, source: Path, base: Path, text: str) -> dict[str, Any]:
    """What all figures are of; figures of something else are not continued."""
    return {
        "source": source.name,
        "base": hashlib.sha256(base.read_bytes()).hexdigest()[:16],
        "text": "Python's language reference" if given.text is None else given.text.name,
        "text_hash": hashlib.sha256(text.encode()).hexdigest()[:16],
        "chunks": given.chunks,
        "calibration_chunks": given.calibration_chunks,
        "context": given.context,
        "machine": machine(),
        "types": {},
    }


def resumed(given: argparse.Namespace, fresh: dict[str, Any]) -> dict[str, Any]:
    if not given.json.exists():
        return fresh
    old = json.loads(given.json.read_text(encoding="utf-8"))
    for key, value in fresh.items():
        if key not in ("machine", "types") and old.get(key) != value:
            sys.exit(f"{given.json} is of another {key}: {old.get(key)}, not {value}")
    return old


def save(path: Path, document: dict[str, Any]) -> None:
    with atomic_output(path) as file:
        file.write((json.dumps(document, indent=1) + "\n").encode())


def say(text: str) -> None:
    print(f"{text}...", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sizes and qualities of all types.")
    add = parser.add_argument
    add("source", nargs="?", default=DEFAULT_MODEL)
    add("--types", nargs="*", type=type_name, default=TYPES)
    add("--weighted", nargs="*", type=type_name, default=WEIGHTED)
    add("--text", type=Path, help="default: half of Python's language reference")
    add("--calibrate", type=Path, help="default: the other half")
    add("--chunks", type=int, default=6, help="of the text")
    add("--calibration-chunks", type=int, default=16)
    add("--context", type=int, default=512, help="tokens of a chunk")
    add("--threads", type=int, default=usable_cores())
    add("--folder", type=Path, default=Path("quality"))
    add("--json", type=Path, default=Path("quality.json"))
    add("--table", type=Path, metavar="FILE.json", help="only print what a run has found")
    add("--plot", type=Path, metavar="FILE.svg", help="needs matplotlib")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.table is not None:
        document = json.loads(given.table.read_text(encoding="utf-8"))
    else:
        document = run(given)
    print(markdown(document))
    if given.plot is not None:
        draw(document, given.plot)


if __name__ == "__main__":
    main()
