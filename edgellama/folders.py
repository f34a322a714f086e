"""A folder given where a model was wanted: what it is, and what to give instead.

Looks at names alone, and opens no file.
"""

import os
import shlex
from pathlib import Path

from edgellama.errors import ModelFormatError, shown

_CONFIGS = ("config.json", "params.json")  # Hugging Face's, Meta's
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")


def not_a_model(path: Path) -> ModelFormatError:
    """The refusal of a folder that holds no model as edgellama runs it."""
    try:
        names = sorted(os.listdir(path))
    except OSError:  # it may be searched, but not listed
        return _refused(path, "this is a folder, not a GGUF file", "Give the file in it")
    if files := [name for name in names if name.lower().endswith(".gguf")]:
        hint = f"Give the .gguf file in it, {shown(files[0])[1:-1]}"
        return _refused(path, "this is a folder, not a GGUF file", hint)
    if set(_CONFIGS) & set(names) or any(name.endswith(_WEIGHTS) for name in names):
        given = shlex.quote(os.fspath(path))
        hint = f"To convert it: edgellama quantize {given} OUTPUT.gguf --type Q4_0"
        return _refused(path, "this is the folder of a checkpoint, not a GGUF file", hint)
    empty = "a folder without a model" if names else "an empty folder"
    return _refused(path, f"this is {empty}", "Give a .gguf file")


def _refused(path: Path, problem: str, hint: str) -> ModelFormatError:
    return ModelFormatError(problem, path=path, hint=hint)
