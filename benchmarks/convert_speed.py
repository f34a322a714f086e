"""From a float16 checkpoint to few bits: seconds and memory, beside llama.cpp's own quantization.

    python benchmarks/convert_speed.py [--shape S] [--type T] [--rounds N] [--threads N]
        [--folder DIR] [--clean] [--json FILE]

Ours begins with a sharded safetensors folder (`synthetic_checkpoint.py`), llama.cpp with the GGUF
file of float16 that it needs; both hold the same weights, and the outputs' tensors are compared.
Each conversion is a process of its own; they take turns. Counted are the seconds of the call alone:
ours ends with the output on the disk; for llama.cpp that is a figure of its own. Its memory counts
the pages of the source that it maps. `--shape llama-2-7b` needs 36 GB of disk.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import synthetic
from peer_quantize import available
from quality import tensors
from synthetic_checkpoint import INDEX, SHARD_BYTES, write_checkpoint

from edgellama.machine import usable_cores
from edgellama.measure import machine, peak_bytes
from edgellama.quantize import quantize
from edgellama.quantize.plan import FILE_TYPES, type_name

HERE = Path(__file__).parent
NONE, FULL, THEIRS = "edgellama, no certificate", "edgellama, certificate", "llama.cpp"


def one(source: str, output: str, kind: str, certificate: str, threads: str) -> None:
    """A conversion of ours, in a process of its own: prints its figures."""
    start = time.perf_counter()
    quantize(source, output, kind, certificate=certificate, threads=int(threads))
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "durable": seconds, "peak_bytes": peak_bytes()}))


def figures(*words: object) -> dict[str, float]:
    """What a process of this kind prints, and how long all of it took."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, words)], stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"process": time.perf_counter() - start}


def subjects(given: argparse.Namespace) -> dict[str, list[Any]]:
    """Name -> the words of a command."""
    folder, floats = given.folder / given.shape, given.folder / f"{given.shape}-F16.gguf"
    if not (folder / INDEX).exists():
        say(f"writing {folder}")
        write_checkpoint(folder, given.shape, given.shard_bytes)
    ours = [HERE / "convert_speed.py", "--one", folder, given.folder / "ours.gguf", given.type]
    found = {
        NONE: [*ours, "none", given.threads],
        FULL: [*ours, "full", given.threads],
    }
    if available():
        if not floats.exists():
            say(f"writing {floats}")
            quantize(folder, floats, "F16", certificate="none")
        number = FILE_TYPES[given.type][0]
        output = given.folder / "theirs.gguf"
        found[THEIRS] = [HERE / "peer_quantize.py", floats, output, number, given.threads]
    return found


def run(given: argparse.Namespace) -> dict[str, Any]:
    given.folder.mkdir(parents=True, exist_ok=True)
    commands = subjects(given)
    synthetic.write(given.folder / "tiny.gguf", "tiny", "F16")  # encoders are compiled with it
    quantize(given.folder / "tiny.gguf", given.folder / "ours.gguf", given.type)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    outputs = {name: given.folder / f"{output(name)}.gguf" for name in commands}
    for number in range(given.rounds):
        for name in list(commands)[:: -1 if number % 2 else 1]:
            outputs[name].unlink(missing_ok=True)
            say(f"round {number + 1}: {name}")
            rounds[name].append(figures(*commands[name]))
    same = tensors(outputs[NONE]) == tensors(outputs[THEIRS]) if THEIRS in outputs else None
    found = {
        "shape": given.shape,
        "type": given.type,
        "threads": given.threads,
        "machine": machine(),
        "source_bytes": sum(path.stat().st_size for path in (given.folder / given.shape).iterdir()),
        "output_bytes": outputs[NONE].stat().st_size,
        "same_tensors": same,
        "rounds": rounds,
    }
    for path in outputs.values():
        path.unlink(missing_ok=True)
    return found


def output(name: str) -> str:
    return "theirs" if name == THEIRS else "ours"


def report(document: dict[str, Any]) -> str:
    """A Markdown table; ratios are medians over rounds."""
    machine, rounds = document["machine"], document["rounds"]
    lines = [
        f"{document['shape']}, {document['source_bytes'] / 1e9:.2f} GB of float16, to "
        f"{document['type']}, {document['output_bytes'] / 1e9:.2f} GB; {document['threads']} "
        f"threads; {machine['processor']}, {machine['cores']} cores; median (least to most) of "
        f"{len(rounds[NONE])} rounds",
        "",
        "| | seconds | on the disk after | whole process, s | GB/s read | peak memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in rounds.items():
        times = [spread([one[key] for one in found]) for key in ("seconds", "durable", "process")]
        speed = document["source_bytes"] / statistics.median(one["seconds"] for one in found) / 1e9
        peak = max(one["peak_bytes"] for one in found) / 1e6
        lines.append(f"| {name} | {' | '.join(times)} | {speed:.2f} | {peak:.0f} |")
    if THEIRS in rounds:
        lines.append("")
        for name in (NONE, FULL):
            lines.append(
                f"{name}: {ratio(rounds, name, 'seconds'):.2f} of llama.cpp's time, "
                f"{ratio(rounds, name, 'durable'):.2f} of it until the output is on the disk"
            )
        same = "the same" if document["same_tensors"] else "NOT the same"
        lines.append(f"The tensors of both outputs are {same}.")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def ratio(rounds: dict[str, list[dict[str, float]]], name: str, key: str) -> float:
    pairs = zip(rounds[name], rounds[THEIRS], strict=True)
    return statistics.median(ours[key] / theirs[key] for ours, theirs in pairs)


def say(text: str) -> None:
    print(f"{text}...", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time conversions of a synthetic checkpoint.")
    add = parser.add_argument
    add("--shape", choices=synthetic.SHAPES, default="smollm2-135m")
    add("--type", type=type_name, default="Q4_0")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=usable_cores())
    add("--shard-bytes", type=int, default=SHARD_BYTES)
    add("--folder", type=Path, default=Path("convert-speed"))
    add("--clean", action="store_true", help="remove the sources afterwards")
    add("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])
        return
    given = arguments()
    found = run(given)
    print(report(found))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.clean:
        shutil.rmtree(given.folder / given.shape)
        for path in (given.folder / f"{given.shape}-F16.gguf", given.folder / "tiny.gguf"):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
