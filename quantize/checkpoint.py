"""A model's tensors by the names its makers gave them, from a folder or a file.

Recognises Hugging Face folders (safetensors or PyTorch files, sharded or not), Meta's folders, and
single files beside their config: by what the files hold, never by their names alone. Joins shards
and unpacks bitsandbytes' 4-bit weights. Knows nothing about what the tensors mean.
"""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Self

from edgellama.errors import (
    EdgeLlamaError,
    ModelConfigError,
    ModelFormatError,
    UnsafeModelError,
    UnsupportedModelError,
    shown,
)
from edgellama.quantize.bitsandbytes import unpack_4bit
from edgellama.quantize.raw_file import RawFile
from edgellama.quantize.safetensors import read_safetensors
from edgellama.quantize.shards import MOST_SHARDS, join_shards
from edgellama.quantize.strict_json import read_json
from edgellama.quantize.tensor import FLOATS, UNPACKED, Tensor, unsupported_type
from edgellama.quantize.torch_files import read_torch_file
from edgellama.regular_file import unreadable

__all__ = ["Checkpoint", "Tensor", "open_checkpoint"]

Kind = Literal["safetensors", "pytorch", "meta"]

MOST_FILES = 1024
NO_WEIGHTS = "Expected model.safetensors, pytorch_model.bin, one of their .index.json, or "
NO_WEIGHTS += "consolidated.00.pth with params.json"
_META = re.compile(r"consolidated(?:\.(?P<number>[0-9]{2}))?\.(?:pth|pt|bin|safetensors)")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = {  # what a name promises
    ".safetensors": "safetensors",
    ".bin": "pytorch",
    ".pth": "pytorch",
    ".pt": "pytorch",
    ".gguf": "gguf",
    ".onnx": "onnx",
}
_CONTENTS = {
    "safetensors": "a safetensors file",
    "pytorch": "a PyTorch file",
    "gguf": "a GGUF file",
    "onnx": "an ONNX file",
}
_READ = ("safetensors", "pytorch")  # kinds of files that hold a checkpoint


class Checkpoint:
    """An open checkpoint; a context manager. Its tensors are read on demand, from any thread.

    `kind` is "safetensors", "pytorch" or "meta"; `config` the parsed config.json or params.json;
    `notes` what a user may want to know: files left aside, weights unpacked.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        notes: list[str],
        files: ExitStack,
    ) -> None:
        self.path, self.tensors = path, tensors
        self.kind: Kind = kind
        self.config, self.notes, self._files = config, notes, files

    def close(self) -> None:
        """Close the files; doing so twice is harmless."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: "str | os.PathLike[str]") -> Checkpoint:
    """Open a model's folder, or one weights file beside its config; only headers are read.

    Raises ModelFormatError for damaged or missing files, UnsafeModelError for files that ask to
    run code or point outside their folder, UnsupportedModelError for legal files that hold what
    cannot be read, ModelConfigError for a damaged config.
    """
    path = Path(path)
    with ExitStack() as files:
        folder, names, index = _weight_files(path)
        meta = all(map(_META.fullmatch, names)) and not (
            (folder / "config.json").exists() and not (folder / "params.json").exists()
        )
        notes: list[str] = []
        found = [_read_file(folder / name, files) for name in names]
        shards = [tensors for _, tensors in found]
        config = _config(folder, meta)
        if meta:
            paths = [folder / name for name in names]
            merged = join_shards(shards, paths, config)
        else:
            merged = _merged(folder, names, shards, index, notes)
        _refuse_other_schemes(folder, config, merged)
        usable = _usable(unpack_4bit(merged, path), path, notes)
        kind: Kind = "meta" if meta else found[0][0]
        return Checkpoint(path, kind, usable, config, notes, files.pop_all())


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from error


def _weight_files(path: Path) -> tuple[Path, list[str], dict[str, str] | None]:
    """The folder, the names of its weight files, and the index that maps tensors to them."""
    try:
        is_folder = path.is_dir()
    except ValueError as error:  # a null character in the name
        raise EdgeLlamaError(f"{shown(str(path))} is not a file name: {error}") from error
    folder = path if is_folder else path.parent
    names = _listed(folder)
    if not is_folder:
        if path.name.endswith(".index.json"):
            return folder, *_indexed(path, names)
        if path.name in _parts(names) and not (match := _META.fullmatch(path.name)):
            problem = "this is one of several files of a model"
            raise ModelFormatError(problem, path=path, hint="Give the folder it is in")
        match = _META.fullmatch(path.name)
        if match is None or not match["number"] or "params.json" not in names:
            return folder, [path.name], None
        return folder, _meta_shards(folder, names), None
    for index, single in zip(_INDEXES, _SINGLES, strict=True):
        if index in names:
            return folder, *_indexed(folder / index, names)
        if single in names:
            return folder, [single], None
    if "params.json" in names and any(map(_META.fullmatch, names)):
        return folder, _meta_shards(folder, names), None
    return folder, [_only_weights(folder, names)], None


def _parts(names: Iterable[str]) -> list[str]:
    """Names of the form model-00001-of-00003.safetensors."""
    return [name for name in names if re.search(r"-[0-9]{5}-of-[0-9]{5}\.", name)]


def _only_weights(folder: Path, names: list[str]) -> str:
    """The one weights file of a folder that uses none of the usual names."""
    for suffix in (".safetensors", ".bin", ".pth"):
        found = [name for name in names if name.endswith(suffix)]
        if _parts(found):
            problem = f"{shown(found[0])} is one of several, but no .index.json says of which"
            raise ModelFormatError(problem, path=folder, hint="Download the .index.json as well")
        if len(found) == 1:
            return found[0]
        if found:
            problem = f"{len(found)} {suffix} files, and nothing says which is the model"
            raise ModelFormatError(problem, path=folder, hint="Give the file itself")
    raise ModelFormatError("the folder holds no weights", path=folder, hint=NO_WEIGHTS)


def _meta_shards(folder: Path, names: list[str]) -> list[str]:
    """Meta's files in order, from 00 without a gap."""
    matches = [match for name in names if (match := _META.fullmatch(name))]
    numbered = [match for match in matches if match["number"]]
    if not numbered:
        return [matches[0].string]
    if len(numbered) > MOST_SHARDS:
        problem = f"{len(numbered)} shards; at most {MOST_SHARDS} are joined"
        raise ModelFormatError(problem, path=folder)
    for expected, match in enumerate(numbered):
        if int(match["number"]) > expected:
            name = f"consolidated.{expected:02d}.pth"
            hint = "Download it into the same folder"
            raise ModelFormatError(f"shard {name} is missing", path=folder, where=name, hint=hint)
        if int(match["number"]) < expected:
            raise ModelFormatError(f"shard {match['number']} is there twice", path=folder)
    return [match.string for match in numbered]


def _indexed(path: Path, names: list[str]) -> tuple[list[str], dict[str, str]]:
    """The files an index names, and its map from tensors to files; all plain names that exist."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        problem = "weight_map must map tensors to files"
        raise ModelFormatError(problem, path=path, field="weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            problem = "the file of a tensor must be a string"
            raise ModelFormatError(problem, path=path, where=f"tensor {shown(tensor)}")
    files = sorted(set(weight_map.values()))
    if len(files) > MOST_FILES:
        raise ModelFormatError(f"{len(files)} files; at most {MOST_FILES}", path=path)
    for name in files:
        _check_shard_name(path, name, names)
    return files, weight_map


def _check_shard_name(index: Path, name: str, names: list[str]) -> None:
    """A file named by a file: in the index's own folder, or in the cache its links lead to."""
    if not name or name in (".", "..") or any(mark in name for mark in "/\\:\0"):
        problem = f"it names the file {shown(name)}; only plain file names are followed"
        raise UnsafeModelError(problem, path=index, field="weight_map", value=name)
    if name not in names:
        alike = [other for other in names if other.lower() == name.lower()]
        hint = f"There is {shown(alike[0])}; rename it" if alike else "Download it as well"
        problem = f"the file {shown(name)} that it names is missing"
        raise ModelFormatError(problem, path=index, field="weight_map", value=name, hint=hint)
    try:
        target, folder = (index.parent / name).resolve(strict=True), index.parent.resolve()
    except (OSError, RuntimeError) as error:
        problem = f"the file {shown(name)} that it names cannot be found"
        raise ModelFormatError(problem, path=index, field="weight_map", value=name) from error
    # Hugging Face's cache keeps files in <repository>/blobs and links to them.
    cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if not cached and target.parent != folder:
        problem = f"the file {shown(name)} is a link that leaves the folder"
        hint = "Copy the file into the folder, if you trust it"
        raise UnsafeModelError(problem, path=index, field="weight_map", value=name, hint=hint)


def _config(folder: Path, meta: bool) -> dict[str, Any]:
    path = folder / ("params.json" if meta else "config.json")
    if not path.exists():
        hint = "It must lie beside the weights"
        raise ModelConfigError("the file is missing", path=path, hint=hint)
    config = read_json(path)
    inner = config.get("model")
    if meta and "dim" not in config and isinstance(inner, dict):
        return inner
    return config


def _content(file: RawFile) -> str:
    """What a file's first bytes say that it is; anything else is refused with advice."""
    start = file.read(0, min(file.size, 512))
    if start[:4] == b"PK\x03\x04":
        return "pytorch"
    if start[:4] == b"GGUF":
        return "gguf"
    if start[8:9] == b"{":
        return "safetensors"
    promised = _SUFFIXES.get(file.path.suffix.lower(), "unknown")
    if start[:1] == b"\x08" and (promised == "onnx" or b"onnx" in start[:256].lower()):
        return "onnx"
    legacy = start[257:262] == b"ustar" or start[2:14] == b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
    if legacy or start[:1] == b"\x80":
        raise UnsupportedModelError(
            "a PyTorch file of the old format, before 1.6",
            path=file.path,
            hint="Load it with PyTorch where you trust it and save it as safetensors",
        )
    if start.startswith(b"version https://git-lfs"):
        problem, hint = (
            "this is a Git LFS pointer, not the file",
            "Run `git lfs pull` in its folder",
        )
        raise ModelFormatError(problem, path=file.path, hint=hint)
    return promised if promised in _READ else "unknown"  # their readers tell what is wrong


def _read_file(path: Path, files: ExitStack) -> tuple[Kind, dict[str, Tensor]]:
    """One file's kind and tensors; a name that promises another kind is refused."""
    file = files.enter_context(RawFile(path))
    kind, promised = _content(file), _SUFFIXES.get(path.suffix.lower())
    if kind not in _READ:
        problem = "it is no checkpoint"
        if kind in _CONTENTS:
            problem = f"it holds {_CONTENTS[kind]}, not a checkpoint"
        hint = "Give a safetensors or PyTorch file"
        raise ModelFormatError(problem, path=path, hint=hint)
    if promised not in (None, kind):
        problem = f"the name says {_CONTENTS[promised]}, but it holds {_CONTENTS[kind]}"
        hint = "Rename it if you trust where it came from"
        raise ModelFormatError(problem, path=path, hint=hint)
    if kind == "safetensors":
        return "safetensors", read_safetensors(file)
    return "pytorch", read_torch_file(file)


def _merged(
    folder: Path,
    names: list[str],
    shards: list[dict[str, Tensor]],
    index: dict[str, str] | None,
    notes: list[str],
) -> dict[str, Tensor]:
    """The tensors of all files; what the index says must be so."""
    holder: dict[str, str] = {}
    merged: dict[str, Tensor] = {}
    for name, shard in zip(names, shards, strict=True):
        for tensor in shard:
            if tensor in holder:
                problem = f"it is in {shown(holder[tensor])} and in {shown(name)}"
                raise ModelFormatError(problem, path=folder, where=f"tensor {shown(tensor)}")
            holder[tensor] = name
        merged.update(shard)
    for tensor, name in (index or {}).items():
        if holder.get(tensor) != name:
            problem = f"the index says it is in {shown(name)}, which does not hold it"
            raise ModelFormatError(problem, path=folder, where=f"tensor {shown(tensor)}")
    if index is not None:
        others = [other for other in _parts(_listed(folder)) if other not in names]
        others = [other for other in others if Path(other).suffix == Path(names[0]).suffix]
        notes += [f"{shown(other)} is not in the index and was ignored" for other in others]
        unlisted = [tensor for tensor in merged if tensor not in index]
        notes += [f"tensor {shown(tensor)} is not in the index" for tensor in unlisted[:8]]
    return merged


def _refuse_other_schemes(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Quantized checkpoints other than bitsandbytes' 4-bit ones, by the scheme's name."""
    section = config.get("quantization_config")
    section = {} if section is None else section
    if not isinstance(section, dict):
        problem = "quantization_config must be an object"
        raise ModelConfigError(problem, path=folder / "config.json", field="quantization_config")
    scheme = section.get("quant_method")
    if scheme is None and section.get("load_in_8bit") is not True:
        scheme = "bitsandbytes" if section.get("load_in_4bit") is True else None
    if section.get("load_in_8bit") is True:
        scheme = "bitsandbytes 8-bit"
    if scheme is None and any(name.endswith(".qweight") for name in tensors):
        scheme = "gptq or awq"
    if scheme is None and section:
        scheme = "an unnamed scheme"
    if scheme not in (None, "bitsandbytes"):
        raise UnsupportedModelError(
            f"the weights are quantized by {_scheme(scheme)}",
            path=folder,
            where="key 'quantization_config'",
            field="quant_method",
            value=scheme,
            allowed="bitsandbytes 4-bit, or none",
            hint="Get the original float16 or bfloat16 model",
        )


def _scheme(value: object) -> str:
    return shown(value) if isinstance(value, str) else "a scheme without a name"


def _usable(tensors: dict[str, Tensor], path: Path, notes: list[str]) -> dict[str, Tensor]:
    """Only tensors that read as floats; a weight that does not is refused by its type."""
    usable = {}
    for name, tensor in tensors.items():
        if tensor.dtype in FLOATS + UNPACKED:
            usable[name] = tensor
        elif name.endswith((".weight", ".bias")):
            error = unsupported_type(name, tensor.dtype)
            error.path = path
            raise error
        else:
            notes.append(f"tensor {shown(name)} of type {tensor.dtype} was ignored")
    packed = sorted({tensor.dtype for tensor in usable.values()} & set(UNPACKED))
    for dtype in packed:
        count = sum(tensor.dtype == dtype for tensor in usable.values())
        notes.append(f"{count} weights were unpacked from bitsandbytes' {dtype} (4 bits)")
    return usable
