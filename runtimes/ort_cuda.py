"""One conversation on CUDA: everything bound in the device's memory, a token one captured graph.

The same code runs on the CPU provider, where its numbers are tested. Knows nothing about sampling:
it gives all logits, the likeliest few, or feeds the likeliest back by itself.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgellama.control import CancelToken
from edgellama.errors import ContextOverflow, OutOfMemory, ParameterError
from edgellama.runtimes.onnx_lowering import (
    CANDIDATES,
    LOGITS,
    NEXT,
    NEXT_PAST,
    angles_dtype,
    cache_names,
    cache_width,
    new_name,
)
from edgellama.runtimes.onnx_wire import DTYPES
from edgellama.runtimes.ort_session import Ids, Logits, OrtSession

if TYPE_CHECKING:
    from edgellama.runtimes.ort import Ort

_graphs = itertools.count(1)  # a captured graph belongs to one session's addresses


@dataclass(frozen=True)
class Candidates:
    """The likeliest next tokens, the likeliest first, and what makes their logits probabilities."""

    ids: Ids  # (k,)
    logits: Logits  # (k,)
    log_sum: float  # logarithm of the sum of all exponentials: log p = logit - log_sum


class CudaSession(OrtSession):
    """Buffers in the device's memory. The first step of a kind is captured, later ones replayed."""

    def __init__(self, model: "Ort") -> None:
        self.memory, self.capacity = model.device.memory, np.array(model.options.context, np.int32)
        self.fed = False  # whether the self-feeding graph was captured
        super().__init__(model)
        self.step_options, self.feed_options = self._captured(), self._captured()
        self.run_options.add_run_config_entry("gpu_graph_id", "-1")  # prefill is not captured

    def _captured(self) -> Any:
        options = self._run_options()
        options.add_run_config_entry("gpu_graph_id", str(next(_graphs)))
        return options

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
        shape = (1, c.n_kv_heads, model.options.context, cache_width(c))
        cache = {n: self._room(shape, model.manner.dtype) for n in cache_names(c.n_layers)}
        return cache | self._angles()

    def _angles(self) -> dict[str, Any]:
        """Of the whole context: what is bound must not change."""
        angles = self.model.angles
        angles.need(len(angles.cos))
        dtype = angles_dtype(self.model.manner.dtype)
        both = {"cos": angles.cos, "sin": angles.sin}
        return {name: self._copy(array.astype(dtype)) for name, array in both.items()}

    def _step_binding(self) -> Any:
        """A single token: all at fixed places, the attention told of the whole context."""
        vocab, one = self.model.graph.config.vocab_size, (1, 1)
        count = min(self.model.manner.candidates, vocab)
        self.given = {"tokens": self._room(one, "int64"), "past": self._room((1,), "int32")}
        self.given["rows"] = self._copy(self.row)
        if "positions" in self.model.inputs:
            self.given["positions"] = self._room(one, "int64")
        self.got = {
            LOGITS: self._room((1, 1, vocab), "float32"),
            CANDIDATES[0]: self._room((1, 1, count), "float32"),
            CANDIDATES[1]: self._room((1, 1, count), "int64"),
            CANDIDATES[2]: self._room((1, 1, count), "float32"),
            NEXT: self._room(one, "int64"),
            NEXT_PAST: self._room((1,), "int32"),
        }
        feeding = self.got | {NEXT: self.given["tokens"], NEXT_PAST: self.given["past"]}
        self.feeding = self._fixed(feeding)
        return self._fixed(self.got)

    def _fixed(self, got: dict[str, Any]) -> Any:
        binding = self.model.session_.io_binding()
        for name, value in (self.kept | self.given).items():
            binding.bind_ortvalue_input(name, value)
        for name in cache_names(self.model.graph.config.n_layers):
            binding.bind_ortvalue_output(new_name(name), self.kept[name])
        binding.bind_ortvalue_input("total", self._value(self.capacity))
        for name, value in got.items():
            binding.bind_ortvalue_output(name, value)
        return binding

    # --- steps ----------------------------------------------------------------------------------

    def options(self, binding: Any) -> Any:
        if binding is self.decode:
            return self.step_options
        return self.feed_options if binding is self.feeding else self.run_options

    def _one(self, token: int, cancel: CancelToken | None) -> Logits:
        self._step(token, cancel)
        logits: Logits = self.got[LOGITS].numpy()[0, 0].copy()
        return logits

    def candidates(self, token: int, cancel: CancelToken | None = None) -> Candidates:
        """One more token; the likeliest to follow. A few hundred bytes leave the device."""
        self._step(token, cancel)
        logits, ids, log_p = (self.got[name].numpy()[0, 0].copy() for name in CANDIDATES)
        return Candidates(ids, logits, float(logits[0] - log_p[0]))

    def greedy(self, token: int, n: int, cancel: CancelToken | None = None) -> list[int]:
        """Append `token`, then the likeliest again and again: the n that follow, all but the last
        of them in the cache. Raises ContextOverflow, Cancelled with the position as it was.
        """
        before, found = self.position, []
        if before + n > int(self.capacity):
            raise ContextOverflow(before + n, int(self.capacity))
        if not self.fed:  # capturing runs a step more than once, each time with its own result
            self._send(token)
            self.run(self.feeding, 1, cancel, before)
            self.position, self.fed = before, True
        self._send(token)
        for _ in range(n):
            self.run(self.feeding, 1, cancel, before)
            found.append(int(self.given["tokens"].numpy()[0, 0]))
            if "positions" in self.given:
                self.positions[0, 0] = self.position
                self.given["positions"].update_inplace(self.positions)
        return found

    def _step(self, token: int, cancel: CancelToken | None) -> None:
        self._send(token)
        self.run(self.decode, 1, cancel, self.position)

    def _send(self, token: int) -> None:
        self.token[0, 0], self.positions[0, 0] = token, self.position
        self.past[0] = self.position
        sent = {"tokens": self.token, "past": self.past, "positions": self.positions}
        for name, array in sent.items():
            if name in self.given:
                self.given[name].update_inplace(array)

    # --- keys and values as bytes -----------------------------------------------------------------

    def export(self) -> Iterator[NDArray[np.uint8]]:
        for name in self._savable():
            kept = self.kept[name].numpy()[0, :, : self.position]  # (heads, tokens, width)
            yield np.ascontiguousarray(kept).reshape(-1).view(np.uint8)

    def adopt(self, n: int, fill: Callable[[NDArray[np.uint8]], None]) -> None:
        for name in self._savable():
            whole = np.zeros(self.kept[name].shape(), self.model.manner.dtype)
            room = np.empty((whole.shape[1], n, whole.shape[3]), whole.dtype)
            fill(room.reshape(-1).view(np.uint8))
            whole[0, :, :n] = room
            self.kept[name].update_inplace(whole)
        self.position = n

    def _savable(self) -> list[str]:
        if self.model.manner.dtype == "bfloat16":
            raise ParameterError("keys and values in bfloat16 cannot be saved", field="dtype")
        return cache_names(self.model.graph.config.n_layers)

    def close(self) -> None:
        super().close()
        self.given, self.got, self.feeding = {}, {}, None
