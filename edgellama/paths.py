"""Where files lie on this machine: the cache folders, and the file a model name stands for.

Uses no network and knows nothing about what the files hold.
"""

import os
import stat
import sys
from pathlib import Path
from typing import Literal

from edgellama.errors import EdgeLlamaError, OutputError, ParameterError, shown

DEFAULT_MODEL = "smollm2-135m-instruct"


def cache_root() -> Path:
    """`$EDGELLAMA_CACHE`, else `edgellama` in the platform's cache folder; nothing is created."""
    chosen = os.environ.get("EDGELLAMA_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser().absolute() / "edgellama"
    except RuntimeError as error:  # no home folder to be found
        raise OutputError(
            "there is no cache folder: this user has no home",
            hint="Set EDGELLAMA_CACHE to a folder you can write to",
        ) from error


def cache_dir(kind: Literal["models", "kernels"]) -> Path:
    """The folder for one kind of cached file, created if need be, open to its owner alone.

    Raises OutputError where it cannot be created, or where somebody else could plant files in it:
    kernels are code that will be run.
    """
    folder = cache_root() / kind
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        _keep_others_out(folder)
    except OSError as error:
        if isinstance(error, EdgeLlamaError):
            raise
        raise OutputError(
            f"the cache folder cannot be used: {error.strerror or error}",
            path=folder,
            hint=f"{folder} must be a folder of yours; EDGELLAMA_CACHE names another place",
        ) from error
    return folder


def _keep_others_out(folder: Path) -> None:
    if os.name != "posix":
        return
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise OutputError(
            f"the cache folder belongs to another user (id {found.st_uid})",
            path=folder,
            hint="Set EDGELLAMA_CACHE to a folder of your own",
        )
    if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)


def absolute(path: Path) -> Path:
    """The same path, whatever folder the process goes to later."""
    try:
        return path.absolute()
    except OSError:  # the folder that it is in now has been removed
        return path


def model_file(name: str) -> Path:
    """Where `edgellama pull NAME` puts a model: names are `word` or `org/repo/file.gguf`."""
    return cache_root() / "models" / (name if "/" in name else f"{name}.gguf")


def is_model_name(text: str) -> bool:
    """Whether `text` could be pulled: one path-safe word, or a hub's `org/repo/file.gguf`."""
    words = text.split("/")
    plain = all(
        word[:1].isalnum()
        and word.isascii()
        and word.replace("-", "").replace("_", "").replace(".", "").isalnum()
        for word in words
    )
    return plain and (len(words) == 1 or (len(words) >= 3 and text.endswith(".gguf")))


def model_path(name_or_path: str | Path) -> Path:
    """The model file or folder meant by a path, or by the name of a model already pulled.

    A path that exists comes first. Raises ParameterError for text that can be neither,
    EdgeLlamaError for what is not there or is no file; the message names `edgellama pull`.
    """
    text = os.fspath(name_or_path)
    if not text or "\0" in text:
        problem, allowed = f"the model is {shown(text)}", "a file, a folder or a name"
        raise ParameterError(problem, field="path", value=text, allowed=allowed)
    if "://" in text:
        raise ParameterError(
            f"{shown(text)} is an address, not a local file",
            field="path",
            value=text,
            allowed="a file, a folder or a name",
            hint="Download it first; `edgellama pull ORG/REPO/FILE.gguf` fetches from the hub",
        )
    path = _existing(Path(text))
    if path is None and text.startswith("~"):
        path = _existing(Path(os.path.expanduser(text)))
    if path is None and is_model_name(text):
        path = _existing(model_file(text))
    if path is None:
        raise _not_found(text)
    return path


def _existing(path: Path) -> Path | None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EdgeLlamaError(f"cannot open: {reason}", path=path) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise EdgeLlamaError("is neither a regular file nor a folder", path=path)
    return path


def _not_found(text: str) -> EdgeLlamaError:
    if text == DEFAULT_MODEL or (text.count("/") >= 2 and is_model_name(text)):
        hint = f"To fetch it: edgellama pull {text}"
    else:
        hint = f"Give a .gguf file; `edgellama pull` fetches {DEFAULT_MODEL}"
    return EdgeLlamaError(f"no such file, and no model of that name: {shown(text)}", hint=hint)
