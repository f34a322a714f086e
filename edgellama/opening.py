"""Loading a model: checks what was asked for, opens the file, and brings up its runtime.

Knows nothing about operators or formats of weights.
"""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgellama.config import ModelConfig
from edgellama.control import CancelToken, Progress, require_progress, require_token
from edgellama.errors import (
    ModelConfigError,
    OutOfMemory,
    ParameterError,
    require_choice,
    require_integer,
    require_path,
    shown,
)
from edgellama.gguf import GGUF, open_gguf
from edgellama.graph import Graph, decoder
from edgellama.machine import available_memory, usable_cores
from edgellama.model import Model
from edgellama.paths import absolute, model_path
from edgellama.runtimes.base import Options, Runtime
from edgellama.tokenizer import Tokenizer, tokenizer_from_gguf
from edgellama.weights import check_tensors, model_config

if TYPE_CHECKING:
    from edgellama.runtimes.onnx_folder import OnnxFolder

RUNTIMES = ("auto", "cpu", "onnx", "reference", "llama.cpp")
DEVICES = ("auto", "cpu", "cuda")
CONTEXT_STEP = 256  # a context is a multiple of this
MEMORY_SHARE = 0.8  # of what is available, for weights and cache together

_LOG = logging.getLogger("edgellama")


def load(
    path: "str | os.PathLike[str]",
    runtime: str = "auto",
    *,
    device: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    kv_type: str = "f16",
    dtype: str | None = None,
    accuracy: int | None = None,
    deterministic: bool = False,
    cancel: CancelToken | None = None,
    progress: Progress | None = None,
) -> "Model":
    """Load a model from a `.gguf` file, a folder that `edgellama quantize` made for ONNX Runtime,
    or by the name of one already pulled; never from a network.

    runtime: "cpu" (the default for `.gguf`), "onnx" (for ONNX folders; a `.gguf` file is
    transcoded into the cache once), "reference" (NumPy, slow) or "llama.cpp". "onnx" and
    "llama.cpp" need extras of these names. device: "cpu", or for onnx "cuda".
    threads: None for the physical cores within affinity and cgroup quota.
    context: tokens a session can hold; None for the model's own, or what fits 80 % of the
    memory available, in steps of 256. kv_type: "f16", "f32" or "q8_0", how
    keys and values are kept (onnx on the CPU always keeps float32). accuracy: onnx on the CPU, 4
    (the default) rounds activations to 8 bits, 0 computes in float32.
    dtype: reference only, "float32" or "float64". deterministic: cpu only; the same bits for
    any chunking, prefill or decode. Without it they differ at level `amx` alone, where 32 tokens
    and more of a quantized model go through bfloat16 tiles: faster, and nearer to full precision.
    progress: called with (done, total, what).

    Raises ModelFormatError, UnsupportedModelError, ModelConfigError, TokenizerError or
    NonFiniteError for the file; ParameterError, DeviceUnavailable, OutOfMemory, Cancelled.
    """
    name = require_path("path", path)
    require_token(cancel)
    require_progress(progress)
    accuracy = _check_kinds(kv_type, dtype, accuracy)
    chosen = chosen_runtime(runtime, device, dtype, deterministic, accuracy)
    file_path = absolute(model_path(name))
    folder = _onnx_folder(file_path, runtime, cancel, progress)
    if folder is not None:
        chosen = "onnx"
    with open_gguf(file_path, cancel=cancel) if folder is None else folder.file as file:
        config, tokenizer, warnings = _checked(file, file_path, cancel)
        on_cpu = chosen == "onnx" and device != "cuda"
        options = Options(
            context=_context(context, config, file, "f32" if on_cpu else kv_type),
            threads=_threads(threads),
            kv_type=kv_type,
            dtype=dtype,
            deterministic=deterministic,
            accuracy=accuracy,
            device=device,
            cancel=cancel,
            progress=progress,
        )
        graph = decoder(config)
        opened = _open_runtime(chosen, folder or file, graph, options)
        model = Model(file, graph, tokenizer, opened, options, warnings)
    for warning in model.info.warnings:
        _LOG.warning("%s: %s", file_path.name, warning)
    return model


def _check_kinds(kv_type: object, dtype: object, accuracy: object) -> int | None:
    """Refuse what no runtime takes; what each does of the rest, it says itself. The accuracy."""
    names = {"kv_type": (kv_type, "f16, f32, q8_0")}
    if dtype is not None:
        names["dtype"] = dtype, "a type's name, or None"
    for name, (value, allowed) in names.items():
        if not isinstance(value, str):
            problem = f"{name} = {shown(value)}; allowed: {allowed}"
            raise ParameterError(problem, field=name, value=value, allowed=allowed)
    return None if accuracy is None else require_integer("accuracy", accuracy, 0, 4)


def _checked(
    file: GGUF, path: Path, cancel: CancelToken | None
) -> tuple[ModelConfig, Tokenizer, list[str]]:
    """Config and tokenizer, which must fit the tensors and each other; what is odd but allowed."""
    config = model_config(file)
    warnings = [*file.warnings, *check_tensors(file, config)]
    if cancel:
        cancel.check("loading the model")
    tokenizer = tokenizer_from_gguf(file.metadata, path=path, cancel=cancel)
    _check_vocabulary(tokenizer, config, path)
    if cancel:
        cancel.check("loading the model")
    return config, tokenizer, warnings


def _onnx_folder(
    path: Path, runtime: str, cancel: CancelToken | None, progress: Progress | None
) -> "OnnxFolder | None":
    """The checked folder, if the path is one for ONNX Runtime; None for anything else."""
    foreign = path.suffix.lower() in (".onnx", ".ort")
    if not foreign and not (path.is_dir() and any(path.glob("*.onnx"))):
        return None
    if path.is_file() and _is_gguf(path):  # whatever its name
        return None
    from edgellama.runtimes.onnx_folder import open_folder

    if runtime not in ("auto", "onnx"):
        problem = f"runtime = {runtime!r} runs .gguf files; this is for the onnx runtime"
        raise ParameterError(problem, path=path, field="runtime", value=runtime, allowed="onnx")
    return open_folder(path, cancel=cancel, progress=progress)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def chosen_runtime(
    runtime: str,
    device: str,
    dtype: str | None = None,
    deterministic: bool = False,
    accuracy: int | None = None,
) -> str:
    """The runtime to open; what cannot be had, or does not fit it, is refused."""
    require_choice("runtime", runtime, RUNTIMES)
    require_choice("device", device, DEVICES)
    if not isinstance(deterministic, bool):
        allowed = "True, False"
        problem = f"deterministic is {shown(deterministic)}; allowed: {allowed}"
        raise ParameterError(problem, field="deterministic", value=deterministic, allowed=allowed)
    chosen = "cpu" if runtime == "auto" else runtime
    if device == "cuda" or (runtime == "auto" and accuracy is not None):
        require_choice("runtime", runtime, ("auto", "onnx"))
        chosen = "onnx"
    owners = ("onnx",) if device == "cuda" else ("reference",)
    for name, value, unset, fitting in (
        ("dtype", dtype, None, owners),
        ("deterministic", deterministic, False, ("cpu",)),
        ("accuracy", accuracy, None, ("onnx",)),
    ):
        if value is not unset and chosen not in fitting:
            problem = f"{name} is for the {fitting[0]} runtime only"
            allowed = f"{unset} for {chosen}"
            raise ParameterError(problem, field=name, value=value, allowed=allowed)
    return chosen


def _open_runtime(name: str, file: "GGUF | OnnxFolder", graph: Graph, options: Options) -> Runtime:
    """Import only the runtime that is asked for; frozen apps need the literal names."""
    if name == "onnx":
        from edgellama.runtimes.ort import Ort

        return Ort(file, graph, options)
    assert isinstance(file, GGUF)
    if name == "reference":
        from edgellama.runtimes.reference import Reference

        return Reference(file, graph, options)
    if name == "llama.cpp":
        from edgellama.runtimes.llamacpp import LlamaCpp

        return LlamaCpp(file, graph, options)
    from edgellama.runtimes.cpu import Cpu

    return Cpu(file, graph, options)


def _check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, path: Path) -> None:
    """Every id the tokenizer can give must have a row in the embedding."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the embedding {config.vocab_size} rows",
            path=path,
            where="key 'tokenizer.ggml.tokens'",
            field="tokenizer.ggml.tokens",
            value=tokenizer.vocab_size,
            allowed=f"at most {config.vocab_size}",
        )


def _threads(threads: int | None) -> int:
    return usable_cores() if threads is None else require_integer("threads", threads, 1, 1024)


def _context(wanted: int | None, config: ModelConfig, file: GGUF, kv_type: str) -> int:
    """Tokens a session will hold. Refuses a model or a context that memory cannot hold."""
    if wanted is not None:
        wanted = require_integer("context", wanted, 1, config.context_length)
    weights = sum(info.n_bytes for info in file.tensors.values())
    numbers = 2 * config.n_layers * config.kv_dim  # a token's keys and values
    per_token = {"f32": numbers * 4, "q8_0": numbers * 34 // 32}.get(kv_type, numbers * 2)
    least = wanted or min(CONTEXT_STEP, config.context_length)
    available = available_memory()
    if available is None:
        return wanted or config.context_length
    room = int(available * MEMORY_SHARE)
    if weights + least * per_token > room:
        raise OutOfMemory(
            f"needs {_gib(weights + least * per_token)} (weights {_gib(weights)}, {least} tokens "
            f"of context {_gib(least * per_token)}); {_gib(room)} is {MEMORY_SHARE:.0%} of "
            "what is available",
            path=file.path,
            hint="Use a smaller context or a model with fewer bits per weight",
        )
    fitting = (room - weights) // per_token // CONTEXT_STEP * CONTEXT_STEP
    return wanted or min(config.context_length, max(fitting, least))


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
