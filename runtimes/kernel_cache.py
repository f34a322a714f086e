"""Compiled kernels on disk, and in this process.

A kernel is a plain object file, loaded by LLVM alone: a process that finds its kernels here never
imports Numba. Files are private to the user, written atomically, and checked before use: the name
holds a hash of the kernels' source and of the compiler's version, the contents their own checksum.
A damaged file is compiled anew; a folder that cannot be used costs a compilation, not a failure.
Kernels of other releases (or compilers, or sources) stay while few such have been written since.
An app can bring kernels along: their folder is searched first, and checked in the same way; see
`shipped_kernels.py`.

Knows nothing about what kernels do.
"""

import ctypes
import hashlib
import logging
import re
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

import edgellama
from edgellama import ggml
from edgellama.control import CancelToken, Progress
from edgellama.errors import DeviceUnavailable, OutputError
from edgellama.output import atomic_output, sweep
from edgellama.paths import cache_dir
from edgellama.runtimes import shipped_kernels
from edgellama.runtimes.levels import Level
from edgellama.runtimes.workshop import Workshop

_LOG = logging.getLogger("edgellama")
_MAGIC = b"edgellama kernel 1\n"
_NAME = re.compile(r"edgellama_.+-([0-9a-f]{16})\.o")  # see `_named`
OTHERS = 7  # fingerprints that stay in the cache beside the own: 1 to 3 MB each
_SOURCES = [  # what the machine code follows from
    "abi",
    "attention_block",
    "compiler",
    "kernel_team",
    "kernels",
    "kernels_attention",
    "kernels_cache",
    "kernels_linear",
    "kernels_tiles",
    "level_floats",
    "level_sources",
    "level_text",
    "level_tiles",
    "levels",
    "memory",
    "pieces",
    "pieces_quants",
    "repack",
    "simd",
    "vectors",
]
_ENCODERS = [  # the same of quantize/
    "encode_k",
    "encode_k_scales",
    "encode_lanes",
    "encode_packing",
    "encode_search",
    "encode_simple",
]

warnings = shipped_kernels.warnings  # and why kernels are not cached; for `model.info`

_lock = threading.Lock()
_loaded: dict[tuple[str, str], int] = {}  # (level, kernel) -> address
_engines: list[Any] = []  # they own the machine code; kept for the life of the process


def addresses(
    names: Iterable[str],
    level: Level,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> dict[str, int]:
    """Where each kernel's machine code is in memory; compiled first if need be.

    Names are `lead`, `follow`, `norm`… or `linear:Q4_1`, `fine:Q8_0`, `embed:F16`, or,
    for encoding without importance and with it, `encode:Q4_K`, `weighted:Q4_K`. `progress` is
    called with (done, total, "compiling kernels") while kernels are compiled, in another thread:
    this one answers `cancel` and signals meanwhile. Raises Cancelled.
    """
    names = list(dict.fromkeys(names))
    missing = [name for name in names if (level.name, name) not in _loaded]
    if missing:
        objects = objects_of(missing, level, progress, cancel)
        with _lock:  # another caller may have loaded some meanwhile
            _load({k: v for k, v in objects.items() if (level.name, k) not in _loaded}, level)
    return {name: _loaded[level.name, name] for name in names}


def objects_of(
    names: list[str],
    level: Level,
    progress: Progress | None = None,
    cancel: CancelToken | None = None,
) -> dict[str, bytes]:
    """Object code by kernel name: what is kept, and the rest compiled. Any level will do."""
    found = kept(names, level)
    missing = [(name, level) for name in names if name not in found]
    if missing:
        made = _workshop.order(missing, progress, cancel, "compiling kernels")
        found |= {name: code for (name, _), code in made.items()}
    return found


def kept(names: Iterable[str], level: Level) -> dict[str, bytes]:
    """Object code of the kernels that an app brought along, or that are in the cache."""
    found = {}
    for name in names:
        code = _read(_named(shipped_kernels.folder(), name, level))
        if code is None:
            code = _read(_file(name, level))
        if code is not None:
            found[name] = code
    return found


def _make(name: str, level: Level) -> bytes:
    """Compile a kernel and keep it; runs in the workshop's thread."""
    code = _compile(name, level)
    _write(_file(name, level), code)
    return code


def _compile(name: str, level: Level) -> bytes:
    try:
        from edgellama.runtimes.compiler import object_code
    except ImportError as error:  # a frozen app may leave the compiler out
        raise DeviceUnavailable(
            f"the kernel {name} for {level.name} is not here, and what compiles it is not "
            f"installed ({error})",
            hint=f"Ship it: `edgellama warmup --into DIR`, and {shipped_kernels.VARIABLE}=DIR",
        ) from error

    kind, _, type_name = name.partition(":")
    if kind in ("encode", "weighted"):
        from edgellama.quantize.encode_k import kernel

        return object_code(symbol(name), kernel(type_name, weighted=kind == "weighted"), level)
    from edgellama.runtimes import (
        kernel_team,
        kernels,
        kernels_attention,
        kernels_cache,
        kernels_linear,
        kernels_tiles,
    )

    if type_name:
        makers: dict[str, Callable[[str], Callable[..., None]]] = {
            "attention": kernels_attention.attention,
            "linear": kernels_linear.linear,
            "fine": partial(kernels_linear.linear, fine=True),
            "embed": kernels_linear.embed,
            "tiles": kernels_tiles.tiles,
            "plain_tiles": partial(kernels_tiles.tiles, unit="plain_tiles"),
        }
        return object_code(symbol(name), makers[kind](type_name), level)
    homes = (kernels, kernels_cache, kernels_attention, kernel_team)
    home = next(home for home in homes if hasattr(home, kind))
    return object_code(symbol(name), getattr(home, kind), level)


_workshop: Workshop[tuple[str, Level], bytes] = Workshop("edgellama-compile", _make)


def symbol(name: str) -> str:
    """The C name of a kernel."""
    return "edgellama_" + name.replace(":", "_")


def _load(objects: dict[str, bytes], level: Level) -> None:
    if not objects:
        return
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    for code in objects.values():
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    for name in objects:
        _loaded[level.name, name] = engine.get_function_address(symbol(name))


# --- files ---------------------------------------------------------------------------------------


@cache
def _fingerprint() -> str:
    """Changes whenever a kernel or what compiles it does."""
    triple = re.sub(r"(darwin|macosx)[0-9.]+", r"\1", llvm.get_default_triple())  # any release
    facts = (llvmlite.__version__, triple, edgellama.__version__, ggml.IQ4_NL, sources_digest())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@cache
def sources_digest() -> str:
    """Of what kernels are made of. A frozen app has no sources: it brings the digest along."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    sources = [here / f"{name}.py" for name in _SOURCES]
    sources += [here.parent / "quantize" / f"{name}.py" for name in _ENCODERS]
    try:
        for source in sources:
            digest.update(source.read_bytes())
    except OSError:
        return shipped_kernels.sources() or "unknown"  # its version has to do
    return digest.hexdigest()


@cache
def _folder() -> Path | None:
    """The cache folder, or None where it cannot be had or others could write into it."""
    try:
        return cache_dir("kernels")
    except OutputError as error:
        warnings.append(f"kernels are compiled at every start: {error}")
        return None


def _file(name: str, level: Level) -> Path | None:
    return _named(_folder(), name, level)


def _named(folder: Path | None, name: str, level: Level) -> Path | None:
    return folder and folder / f"{symbol(name)}-{level.name}-{_fingerprint()}.o"


def is_current(file: str) -> bool:
    """Whether a file of this name could be of use to this release."""
    return file.endswith(f"-{_fingerprint()}.o")


def _read(file: Path | None) -> bytes | None:
    """The object code, or None if the file is not there or not what was written."""
    if file is None:
        return None
    try:
        data = file.read_bytes()
    except OSError:
        return None
    head = len(_MAGIC) + 32
    code = data[head:]
    if data[:head] != _head(file, code):
        _LOG.warning("a damaged kernel file is compiled anew: %s", file.name)
        return None
    return code


def _head(file: Path, code: bytes) -> bytes:
    """What stands before the code: a file under another's name is damaged too."""
    return _MAGIC + hashlib.sha256(file.name.encode() + b"\0" + code).digest()


def _write(file: Path | None, code: bytes) -> None:
    if file is None:
        return
    try:
        _put(file, code)
        _prune(file.parent)
    except OSError as error:
        _LOG.warning("a kernel could not be cached: %s", error)


@cache
def _prune(folder: Path) -> None:
    """Once a process: remove kernels of fingerprints that have not been written for longest.

    Another process may miss a file that it was about to read, and compiles it. Raises OSError.
    """
    files: dict[str, list[Path]] = {}
    for file in folder.iterdir():
        match = _NAME.fullmatch(file.name)
        if match and match[1] != _fingerprint():
            files.setdefault(match[1], []).append(file)
    latest = sorted(files, key=lambda each: max(map(_written, files[each])), reverse=True)
    for fingerprint in latest[OTHERS:]:
        for file in files[fingerprint]:
            with suppress(OSError):
                file.unlink()
    sweep(folder, ".edgellama_")  # of killed processes, too


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # gone meanwhile
        return 0.0


def _put(file: Path, code: bytes) -> None:
    with atomic_output(file) as output:
        output.write(_head(file, code) + code)


def ship(objects: dict[str, bytes], level: Level, folder: Path) -> int:
    """Write kernels as files of a folder that an app brings along; returns bytes.

    Raises OutputError.
    """
    for name, code in objects.items():
        file = _named(folder, name, level)
        assert file is not None
        _put(file, code)
    return sum(map(len, objects.values()))


def function(address: int, n_arguments: int) -> Callable[..., None]:
    """A kernel as a Python callable; the interpreter's lock is released while it runs."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * n_arguments)(address)
