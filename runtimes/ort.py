"""The decoder graph on ONNX Runtime (the extra `onnx`), on the CPU or on CUDA.

The graph is lowered anew for every load; ONNX Runtime reads the weights from the folder's data
file itself. Keys and values lie in buffers that are input and output at once. Knows nothing about
formats of weights or text.
"""

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellama import rope
from edgellama.control import CancelToken
from edgellama.errors import (
    EdgeLlamaError,
    ForkedProcess,
    OutOfMemory,
    ParameterError,
    UnsupportedModelError,
)
from edgellama.gguf import GGUF
from edgellama.graph import Graph
from edgellama.runtimes.base import Options
from edgellama.runtimes.onnx_cache import transcoded
from edgellama.runtimes.onnx_device import Device, bindings
from edgellama.runtimes.onnx_folder import OnnxFolder
from edgellama.runtimes.onnx_lowering import (
    LOGITS,
    Manner,
    cache_names,
    cache_width,
    lower,
    new_name,
)

CHUNK = 256  # tokens computed at once
ROWS = 64  # the same where every token's logits are wanted
ANGLES = 1024  # positions whose angles are computed at once, when they are first needed
_LOOK = 0.02  # seconds between two looks at a cancel token
_QUIET = 4  # of ONNX Runtime's log: its errors come as exceptions


class Ort:
    """One model's weights in ONNX Runtime's hands."""

    def __init__(
        self,
        source: GGUF | OnnxFolder,
        graph: Graph,
        options: Options,
        manner: Manner | None = None,
    ) -> None:
        self.api, self.telemetry = bindings()
        self.device = Device.of(self.api, options)
        self.graph, self.options = graph, options
        self.manner = manner or self.device.manner(options)
        self.warnings: list[str] = []
        if isinstance(source, GGUF):
            how = self.device.containers
            source, self.warnings = transcoded(source, graph, options, how)
            source.close()  # its metadata is not needed: only the data file is
        self.folder = source
        self.lock = threading.Lock()  # one step at a time, as the other runtimes do
        self.pid = os.getpid()
        self.angles = _Angles(graph, source.rope_factors, options.context)
        model = lower(graph, source.layout, self.manner)
        self.inputs = [value.name for value in model.inputs]
        self.session_: Any = self._open(model.to_bytes())

    def _open(self, model: bytes) -> Any:
        """The inference session. A cancelled load ends when ONNX Runtime next looks."""
        api, options = self.api, self._session_options()
        if self.options.cancel:
            self.options.cancel.check("load")
        try:
            with _watched(self.options.cancel, lambda: options.set_load_cancellation_flag(True)):
                session = api.InferenceSession(model, options, providers=self.device.providers)
        except Exception as error:
            if self.options.cancel:
                self.options.cancel.check("load")
            raise _translated(error, self.folder.path) from error
        self.device.check(session)
        return session

    def _session_options(self) -> Any:
        api, options = self.api, self.api.SessionOptions()
        options.intra_op_num_threads = self.options.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _QUIET
        if not self.manner.fused:
            options.graph_optimization_level = api.GraphOptimizationLevel.ORT_DISABLE_ALL
        for key, value in {
            "session.model_external_initializers_file_folder_path": str(self.folder.path),
            "session.record_ep_graph_assignment_info": "1",
            **self.device.entries,
        }.items():
            options.add_session_config_entry(key, value)
        return options

    def session(self) -> "OrtSession":
        return OrtSession(self)

    def describe(self) -> dict[str, Any]:
        session = self.session_
        return {
            "runtime": "onnx",
            "device": self.device.name,
            "threads": self.options.threads,
            "version": self.api.get_version_string(),
            "providers": session.get_providers(),
            "nodes": _placement(session),
            "accuracy": self.manner.accuracy,
            "kv_type": {"float32": "f32", "float16": "f16"}.get(self.manner.dtype, "bf16"),
            "weights": list(self.folder.notes),
            "telemetry": self.telemetry,
            "bytes": self.memory(),
        }

    def memory(self) -> dict[str, int]:
        """ONNX Runtime keeps some weights twice, and does not say which."""
        c = self.graph.config
        item = 4 if self.manner.dtype == "float32" else 2
        numbers = 2 * c.n_layers * c.n_kv_heads * cache_width(c)
        cache = numbers * item * self.options.context
        return {"weights": self.folder.layout.size, "kv_cache": cache, "scratch": 0}

    def close(self) -> None:
        if os.getpid() != self.pid:
            return
        with self.lock:
            self.session_ = None


class _Angles:
    """Cosines and sines of all positions of a context, computed when first needed."""

    def __init__(self, graph: Graph, factors: list[float] | None, context: int) -> None:
        self.rope, self.factors, self.done = graph.config.rope, factors, 0
        shape = (context, self.rope.dim // 2)
        self.cos, self.sin = np.empty(shape, np.float32), np.empty(shape, np.float32)

    def need(self, positions: int) -> None:
        while self.done < positions:
            stop = min(self.done + ANGLES, len(self.cos))
            at = slice(self.done, stop)
            self.cos[at], self.sin[at] = rope.angles(self.rope, self.done, stop, self.factors)
            self.done = stop


class OrtSession:
    """One conversation: buffers for keys and values, and what every call is bound to."""

    def __init__(self, model: Ort) -> None:
        self.model, self.api = model, model.api
        self.position, self.stopped = 0, False
        c, context = model.graph.config, model.options.context
        dtype = np.dtype(model.manner.dtype)
        shape = (1, c.n_kv_heads, context, cache_width(c))
        try:  # pages that are not touched cost nothing
            self.cache = {n: np.zeros(shape, dtype) for n in cache_names(c.n_layers)}
        except MemoryError as error:
            raise OutOfMemory(f"no room for a context of {context} tokens") from error
        self.token, self.row = np.zeros((1, 1), np.int64), np.zeros(1, np.int64)
        self.past, self.total = np.zeros(1, np.int32), np.zeros((), np.int32)
        self.one = np.zeros((1, 1, c.vocab_size), np.float32)
        self.decode, self.prefill = self._binding(), self._binding()
        self.positions = np.zeros((1, 1), np.int64)
        self._bind(self.decode, self.token, self.positions, self.row, self.one)
        self.run_options = self.api.RunOptions()
        self.run_options.log_severity_level = _QUIET

    def _binding(self) -> Any:
        binding = self.model.session_.io_binding()
        values = self.cache | {"past": self.past, "total": self.total}
        values |= {"cos": self.model.angles.cos, "sin": self.model.angles.sin}
        for name, array in values.items():
            value = self._value(array)
            binding.bind_ortvalue_input(name, value)
            if name in self.cache:
                binding.bind_ortvalue_output(new_name(name), value)
        return binding

    def _bind(
        self,
        binding: Any,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        rows: NDArray[np.int64],
        logits: NDArray[np.float32],
    ) -> None:
        binding.bind_ortvalue_input("tokens", self._value(tokens))
        if "positions" in self.model.inputs:
            binding.bind_ortvalue_input("positions", self._value(positions))
        binding.bind_ortvalue_input("rows", self._value(rows))
        binding.bind_ortvalue_output(LOGITS, self._value(logits))

    def _value(self, array: NDArray[Any]) -> Any:
        """The array's own memory, seen by ONNX Runtime."""
        return self.api.OrtValue.ortvalue_from_numpy(array)

    def forward(
        self, ids: Sequence[int], *, all_logits: bool = False, cancel: CancelToken | None = None
    ) -> NDArray[np.float32]:
        if os.getpid() != self.model.pid:
            raise ForkedProcess("the model was loaded before this process forked")
        with self.model.lock:
            if len(ids) == 1:
                self.model.angles.need(self.position + 1)
                self._check(cancel, self.position)
                self.token[0, 0], self.positions[0, 0] = ids[0], self.position
                self._run(self.decode, 1, cancel, self.position)
                logits: NDArray[np.float32] = self.one[0] if all_logits else self.one[0, 0]
                return logits.copy()
            return self._forward_many(ids, all_logits, cancel)

    def _forward_many(
        self, ids: Sequence[int], all_logits: bool, cancel: CancelToken | None
    ) -> NDArray[np.float32]:
        before, step = self.position, ROWS if all_logits else CHUNK
        vocab = self.model.graph.config.vocab_size
        result = np.empty((1, len(ids) if all_logits else 1, vocab), np.float32)
        tokens = np.array([ids], np.int64)
        self.model.angles.need(before + len(ids))
        for start in range(0, len(ids), step):
            self._check(cancel, before)
            chunk = np.ascontiguousarray(tokens[:, start : start + step])
            n = chunk.shape[1]
            rows = np.arange(n) if all_logits else np.array([n - 1])
            room = result[:, start : start + n] if all_logits else result
            positions = np.arange(self.position, self.position + n)[None]
            self._bind(self.prefill, chunk, positions, rows, room)
            self._run(self.prefill, n, cancel, before)
        logits: NDArray[np.float32] = result[0] if all_logits else result[0, 0]
        return logits

    def _run(self, binding: Any, n: int, cancel: CancelToken | None, before: int) -> None:
        total = self.position + n
        self.past[0], self.total[()] = total - 1, total
        self.run_options.terminate = False
        try:
            with _watched(cancel if n > 1 else None, self._terminate):
                self.model.session_.run_with_iobinding(binding, self.run_options)
        except Exception as error:
            self._check(cancel, before)
            self.truncate(before)
            raise _translated(error, self.model.folder.path) from error
        self.position = total

    def _terminate(self) -> None:
        self.run_options.terminate = True

    def _check(self, cancel: CancelToken | None, before: int) -> None:
        if self.stopped or (cancel and cancel.cancelled):
            self.truncate(before)
            if cancel:
                cancel.check("forward")
            raise ParameterError("the session is closed")

    def truncate(self, n: int) -> None:
        self.position = n

    def stop(self) -> None:
        self.stopped = True
        self._terminate()

    def close(self) -> None:
        self.stop()
        with self.model.lock:
            self.cache = {}
            self.decode = self.prefill = None


@contextlib.contextmanager
def _watched(cancel: CancelToken | None, act: Any) -> Iterator[None]:
    """Do something as soon as the token is set, while the block runs."""
    if cancel is None:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK):
            if cancel.cancelled:
                act()
                return

    watcher = threading.Thread(target=watch, name="edgellama-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _translated(error: Exception, path: Any) -> EdgeLlamaError:
    """ONNX Runtime's own exceptions as ours; its texts name operators and shapes."""
    text = " ".join(str(error).split())[:400]
    if "Failed to allocate" in text or isinstance(error, MemoryError):
        return OutOfMemory(f"ONNX Runtime has no room: {text}", path=path)
    return UnsupportedModelError(f"ONNX Runtime refuses: {text}", path=path)


def _placement(session: Any) -> dict[str, int]:
    """How many nodes each provider runs."""
    counts: Counter[str] = Counter()
    with contextlib.suppress(Exception):  # a receipt; older releases cannot tell
        for part in session.get_provider_graph_assignment_info():
            counts[part.ep_name] += len(part.get_nodes())
    return dict(counts)
