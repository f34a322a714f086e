"""The decoder graph on ONNX Runtime (the extra `onnx`), on the CPU or on CUDA.

The graph is lowered anew for every load; ONNX Runtime reads the weights from the folder's data
file itself. Keys and values lie in buffers that are input and output at once. Knows nothing about
formats of weights or text.
"""

import os
import threading
import weakref
from typing import Any

import numpy as np

from edgellama import rope
from edgellama.control import Turns
from edgellama.errors import ParameterError
from edgellama.gguf import GGUF
from edgellama.graph import Graph
from edgellama.runtimes.base import Options
from edgellama.runtimes.onnx_cache import transcoded
from edgellama.runtimes.onnx_device import FAST_PRODUCTS, Device, bindings, placement
from edgellama.runtimes.onnx_folder import OnnxFolder
from edgellama.runtimes.onnx_lowering import Manner, cache_width, lower
from edgellama.runtimes.ort_cuda import CudaSession
from edgellama.runtimes.ort_ending import under_way
from edgellama.runtimes.ort_session import QUIET, OrtSession, translated, watching

ANGLES = 1024  # positions whose angles are computed at once, when they are first needed


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
        self.folder, self.fingerprint = source, source.fingerprint
        self.turns = Turns()  # one step at a time, as the other runtimes do
        self.sessions: weakref.WeakSet[OrtSession] = weakref.WeakSet()
        self._listing = threading.RLock()  # of the sessions: it takes more than one step
        self.spare: list[dict[str, Any]] = []  # what sessions on CUDA have left
        self.pid, self.closed = os.getpid(), False
        self.angles = _Angles(graph, source.rope_factors, options.context)
        model = lower(graph, source.layout, self.manner)
        self.inputs = [value.name for value in model.inputs]
        self.inference: Any = self._open(model.to_bytes())

    def _open(self, model: bytes) -> Any:
        """The inference session. A cancelled load ends when ONNX Runtime next looks."""
        api, options = self.api, self._session_options()
        if self.options.cancel:
            self.options.cancel.check("load")

        def end() -> None:
            options.set_load_cancellation_flag(True)

        try:
            with under_way(end), watching(self.options.cancel, end):
                session = api.InferenceSession(model, options, providers=self.device.providers)
        except Exception as error:
            if self.options.cancel:
                self.options.cancel.check("load")
            raise translated(error, self.folder.path) from error
        self.device.check(session)
        return session

    def _session_options(self) -> Any:
        api, options = self.api, self.api.SessionOptions()
        options.intra_op_num_threads = self.options.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = QUIET
        entries = dict(self.device.entries)
        if not self.manner.fused:
            options.graph_optimization_level = api.GraphOptimizationLevel.ORT_DISABLE_ALL
            entries.pop(FAST_PRODUCTS, None)
        for key, value in {
            "session.model_external_initializers_file_folder_path": str(self.folder.path),
            "session.record_ep_graph_assignment_info": "1",
            **entries,
        }.items():
            options.add_session_config_entry(key, value)
        return options

    def session(self) -> OrtSession:
        session = CudaSession(self) if self.manner.candidates else OrtSession(self)
        with self._listing:
            self.sessions.add(session)
        if self.closed:  # meanwhile, perhaps before it was listed
            session.close()
            self.opened()
        return session

    def opened(self) -> Any:
        """The inference session. Raises ParameterError once the model is closed."""
        inference = self.inference
        if self.closed or inference is None:
            raise ParameterError("the model is closed")
        return inference

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": "onnx",
            "device": self.device.name,
            "threads": self.options.threads,
            "version": self.api.get_version_string(),
            "providers": self.inference.get_providers(),
            "nodes": placement(self.inference),
            "accuracy": self.manner.accuracy if self.device.name == "cpu" else None,
            "kv_type": {"float32": "f32", "float16": "f16"}.get(self.manner.dtype, "bf16"),
            "weights": list(self.folder.notes),
            "telemetry": self.telemetry,
            "reason": self.device.reason(self.options),
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
        self.closed = True
        with self._listing:
            sessions = list(self.sessions)
        for session in sessions:
            session.terminate()
        self.turns.finally_do(self._free)

    def _free(self) -> None:
        self.spare.clear()
        self.inference = None


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
