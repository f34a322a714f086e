"""One conversation on CUDA: everything bound in the device's memory, a token one captured graph.

The same code runs on the CPU provider, where its numbers are tested. Knows nothing about sampling:
it gives all logits, the likeliest few, or feeds the likeliest back by itself.
"""

import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgellama.control import CancelToken
from edgellama.errors import OutOfMemory
from edgellama.runtimes.base import Likeliest
from edgellama.runtimes.onnx_lowering import (
    LOGITS,
    NEXT,
    NEXT_PAST,
    TOP,
    angles_dtype,
    cache_names,
    cache_width,
    new_name,
)
from edgellama.runtimes.onnx_wire import DTYPES, SIZES
from edgellama.runtimes.ort_session import Ids, Logits, OrtSession

if TYPE_CHECKING:
    from edgellama.runtimes.ort import Ort

CHUNK = 1024  # tokens computed at once: unpacking 4-bit weights costs the same for any number
MULTIPLE = 16  # of which a chunk's length is one, so that few shapes occur
CAPTURING = 4  # times that ONNX Runtime may run a step when it captures it; 1.31.1: 3

LASTING = (  # what a session leaves to the next one: a captured graph knows their addresses
    *("token", "row", "positions", "past", "total", "one", "kept", "given", "got"),
    *("prefill", "decode", "run_options", "step_options", "graph"),
)

_graphs = itertools.count(1)


@dataclass
class _Captured:
    """The graph of a step, which ONNX Runtime keeps as long as the model."""

    done: bool = False
    held: tuple[int, int] | None = None  # token and position that it finds on the device


class CudaSession(OrtSession):
    """Buffers in the device's memory. The first step is captured, later ones replayed.

    A step leaves the likeliest token, and its place, where the next step looks for them: nothing
    has to be sent if that token is the next one. When the session ends, its buffers are another's.
    """

    chunk = CHUNK
    graph: _Captured
    step_options: Any

    def __init__(self, model: "Ort") -> None:
        self.memory, self.capacity = model.device.memory, np.array(model.options.context, np.int32)
        self.choices = min(model.manner.candidates, model.graph.config.vocab_size)
        super().__init__(model)

    def prepare(self) -> None:
        spare = self.model.spare
        try:
            vars(self).update(spare.pop())
            self.graph.held = None
        except IndexError:
            self.graph = _Captured()
            super().prepare()
            self.step_options = self._run_options()
            self.step_options.add_run_config_entry("gpu_graph_id", str(next(_graphs)))
            self.run_options.add_run_config_entry("gpu_graph_id", "-1")  # nothing is captured
        lasting = {name: vars(self)[name] for name in LASTING}
        self.leave = weakref.finalize(self, spare.append, lasting)
        self.leave.atexit = False

    # --- buffers --------------------------------------------------------------------------------

    def _room(self, shape: tuple[int, ...], dtype: str) -> Any:
        make = self.api.OrtValue.ortvalue_from_shape_and_type
        try:
            return make(list(shape), DTYPES[dtype], self.memory, 0)
        except Exception as error:
            problem = f"no room on the device for a context of {self.capacity} tokens"
            raise OutOfMemory(problem, hint="Use a smaller context") from error

    def _copy(self, array: NDArray[Any]) -> Any:
        return self.api.OrtValue.ortvalue_from_numpy(array, self.memory, 0)

    def _kept(self) -> dict[str, Any]:
        model, c = self.model, self.model.graph.config
        size = cache_width(c) * SIZES[model.manner.dtype]
        in_bytes = (1, c.n_kv_heads, model.options.context, size)  # NumPy knows no bfloat16
        cache = {name: self._room(in_bytes, "uint8") for name in cache_names(c.n_layers)}
        first, *others = cache.values()
        first.update_inplace(np.zeros(in_bytes, np.uint8))  # 0 * NaN would be NaN
        for value in others:
            value.update_inplace(first)
        return cache | self._angles()

    def _binding(self) -> Any:
        binding = self.model.opened().io_binding()
        for name in ("cos", "sin"):
            binding.bind_ortvalue_input(name, self.kept[name])
        c, kind = self.model.graph.config, DTYPES[self.model.manner.dtype]
        shape = (1, c.n_kv_heads, self.model.options.context, cache_width(c))
        for name in cache_names(c.n_layers):
            place = (self.memory, 0, kind, shape, self.kept[name].data_ptr())
            binding.bind_input(name, *place)
            binding.bind_output(new_name(name), *place)
        binding.bind_ortvalue_input("past", self._value(self.past))
        binding.bind_ortvalue_input("total", self._value(self.total))
        return binding

    def _angles(self) -> dict[str, Any]:
        """Of the whole context: what is bound must not change."""
        angles = self.model.angles
        angles.need(len(angles.cos))
        dtype = angles_dtype(self.model.manner.dtype)
        both = {"cos": angles.cos, "sin": angles.sin}
        return {name: self._copy(array.astype(dtype)) for name, array in both.items()}

    def _step_binding(self) -> Any:
        """A single token: all at fixed places, the attention told of the whole context."""
        one = (1, 1)
        self.given = {"tokens": self._room(one, "int64"), "past": self._room((1,), "int32")}
        self.given["rows"] = self._copy(self.row)
        if "positions" in self.model.inputs:
            self.given["positions"] = self._room(one, "int64")
        self.got = {
            LOGITS: self._room((1, 1, self.model.graph.config.vocab_size), "float32"),
            TOP: self._room((1, 1, 2 * self.choices + 1), "float32"),
            NEXT: self.given["tokens"],
            NEXT_PAST: self.given["past"],
        }
        binding = self._binding()
        binding.bind_ortvalue_input("total", self._value(self.capacity))
        for name, value in self.given.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in self.got.items():
            binding.bind_ortvalue_output(name, value)
        return binding

    # --- steps ----------------------------------------------------------------------------------

    def padded(self, chunk: Ids, room: int) -> Ids:
        """To a multiple of a few tokens if there is room; what they leave behind is forgotten."""
        missing = -chunk.shape[1] % MULTIPLE
        if chunk.shape[1] + missing > room:
            return chunk
        return np.pad(chunk, ((0, 0), (0, missing)))

    def options(self, binding: Any) -> Any:
        replayed = binding is self.decode and self.graph.done
        return self.step_options if replayed else self.run_options

    def _one(self, token: int, cancel: CancelToken | None) -> Logits:
        self._step(token, cancel)
        return self.logits()

    def step(self, token: int, *, cancel: CancelToken | None = None) -> Likeliest:
        self._check_process()
        self._step(token, cancel)
        top = self.got[TOP].numpy()[0, 0].copy()  # the one copy off the device
        logits, numbers = top[: self.choices], top[self.choices : -1]
        with np.errstate(invalid="ignore"):
            ids = numbers.astype(np.int64)
        self.graph.held = (int(ids[0]), self.position)
        return Likeliest(ids, logits, float(top[-1]))

    def logits(self) -> Logits:
        logits: Logits = self.got[LOGITS].numpy()[0, 0].copy()
        return logits

    def _step(self, token: int, cancel: CancelToken | None) -> None:
        """Capturing runs a step more than once, each time with its own result: it comes first."""
        self._check(cancel)  # a closed session has nothing to send to
        before, graph = self.position, self.graph
        if not graph.done and before + CAPTURING <= int(self.capacity):
            self._send(token)
            graph.done, graph.held = True, None
            try:
                self.run(self.decode, 1, cancel, before)
            except BaseException:
                graph.done = False
                raise
            self.position = before
        self._send(token)
        graph.held = None  # until the result is known
        self.run(self.decode, 1, cancel, before)

    def _send(self, token: int) -> None:
        """What the step needs and does not find there from the one before."""
        sent = {}
        if self.graph.held != (token, self.position):
            self.token[0, 0], self.past[0] = token, self.position
            sent = {"tokens": self.token, "past": self.past}
        if "positions" in self.given:
            self.positions[0, 0] = self.position
            sent["positions"] = self.positions
        for name, array in sent.items():
            self.given[name].update_inplace(array)

    # --- keys and values as bytes -----------------------------------------------------------------

    def export(self) -> Iterator[NDArray[np.uint8]]:
        for name in cache_names(self.model.graph.config.n_layers):
            kept = self.kept[name].numpy()[0, :, : self.position]  # (heads, tokens, bytes)
            yield np.ascontiguousarray(kept).reshape(-1)

    def adopt(self, n: int, fill: Callable[[NDArray[np.uint8]], None]) -> None:
        for name in cache_names(self.model.graph.config.n_layers):
            whole = np.zeros(self.kept[name].shape(), np.uint8)
            room = np.empty((whole.shape[1], n, whole.shape[3]), np.uint8)
            fill(room.reshape(-1))
            whole[0, :, :n] = room
            self.kept[name].update_inplace(whole)
        self.position = n

    def close(self) -> None:
        super().close()
        self.given, self.got = {}, {}
        if self.model.closed:
            self.leave.detach()
        self.leave()
