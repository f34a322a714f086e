"""Tensors of a file that `torch.save` wrote: a zip archive of a pickle and its storages.

The pickle is interpreted, never run, and tensors are read on demand whatever their strides.
Source: PyTorch's `caffe2/serialize/inline_container.h` for the layout. Knows nothing about models.
"""

import math
from functools import partial
from typing import Any

import numpy as np

from edgellama.errors import EdgeLlamaError, ModelFormatError, UnsupportedModelError, shown
from edgellama.quantize.pickled_values import PickledDict, Storage, View
from edgellama.quantize.pickles import read_pickle
from edgellama.quantize.raw_file import RawFile
from edgellama.quantize.tensor import STORED, Bits, Tensor
from edgellama.quantize.zip_entries import Entry, zip_entries

LONGEST_PICKLE = 64 * 2**20  # bytes
MOST_TENSORS = 65_536
SMALL_SPAN = 2**16  # elements read in one go even if few of them are wanted
WRAPPERS = ("model", "state_dict", "module")  # keys under which training scripts put the tensors


def read_torch_file(file: RawFile) -> dict[str, Tensor]:
    """The tensors of a state dict by name; only the pickle is read now.

    Raises UnsafeModelError naming what the pickle asks to run, UnsupportedModelError for big
    endian data, TorchScript and tensors that are not plain ones, ModelFormatError for damage.
    """
    entries = zip_entries(file)
    pickle, root = _pickle_entry(file, entries)
    _check_byte_order(file, entries, root)
    where = f"zip entry {shown(pickle.name)}"
    data = read_pickle(file.read(pickle.start, pickle.size, where), file.path, where)
    views = _state_dict(file, data)
    types: dict[str, Storage] = {}
    tensors = {}
    for name, view in views.items():
        start = _storage_start(file, entries, root, name, view.storage, types)
        shape = view.size
        fetch = partial(_rows, file, start, name, view)
        tensors[name] = Tensor(name, shape, view.storage.dtype, fetch)
    return tensors


def _refuse(file: RawFile, problem: str, where: str) -> EdgeLlamaError:
    return ModelFormatError(problem, path=file.path, where=where)


def _pickle_entry(file: RawFile, entries: dict[str, Entry]) -> tuple[Entry, str]:
    """The entry `<root>/data.pkl` and its root."""
    found = [entry for name, entry in entries.items() if name.endswith("/data.pkl")]
    if len(found) != 1:
        problem = f"{len(found)} entries named data.pkl; expected one"
        raise _refuse(file, problem, "zip archive")
    root = found[0].name.removesuffix("data.pkl")
    if any(name.startswith((f"{root}code/", f"{root}constants.pkl")) for name in entries):
        raise UnsupportedModelError(
            "the file is a TorchScript program, not a checkpoint",
            path=file.path,
            hint="Get the model's safetensors files",
        )
    if found[0].size > LONGEST_PICKLE:
        problem = f"{found[0].size} bytes; at most {LONGEST_PICKLE} are read"
        raise _refuse(file, problem, f"zip entry {shown(found[0].name)}")
    return found[0], root


def _check_byte_order(file: RawFile, entries: dict[str, Entry], root: str) -> None:
    entry = entries.get(root + "byteorder")
    if entry is None:  # older files have none and are little endian
        return
    order = file.read(entry.start, min(entry.size, 16))
    if order != b"little":
        raise UnsupportedModelError(
            f"byte order {shown(order)}; only little-endian files are read",
            path=file.path,
            where=f"zip entry {shown(entry.name)}",
            value=order,
            allowed="little",
        )


def _state_dict(file: RawFile, data: object) -> dict[str, View]:
    """The tensors by name: of the pickle's dict, or of the dict a training script put in it."""
    for key in (None, *WRAPPERS):
        inner = data if key is None else data.get(key) if isinstance(data, PickledDict) else None
        if not isinstance(inner, PickledDict):
            continue
        views = {str(name): view for name, view in inner.items() if isinstance(view, View)}
        if len(views) > MOST_TENSORS:
            raise _refuse(file, f"{len(views)} tensors; at most {MOST_TENSORS}", "pickle")
        if views:
            return views
    raise _refuse(file, "it holds no dict of tensors", "pickle")


def _storage_start(
    file: RawFile,
    entries: dict[str, Entry],
    root: str,
    name: str,
    storage: Storage,
    types: dict[str, Storage],
) -> int:
    """Where a tensor's storage begins in the file, once its size is what the pickle says."""
    where = f"tensor {shown(name)}"
    if types.setdefault(storage.key, storage) != storage:
        problem = f"storage {shown(storage.key)} is declared twice with different types or sizes"
        raise _refuse(file, problem, where)
    entry = entries.get(f"{root}data/{storage.key}")
    if entry is None:
        raise _refuse(file, f"its storage {shown(storage.key)} is missing", where)
    size = storage.count * STORED[storage.dtype].itemsize
    if entry.size != size:
        problem = f"{storage.count} values of {storage.dtype} take {size} bytes"
        problem += f", but storage {shown(storage.key)} has {entry.size}"
        raise _refuse(file, problem, where)
    return entry.start


def _rows(file: RawFile, start: int, name: str, view: View, first: int, last: int) -> Bits:
    """Rows of a tensor as stored."""
    kind = STORED[view.storage.dtype]
    size, offset = view.size, view.offset
    if size:
        size, offset = (last - first, *size[1:]), offset + first * view.stride[0]
    out = np.empty(size, kind)
    if out.size:
        _gather(file, start, f"tensor {shown(name)}", out, offset, view.stride)
    return out


def _gather(
    file: RawFile, start: int, where: str, out: Bits, offset: int, stride: tuple[int, ...]
) -> None:
    """Fill `out` with the elements that lie at `offset` and the strides of a storage.

    What lies close together is read in one go; otherwise the axis that jumps farthest is walked,
    so that a few rows of a transposed matrix do not need the whole of it in memory.
    """
    steps = [step if n > 1 else 0 for n, step in zip(out.shape, stride, strict=True)]
    span = 1 + sum((n - 1) * step for n, step in zip(out.shape, steps, strict=True))
    item = out.dtype.itemsize
    if span == out.size and _is_row_major(out.shape, steps):
        whole = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
        file.read_into(start + offset * item, whole, where)
        out[...] = whole
    elif span <= max(SMALL_SPAN, 2 * out.size):
        block: Any = np.empty(span, out.dtype)
        file.read_into(start + offset * item, block, where)
        byte_steps = [step * item for step in steps]
        out[...] = np.lib.stride_tricks.as_strided(block, out.shape, byte_steps, writeable=False)
    else:
        axis = max(range(out.ndim), key=steps.__getitem__)
        for index in range(out.shape[axis]):
            part = out[(slice(None),) * axis + (slice(index, index + 1),)]
            _gather(file, start, where, part, offset + index * steps[axis], stride)


def _is_row_major(shape: tuple[int, ...], steps: list[int]) -> bool:
    expected = math.prod(shape)
    for n, step in zip(shape, steps, strict=True):
        expected //= n
        if n > 1 and step != expected:
            return False
    return True
