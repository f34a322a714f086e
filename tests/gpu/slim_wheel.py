"""Make the wheel of onnxruntime-gpu small enough to carry: one GPU architecture, best compression.

    python tests/gpu/slim_wheel.py WHEEL.whl OUT.tar.xz --sm 90

The archive unpacks to a folder to be put first in PYTHONPATH. Machine code of other architectures
is zeroed in its place, so nothing moves; what no CUDA session needs is left out.
"""

import argparse
import io
import lzma
import mmap
import struct
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
LEFT_OUT = (
    "onnxruntime/capi/libonnxruntime_providers_tensorrt.so",
    "onnxruntime/capi/libonnxruntime.so",  # for C; the Python module has it inside
    "onnxruntime/transformers/",
    "onnxruntime/quantization/",
    "onnxruntime/tools/",
    "onnxruntime/datasets/",
)
MAGIC = struct.pack("<I", 0xBA55ED50)  # of a CUDA fat binary
ELF, ARCHITECTURE_AT = 2, 28


def keep_architecture(library: mmap.mmap, sm: int) -> tuple[int, int]:
    """Zero the machine code of all other architectures: (entries kept, bytes zeroed).

    A fat binary is a header of 16 bytes, its size in the last 8, and entries of a header (its size
    at byte 4, its payload's at 8, the architecture at 28) and a payload.
    """
    kept = zeroed = at = 0
    while (at := library.find(MAGIC, at)) >= 0:
        version, header, size = struct.unpack_from("<HHQ", library, at + 4)
        if (version, header) != (1, 16) or at + header + size > len(library):
            at += 4  # the bytes stand there for something else
            continue
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, own, payload = struct.unpack_from("<HHIQ", library, entry)
            (architecture,) = struct.unpack_from("<I", library, entry + ARCHITECTURE_AT)
            if own < 32 or entry + own + payload > end:
                raise ValueError(f"an entry at byte {entry} does not fit its fat binary")
            if kind == ELF and architecture != sm:
                library[entry + own : entry + own + payload] = bytes(payload)
                zeroed += payload
            else:
                kept += 1
            entry += own + payload
        at = end
    return kept, zeroed


def slim(wheel: Path, target: Path, sm: int) -> tuple[int, int]:
    """Write the archive; what `keep_architecture` did to the CUDA provider."""
    with (
        zipfile.ZipFile(wheel) as source,
        lzma.open(target, "wb", preset=6) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for info in source.infolist():
            if info.is_dir() or info.filename.startswith(LEFT_OUT):
                continue
            if info.filename == PROVIDER:
                done = _add_provider(source, archive, sm)
            else:
                _add(archive, info.filename, io.BytesIO(source.read(info)), info.file_size)
    return done


def _add_provider(source: zipfile.ZipFile, archive: tarfile.TarFile, sm: int) -> tuple[int, int]:
    with tempfile.TemporaryFile() as file:
        with source.open(PROVIDER) as packed:
            while piece := packed.read(2**24):
                file.write(piece)
        n_bytes = file.tell()
        with mmap.mmap(file.fileno(), n_bytes) as library:
            done = keep_architecture(library, sm)
            if not done[0]:
                raise SystemExit(f"the wheel has no machine code for sm_{sm}")
            _add(archive, PROVIDER, library, n_bytes)
    return done


def _add(archive: tarfile.TarFile, name: str, data: io.BytesIO | mmap.mmap, n_bytes: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = n_bytes, 0o755 if name.endswith(".so") else 0o644
    archive.addfile(entry, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sm", type=int, default=90, help="compute capability, as 90 for 9.0")
    given = parser.parse_args()
    kept, zeroed = slim(given.wheel, given.out, given.sm)
    size = given.out.stat().st_size
    print(f"{kept} parts for sm_{given.sm} kept, {zeroed / 1e6:.0f} MB of others zeroed")
    print(f"{given.out}: {size / 2**20:.1f} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
