"""One conversation on ONNX Runtime's CPU provider, and what a step of any device needs.

Buffers for keys and values are bound once, as input and output of the same graph; so are those of
a single token. Knows nothing about how the graph was made.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgellama.control import CancelToken
from edgellama.errors import (
    EdgeLlamaError,
    ForkedProcess,
    OutOfMemory,
    ParameterError,
    UnsupportedModelError,
)
from edgellama.runtimes.onnx_lowering import LOGITS, cache_names, cache_width, new_name
from edgellama.runtimes.ort_ending import under_way

if TYPE_CHECKING:
    from edgellama.runtimes.ort import Ort

CHUNK = 256  # tokens computed at once
ROWS = 64  # the same where every token's logits are wanted
QUIET = 4  # of ONNX Runtime's log: its errors come as exceptions
_LOOK = 0.02  # seconds between two looks at a cancel token
_SLOW = 0.05  # seconds that a token may take before somebody looks at the cancel token meanwhile

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class OrtSession:
    """Buffers for keys and values, and what every call is bound to."""

    chunk = CHUNK

    def __init__(self, model: "Ort") -> None:
        self.model, self.api = model, model.api
        self.position, self.stopped, self.seconds = 0, False, 0.0
        self.cache_kind = f"onnx {model.manner.dtype}"
        self.cache_origin = f"onnxruntime {model.api.get_version_string()} {model.manner.accuracy}"
        self.prepare()

    def prepare(self) -> None:
        """Make what calls are bound to."""
        vocab = self.model.graph.config.vocab_size
        self.token, self.row = np.zeros((1, 1), np.int64), np.zeros(1, np.int64)
        self.positions = np.zeros((1, 1), np.int64)
        self.past, self.total = np.zeros(1, np.int32), np.zeros((), np.int32)
        self.one = np.zeros((1, 1, vocab), np.float32)
        self.kept = self._kept()
        self.prefill, self.decode = self._binding(), self._step_binding()
        self.run_options = self._run_options()

    def _kept(self) -> dict[str, Any]:
        """What stays bound: keys, values and angles, by the graph's names."""
        model, c = self.model, self.model.graph.config
        shape = (1, c.n_kv_heads, model.options.context, cache_width(c))
        dtype = np.dtype(model.manner.dtype)
        try:  # pages that are not touched cost nothing
            self.cache = {name: np.zeros(shape, dtype) for name in cache_names(c.n_layers)}
        except MemoryError as error:
            raise _no_room(model.options.context) from error
        arrays = self.cache | {"cos": model.angles.cos, "sin": model.angles.sin}
        return {name: self._value(array) for name, array in arrays.items()}

    def _run_options(self) -> Any:
        options = self.api.RunOptions()
        options.log_severity_level = QUIET
        return options

    def _binding(self) -> Any:
        binding = self.model.opened().io_binding()
        for name, value in self.kept.items():
            binding.bind_ortvalue_input(name, value)
            if name not in ("cos", "sin"):
                binding.bind_ortvalue_output(new_name(name), value)
        binding.bind_ortvalue_input("past", self._value(self.past))
        binding.bind_ortvalue_input("total", self._value(self.total))
        return binding

    def _step_binding(self) -> Any:
        """What a single token is bound to."""
        binding = self._binding()
        self.bind(binding, self.token, self.positions, self.row, self.one)
        return binding

    def bind(self, binding: Any, tokens: Ids, positions: Ids, rows: Ids, logits: Logits) -> None:
        """A call's own arrays: ids and positions (1, n), the rows whose logits (1, rows, vocab)
        are wanted."""
        binding.bind_ortvalue_input("tokens", self._value(tokens))
        if "positions" in self.model.inputs:
            binding.bind_ortvalue_input("positions", self._value(positions))
        binding.bind_ortvalue_input("rows", self._value(rows))
        binding.bind_ortvalue_output(LOGITS, self._value(logits))

    def _value(self, array: NDArray[Any]) -> Any:
        """The array's own memory, seen by ONNX Runtime."""
        return self.api.OrtValue.ortvalue_from_numpy(array)

    # --- steps ----------------------------------------------------------------------------------

    def forward(
        self, ids: Sequence[int], *, all_logits: bool = False, cancel: CancelToken | None = None
    ) -> Logits:
        self._check_process()
        if len(ids) == 1:
            one = self._one(ids[0], cancel)
            return one[None] if all_logits else one
        return self._many(ids, all_logits, cancel)

    def _check_process(self) -> None:
        if os.getpid() != self.model.pid:
            raise ForkedProcess("the model was loaded before this process forked")

    def _one(self, token: int, cancel: CancelToken | None) -> Logits:
        """Logits after a single token, (vocab_size,)."""
        self.token[0, 0], self.positions[0, 0] = token, self.position
        self.run(self.decode, 1, cancel, self.position)
        logits: Logits = self.one[0, 0].copy()
        return logits

    def _many(self, ids: Sequence[int], all_logits: bool, cancel: CancelToken | None) -> Logits:
        before, step = self.position, ROWS if all_logits else self.chunk
        vocab = self.model.graph.config.vocab_size
        result = np.empty((1, len(ids) if all_logits else 1, vocab), np.float32)
        tokens = np.array([ids], np.int64)
        for start in range(0, len(ids), step):
            chunk = np.ascontiguousarray(tokens[:, start : start + step])
            n = chunk.shape[1]
            rows = np.arange(n) if all_logits else np.array([n - 1])
            room = result[:, start : start + n] if all_logits else result
            chunk = self.padded(chunk, self.model.options.context - self.position)
            positions = np.arange(self.position, self.position + chunk.shape[1])[None]
            self.bind(self.prefill, chunk, positions, rows, room)
            self.run(self.prefill, chunk.shape[1], cancel, before)
            self.position += n - chunk.shape[1]
        self.bind(self.prefill, self.token, self.positions, self.row, self.one)  # lets go of ours
        logits: Logits = result[0] if all_logits else result[0, 0]
        return logits

    def padded(self, chunk: Ids, room: int) -> Ids:
        """A chunk (1, n) as it is computed, at most `room` tokens."""
        return chunk

    def run(self, binding: Any, n: int, cancel: CancelToken | None, before: int) -> None:
        """One call for n tokens; the position is `before` again if it does not end well."""
        model, total = self.model, self.position + n
        self.past[0], self.total[()] = total - 1, total
        options = self.options(binding)
        watched = cancel if n > 1 or self.seconds > _SLOW else None

        def end() -> None:
            options.terminate = True

        try:
            with model.turns.turn(cancel, "forward"):
                options.terminate = False
                self._check(cancel)
                model.angles.need(total)
                start = time.monotonic()
                with under_way(end), watching(watched, self.terminate):
                    model.opened().run_with_iobinding(binding, options)
                self.seconds = time.monotonic() - start if n == 1 else self.seconds
        except BaseException as error:
            self.position = before
            if isinstance(error, EdgeLlamaError) or not isinstance(error, Exception):
                raise
            self._check(cancel)
            raise translated(error, model.folder.path) from error
        self.position = total

    def options(self, binding: Any) -> Any:
        """The run options of a binding."""
        return self.run_options

    def terminate(self) -> None:
        self.run_options.terminate = True

    def _check(self, cancel: CancelToken | None) -> None:
        if cancel:
            cancel.check("forward")
        if self.stopped or self.model.closed:
            what = "model" if self.model.closed else "session"
            raise ParameterError(f"the {what} is closed")

    def truncate(self, n: int) -> None:
        self.position = n

    # --- keys and values as bytes, see `base.SavableSession` --------------------------------------

    def cache_bytes(self, n: int) -> int:
        c = self.model.graph.config
        item = 4 if self.model.manner.dtype == "float32" else 2
        return 2 * c.n_layers * c.n_kv_heads * cache_width(c) * n * item

    def export(self) -> Iterator[NDArray[np.uint8]]:
        for array in self.cache.values():
            kept = array[0, :, : self.position]  # (heads, tokens, width)
            yield np.ascontiguousarray(kept).reshape(-1).view(np.uint8)

    def adopt(self, n: int, fill: Callable[[NDArray[np.uint8]], None]) -> None:
        for array in self.cache.values():
            room = np.empty((array.shape[1], n, array.shape[3]), array.dtype)
            fill(room.reshape(-1).view(np.uint8))
            array[0, :, :n] = room
        self.position = n

    def stop(self) -> None:
        self.stopped = True
        self.terminate()

    def close(self) -> None:
        self.stop()
        self.model.turns.finally_do(self._free)

    def _free(self) -> None:
        self.kept, self.cache = {}, {}
        self.decode = self.prefill = None


@contextlib.contextmanager
def watching(cancel: CancelToken | None, act: Callable[[], None]) -> Iterator[None]:
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


def translated(error: Exception, path: Path) -> EdgeLlamaError:
    """ONNX Runtime's own exceptions as ours; its texts name operators and shapes."""
    text = " ".join(str(error).split())[:400]
    if "Failed to allocate" in text or isinstance(error, MemoryError):
        return OutOfMemory(f"ONNX Runtime has no room: {text}", path=path)
    return UnsupportedModelError(f"ONNX Runtime refuses: {text}", path=path)


def _no_room(context: int) -> OutOfMemory:
    return OutOfMemory(f"no room for a context of {context} tokens", hint="Use a smaller context")
