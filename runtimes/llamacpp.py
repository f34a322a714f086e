"""The peer: llama.cpp runs the same file, through llama-cpp-python (the extra `llamacpp`).

Hands over the GGUF file and ids and takes logits; the graph is llama.cpp's own. On the CPU only,
so that a comparison compares like with like. Knows nothing about operators or text.
"""

import ctypes
import importlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellama.control import CancelToken, Turns
from edgellama.errors import (
    DeviceUnavailable,
    EdgeLlamaError,
    ForkedProcess,
    ParameterError,
    UnsupportedModelError,
    require_choice,
)
from edgellama.gguf import GGUF
from edgellama.graph import Graph
from edgellama.runtimes.base import Options

BATCH = 512  # tokens computed at once, llama.cpp's own default
ROWS = 64  # the same where every token's logits are wanted: bounds llama.cpp's output buffer
INSTALL = "pip install 'edgellama[llamacpp]'"

_LOG = logging.getLogger("edgellama")
_loading = threading.Lock()
_kept: list[Any] = []  # callbacks that llama.cpp still points to
_first: list[int] = []  # the process that used llama.cpp first


def _refuse_a_fork() -> None:
    """Its threads (OpenMP's) do not live on in a forked child, which would wait for them."""
    if not _first:
        _first.append(os.getpid())
    if _first[0] != os.getpid():
        raise ForkedProcess(
            "llama.cpp was used before this process forked, and cannot be used in it",
            hint="Start the process by spawn, or take the cpu runtime",
        )


class _Weights:
    """A model of llama.cpp's. Whoever computes with it holds this: the last one out frees it."""

    def __init__(self, api: Any, pointer: int) -> None:
        self.pointer = pointer
        weakref.finalize(self, api.llama_model_free, pointer).atexit = False


class LlamaCpp:
    """One model's weights in llama.cpp's hands."""

    def __init__(self, file: GGUF, graph: Graph, options: Options) -> None:
        self.api = _bindings()
        _refuse_a_fork()
        types = {"f16": self.api.GGML_TYPE_F16, "f32": self.api.GGML_TYPE_F32}
        require_choice("kv_type", options.kv_type, types)
        self.graph, self.options, self.kv_type = graph, options, types[options.kv_type]
        self.warnings: list[str] = []
        self.turns = Turns()  # one step at a time, as the other runtimes do
        self.pid, self.closed = os.getpid(), False
        self._sessions: weakref.WeakSet[LlamaCppSession] = weakref.WeakSet()
        self._listing = threading.RLock()  # of the sessions: it takes more than one step
        self.weight_bytes = sum(file.tensors[name].n_bytes for name in graph.weights)
        self._weights: _Weights | None = _Weights(self.api, self._load(file))

    def _load(self, file: GGUF) -> int:
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
        raised: list[BaseException] = []  # by the caller's progress
        report = self._progress_callback(params, raised)
        pointer = self.api.llama_model_load_from_file(os.fsencode(file.path), params)
        del report
        if pointer and (raised or (self.options.cancel and self.options.cancel.cancelled)):
            self.api.llama_model_free(pointer)  # it was too late to stop it
        if raised:
            raise raised[0]
        if self.options.cancel:
            self.options.cancel.check("load")
        if not pointer:
            raise UnsupportedModelError(
                "llama.cpp refuses the file",
                path=file.path,
                hint="The logger 'edgellama' has its reasons, at level DEBUG",
            )
        return int(pointer)

    def _progress_callback(self, params: Any, raised: list[BaseException]) -> Any:
        """Have llama.cpp report its loading, and stop it once cancelled or if that raises."""
        cancel, progress = self.options.cancel, self.options.progress

        def step(share: float, _: object) -> bool:
            try:
                if progress:
                    progress(int(share * self.weight_bytes), self.weight_bytes, "loading")
            except BaseException as error:  # not to be lost between two languages
                raised.append(error)
            return not raised and not (cancel and cancel.cancelled)

        params.progress_callback = self.api.llama_progress_callback(step)
        return params.progress_callback

    def session(self) -> "LlamaCppSession":
        session = LlamaCppSession(self)
        with self._listing:
            self._sessions.add(session)
        if self.closed:  # meanwhile, perhaps before it was listed
            session.close()
            session.check_open()
        return session

    def weights(self) -> _Weights:
        """To be held as long as a context lives. Raises ParameterError once the model is closed."""
        weights = self._weights
        if self.closed or weights is None:
            raise ParameterError("the model is closed")
        return weights

    def describe(self) -> dict[str, Any]:
        built = self.api.llama_print_system_info().decode(errors="replace")
        return {
            "runtime": "llama.cpp",
            "device": "cpu",
            "threads": self.options.threads,
            "version": importlib.import_module("llama_cpp").__version__,
            "reason": " ".join(built.replace("|", " ").split()),
        }

    def memory(self) -> dict[str, int]:
        """What follows from the file and the options; llama.cpp does not tell its scratch."""
        c, item = self.graph.config, 4 if self.options.kv_type == "f32" else 2
        cache = 2 * c.n_layers * c.kv_dim * item * self.options.context
        return {"weights": self.weight_bytes, "kv_cache": cache, "scratch": 0}

    def close(self) -> None:
        if os.getpid() != self.pid:
            return
        self.closed = True  # ends what is under way
        self.turns.finally_do(self._free)

    def _free(self) -> None:
        with self._listing:
            sessions = list(self._sessions)
        for session in sessions:
            session.free()
        self._weights = None


class LlamaCppSession:
    """One conversation: a llama.cpp context of its own, and one batch that is used again."""

    def __init__(self, model: LlamaCpp) -> None:
        self.model, self.api, self.position, self.stopped = model, model.api, 0, False
        self.held = 0  # tokens that llama.cpp may have in its cache: as many as here, or more
        weights, options = model.weights(), model.options
        params = self.api.llama_context_default_params()
        params.n_ctx = options.context
        params.n_batch = params.n_ubatch = min(BATCH, options.context)
        params.n_outputs_max = min(ROWS, options.context)
        params.n_threads = params.n_threads_batch = options.threads
        params.type_k = params.type_v = model.kv_type
        params.offload_kqv = params.op_offload = False
        self.pointer = self.api.llama_init_from_model(weights.pointer, params)
        if not self.pointer:
            raise EdgeLlamaError(f"llama.cpp has no room for a context of {options.context} tokens")
        self.batch = self.api.llama_batch_init(params.n_batch, 0, 1)
        self.free = weakref.finalize(
            self, _free_session, self.api, self.pointer, self.batch, weights
        )
        self.free.atexit = False

    def forward(
        self, ids: Sequence[int], *, all_logits: bool = False, cancel: CancelToken | None = None
    ) -> NDArray[np.float32]:
        if os.getpid() != self.model.pid:
            raise ForkedProcess("the model was loaded before this process forked")
        before, step = self.position, ROWS if all_logits else BATCH
        vocab = self.model.graph.config.vocab_size
        result = np.empty((len(ids) if all_logits else 1, vocab), np.float32)
        try:
            for start in range(0, len(ids), step):
                chunk = ids[start : start + step]
                last = start + len(chunk) == len(ids)
                with self.model.turns.turn(cancel, "forward"):
                    self._run(chunk, all_logits, last, cancel)
                    self._collect(result[start:] if all_logits else result, len(chunk))
        except BaseException:
            self.position = before
            raise
        return result if all_logits else result[0]

    def _run(
        self, ids: Sequence[int], all_logits: bool, last: bool, cancel: CancelToken | None
    ) -> None:
        """One step. Whoever has the turn finds the context freed, or keeps it from being."""
        self._check(cancel)
        self._forget()
        watch = self._watch(cancel)
        status = self._decode(ids, all_logits, last)
        del watch
        self._check(cancel)
        if status:
            raise EdgeLlamaError(f"llama.cpp failed to compute, status {status}")
        self.position += len(ids)

    def _check(self, cancel: CancelToken | None) -> None:
        if cancel:
            cancel.check("forward")
        self.check_open()

    def check_open(self) -> None:
        """Raise ParameterError if the model or the session is closed."""
        if self.stopped or self.model.closed:
            what = "model" if self.model.closed else "session"
            raise ParameterError(f"the {what} is closed")

    def _forget(self) -> None:
        """Have llama.cpp forget what was truncated, or left behind by a call that failed."""
        if self.held > self.position:
            memory = self.api.llama_get_memory(self.pointer)
            if not self.api.llama_memory_seq_rm(memory, 0, self.position, -1):
                raise EdgeLlamaError(f"llama.cpp cannot forget the tokens from {self.position} on")
            self.held = self.position

    def _watch(self, cancel: CancelToken | None) -> Any:
        """Have llama.cpp ask between two operators whether to go on."""
        kind = self.api.ggml_abort_callback
        model = self.model
        callback = kind(
            lambda _: self.stopped or model.closed or (cancel is not None and cancel.cancelled)
        )
        self.api.llama_set_abort_callback(self.pointer, callback, None)
        return callback

    def _decode(self, ids: Sequence[int], all_logits: bool, last: bool) -> int:
        batch, n = self.batch, len(ids)
        batch.n_tokens = n
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, self.position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = all_logits or (last and i == n - 1)
        self.held = self.position + n
        return int(self.api.llama_decode(self.pointer, batch))

    def _collect(self, out: NDArray[np.float32], n: int) -> None:
        """Copy the logits of the batch just computed; none, if none were asked for."""
        wanted = [i for i in range(n) if self.batch.logits[i]]
        for row, i in enumerate(wanted):
            source = self.api.llama_get_logits_ith(self.pointer, i)
            ctypes.memmove(out[row].ctypes.data, source, out.itemsize * out.shape[1])

    def truncate(self, n: int) -> None:
        self.position = n

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self.stop()
        self.model.turns.finally_do(self.free)


def _free_session(api: Any, pointer: int, batch: Any, weights: _Weights) -> None:
    """While the weights are there: a context looks at them when it goes."""
    api.llama_free(pointer)
    api.llama_batch_free(batch)


def _bindings() -> Any:
    """llama-cpp-python's C interface, quiet. Raises DeviceUnavailable where it is not installed."""
    with _loading:
        try:
            api = importlib.import_module("llama_cpp.llama_cpp")
        except (ImportError, OSError, RuntimeError) as error:  # missing, or its library is broken
            raise DeviceUnavailable(
                f"llama-cpp-python cannot be imported: {error}",
                field="runtime",
                value="llama.cpp",
                hint=f"Install it: {INSTALL}",
            ) from error
        if not _kept:
            _kept.append(_quiet(api))
        return api


def _quiet(api: Any) -> Callable[..., None]:
    """Send llama.cpp's log, which would go to stderr, to the logger `edgellama` at DEBUG.

    llama.cpp has one log for the process, so a host that uses it too loses its own callback.
    """

    def log(level: int, text: bytes, user_data: object) -> None:
        _LOG.debug("llama.cpp: %s", text.decode(errors="replace").rstrip())

    callback: Callable[..., None] = api.llama_log_callback(log)
    api.llama_log_set(callback, None)
    return callback
