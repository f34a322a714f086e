"""Tokens per second and bytes of weights per second, beside the device's copy bandwidth.

Models are synthetic: published shapes, random weights, written here from seeds. Speed does not
depend on what weights say.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import synthetic
import torch

import edgellama
from edgellama.gguf import open_gguf
from edgellama.weights import model_config
from gpu import bandwidth, provider, shapes
from gpu.capture import runtime_session
from gpu.parts import Given, Row, Skip, Task

PROMPT, DECODED, PREFILLED = 16, 128, 512  # tokens; decoded ones on CUDA
CONTEXT = 1024
Measure = Callable[..., Row]
GREEDY = edgellama.Sampling(temperature=0)


def tasks(given: Given) -> Iterator[Task]:
    copied = Copied(given.device)
    yield {"subject": "copy, read and written"}, lambda: {"gb_per_second": copied.measured() / 1e9}
    for shape, kind in shapes.LARGE if given.device == "cuda" and not given.quick else shapes.SMALL:
        subjects: dict[str, Measure] = {f"onnx {given.device}": _onnx}
        if given.device == "cpu":
            subjects["cpu"] = _cpu
        subjects["llama.cpp"] = _llama_cpp
        for name, measure in subjects.items():
            labels = {"shape": shape, "type": kind, "subject": name}
            yield labels, partial(measure, given, shape, kind, copied)
        shapes.remove(Path(given.scratch), shape, kind)
        if kind == "Q4_0":
            labels = {"shape": shape, "type": "float16", "subject": "torch"}
            yield labels, partial(_torch, given, shape, copied)


class Copied:
    """The copy bandwidth, measured once; None as a share's divisor where it cannot be."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.bandwidth: float | None = None

    def measured(self) -> float:
        self.bandwidth = bandwidth.copy_bandwidth(self.device)
        return self.bandwidth


def _file(given: Given, shape: str, kind: str) -> tuple[Path, int]:
    """The model, and bytes of weights that one token reads."""
    path = shapes.written(Path(given.scratch), shape, kind, given.ends)
    with open_gguf(path) as file:
        config = model_config(file)
        sizes = {name: info.n_bytes for name, info in file.tensors.items()}
    embedding = 0 if config.tied_output else sizes["token_embd.weight"]  # one row of it is read
    return path, sum(sizes.values()) - embedding


def _rates(tokens: float, n_bytes: int, copied: Copied) -> Row:
    """`tokens` per second as bytes per second, and as a share of the copy's."""
    return {
        "decode": tokens,  # the fastest way
        "weights_gb": n_bytes / 1e9,
        "gb_per_second": tokens * n_bytes / 1e9,
        "of_copy": tokens * n_bytes / copied.bandwidth if copied.bandwidth else None,
    }


# --- edgellama -----------------------------------------------------------------------------------


def _onnx(given: Given, shape: str, kind: str, copied: Copied) -> Row:
    provider.require(given.device)
    return _edgellama(given, shape, kind, copied, {"runtime": "onnx", "device": given.device})


def _cpu(given: Given, shape: str, kind: str, copied: Copied) -> Row:
    return _edgellama(given, shape, kind, copied, {"runtime": "cpu"})


def _edgellama(given: Given, shape: str, kind: str, copied: Copied, options: dict[str, Any]) -> Row:
    path, n_bytes = _file(given, shape, kind)
    free, began = _free(given), time.perf_counter()
    with edgellama.load(path, context=CONTEXT, **options) as model:
        loaded = time.perf_counter() - began
        decoded = DECODED if given.device == "cuda" else DECODED // 4
        list(model.generate([1] * PROMPT, GREEDY, max_tokens=decoded))  # warm: captures the graph
        stepwise, session = [], model.session()
        session.forward([1] * PROMPT)
        for _ in range(decoded):
            began = time.perf_counter()
            session.forward([7])
            stepwise.append(time.perf_counter() - began)
        ways = {"generate": _generated(model, decoded), "steps": 1 / sorted(stepwise)[decoded // 2]}
        if given.device == "cuda":
            ways["fed"] = _fed(model, decoded)
        row = _rates(max(ways.values()), n_bytes, copied) | ways
        row["prefill"] = PREFILLED / bandwidth.median(
            partial(_prefill, session), "cpu", times=3, warm=1
        )
        row["memory_gb"] = (free - _free(given)) / 1e9 if given.device == "cuda" else None
    return row | {"load_seconds": loaded}


def _generated(model: edgellama.Model, tokens: int) -> float:
    """Greedy tokens per second: between the first and the last of `tokens`."""
    times = [time.perf_counter() for _ in model.generate([1] * PROMPT, GREEDY, max_tokens=tokens)]
    if len(times) < tokens // 2:
        raise RuntimeError(f"the reply ended after {len(times)} tokens")
    return (len(times) - 1) / (times[-1] - times[0])


def _fed(model: edgellama.Model, tokens: int) -> float:
    """Tokens per second of the graph that feeds itself."""
    session = runtime_session(model)
    session.forward([1] * PROMPT)
    token = int(session.step(7).ids[0])  # captured here
    began = time.perf_counter()
    for _ in range(tokens):
        token = int(session.step(token).ids[0])
    taken = time.perf_counter() - began
    session.close()
    return tokens / taken


def _prefill(session: edgellama.Session) -> None:
    session.truncate(0)
    session.forward([5] * PREFILLED)


def _free(given: Given) -> int:
    return torch.cuda.mem_get_info()[0] if given.device == "cuda" else 0


# --- what it is compared with --------------------------------------------------------------------


def _torch(given: Given, shape: str, copied: Copied) -> Row:
    if given.device != "cuda":
        raise Skip("half precision is compared on CUDA only")
    from gpu.torch_step import Step, captured

    step = Step(synthetic.SHAPES[shape], "cuda", torch.float16, PROMPT + DECODED // 2)
    try:
        eager = bandwidth.median(step, "cuda")
        graph = captured(step)
        seconds = bandwidth.median(graph.replay, "cuda", times=DECODED)
        row = _rates(1 / seconds, step.weight_bytes, copied)
        return row | {"note": f"a captured graph; eager {1 / eager:.0f} tokens/s"}
    finally:
        del step
        torch.cuda.empty_cache()


def _llama_cpp(given: Given, shape: str, kind: str, copied: Copied) -> Row:
    try:
        import llama_cpp
    except ImportError as error:
        raise Skip(f"llama-cpp-python is not installed: {error}") from error
    offloads = llama_cpp.llama_supports_gpu_offload()
    if given.device == "cuda" and not offloads:
        raise Skip(f"llama-cpp-python {llama_cpp.__version__} was built without CUDA")
    path, n_bytes = _file(given, shape, kind)
    layers = -1 if given.device == "cuda" else 0
    model = llama_cpp.Llama(
        str(path), n_gpu_layers=layers, n_ctx=CONTEXT, n_batch=PREFILLED, verbose=False
    )
    began = time.perf_counter()
    model.eval([5] * PREFILLED)
    prefill = PREFILLED / (time.perf_counter() - began)
    model.reset()
    model.eval([1] * PROMPT)
    times = []
    for _ in range(DECODED if given.device == "cuda" else DECODED // 4):
        began = time.perf_counter()
        model.eval([7])
        times.append(time.perf_counter() - began)
    model.close()
    tokens = 1 / sorted(times)[len(times) // 2]
    return _rates(tokens, n_bytes, copied) | {"prefill": prefill}
