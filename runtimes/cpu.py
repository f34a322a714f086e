"""The default runtime: the decoder graph as a program of Numba kernels, on all cores.

Joins the parts: repacked weights, the lowered program, a team of threads, and sessions with their
key/value caches. Knows nothing about operators (see `kernels.py`) or about text.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellama import rope
from edgellama.control import CancelToken, Turns
from edgellama.errors import ForkedProcess, ParameterError, require_choice
from edgellama.fingerprint import fingerprint
from edgellama.gguf import GGUF
from edgellama.graph import Graph
from edgellama.machine import room_for
from edgellama.runtimes import abi, kernel_cache, levels
from edgellama.runtimes.base import Options
from edgellama.runtimes.cpu_weights import Weights
from edgellama.runtimes.places import CacheShape, aligned
from edgellama.runtimes.program import (
    PLAIN,
    TILED,
    Batch,
    Program,
    kernel_names,
    lower,
    scratch_bytes,
)
from edgellama.runtimes.team import Team, give_up_core
from edgellama.weights import rope_factors

ANGLES_AT_ONCE = 1024  # positions whose cosines are computed together
FEW = 32  # tokens below which tiles would be mostly empty


def batches_of(level: levels.Level, *, deterministic: bool = False) -> list[Batch]:
    """The batches that a model has programs for: few tokens, and many where tiles pay."""
    if not level.tiles or deterministic:
        return [PLAIN]
    return [PLAIN, replace(TILED, tiles=level.tiles)]


class Cpu:
    """One model's repacked weights, its program and its threads."""

    def __init__(self, file: GGUF, graph: Graph, options: Options) -> None:
        require_choice("kv_type", options.kv_type, abi.KV_TYPES)
        self.graph, self.options = graph, options
        config = graph.config
        self.level, self.level_reason = levels.choose()
        types = {name: file.tensors[name].type.name for name in graph.weights}
        batches = batches_of(self.level, deterministic=options.deterministic)
        kinds = [options.kv_type]
        names = [n for batch in batches for n in kernel_names(graph, types, kinds, batch)]
        kernels = kernel_cache.addresses(names, self.level, options.progress, options.cancel)
        self.weights = Weights(file, graph, options)
        self.fingerprint = fingerprint(file, graph)
        self.warnings = [*kernel_cache.warnings, *self.weights.warnings]
        self.cache = CacheShape(
            config.n_layers,
            config.n_kv_heads,
            config.head_dim,
            options.context,
            abi.KV_TYPES[options.kv_type],
        )
        parts = (self.weights.matrices, self.weights.vectors, kernels, self.cache)
        self.programs = [lower(graph, *parts, batch) for batch in batches]
        self.angles = Angles(graph, options.context, rope_factors(file, config))
        self.scratch_bytes = max(scratch_bytes(graph, batch) for batch in batches)
        self.scratch = aligned(self.scratch_bytes * options.threads)
        self.turns = Turns()  # one program, one set of buffers: one step at a time
        self.sessions: weakref.WeakSet[CpuSession] = weakref.WeakSet()
        self.listing = threading.RLock()  # of them; a signal handler may close the model amid it
        self.pid, self.closed = os.getpid(), False
        self.team = Team(
            options.threads,
            kernel_cache.function(kernels["lead"], 4),
            kernel_cache.function(kernels["follow"], 6),
        )
        self.give_up_core = give_up_core()

    def program(self, n_tokens: int) -> Program:
        """The one to run, given how many tokens are still to come."""
        return self.programs[-1 if n_tokens >= FEW else 0]

    def session(self) -> "CpuSession":
        session = CpuSession(self)
        with self.listing:
            self.sessions.add(session)
        if self.closed:  # meanwhile
            session.stop()
        return session

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": "cpu",
            "device": "cpu",
            "threads": self.options.threads,
            "isa": self.level.name,
            "prefill": "bfloat16 tiles" if len(self.programs) > 1 else "as decode",
            "reason": f"{self.level.name}: {self.level_reason}",
        }

    def memory(self) -> dict[str, int]:
        scratch = (
            sum(p.scratch_bytes for p in self.programs)
            + self.angles.table.nbytes
            + self.scratch.nbytes
        )
        return {
            "weights": self.weights.n_bytes,
            "kv_cache": self.cache.total_bytes,
            "scratch": scratch,
        }

    def close(self) -> None:
        if os.getpid() != self.pid:  # a fork has no helpers to stop
            return
        self.closed = True
        for session in self._sessions():
            session.stop()
        self.turns.finally_do(self._free)

    def _free(self) -> None:
        self.team.close()
        self.weights.free()
        self.scratch = np.zeros(0, np.uint8)
        for session in self._sessions():
            session.cache = np.zeros(0, np.uint8)

    def _sessions(self) -> "list[CpuSession]":
        with self.listing:
            return list(self.sessions)


class Angles:
    """Cosines and sines of all positions so far needed, shared by a model's sessions."""

    def __init__(self, graph: Graph, context: int, factors: list[float] | None) -> None:
        self.rope, self.factors, self.known = graph.config.rope, factors, 0
        self.table = np.empty((context, graph.config.rope.dim // 2, 2), np.float32)

    def reach(self, stop: int) -> None:
        """Make sure of positions up to stop - 1."""
        while self.known < stop:
            end = min(self.known + ANGLES_AT_ONCE, len(self.table))
            cos, sin = rope.angles(self.rope, self.known, end, self.factors)
            self.table[self.known : end, :, 0] = cos
            self.table[self.known : end, :, 1] = sin
            self.known = end


class CpuSession:
    """One conversation's keys and values. Memory is touched as positions fill."""

    def __init__(self, model: Cpu) -> None:
        self.model = model
        self.position, self.closing = 0, CancelToken()
        hint = "Load the model with a smaller context"
        with room_for("a session's keys and values", model.cache.total_bytes, hint):
            self.cache = aligned(model.cache.total_bytes)
        self.cache_kind = f"cpu {model.cache.name}"
        tiles = len(model.programs) > 1  # they round differently
        self.cache_origin = model.level.name + (", tiles" if tiles else "")

    def forward(
        self, ids: Sequence[int], *, all_logits: bool = False, cancel: CancelToken | None = None
    ) -> NDArray[np.float32]:
        model = self.model
        if os.getpid() != model.pid:
            raise ForkedProcess("the model was loaded before this process forked")
        vocab, before, start = model.graph.config.vocab_size, self.position, 0
        shape = (len(ids) if all_logits else 1, vocab)
        with room_for("the logits", 4 * shape[0] * vocab, "Ask for those of fewer tokens at once"):
            result = np.empty(shape, np.float32)
        try:
            while start < len(ids):
                program = model.program(len(ids) - start)
                chunk = np.asarray(ids[start : start + program.batch.tokens], np.int64)
                last = start + len(chunk) == len(ids)
                rows = np.arange(len(chunk)) if all_logits else np.array([len(chunk) - 1] * last)
                with model.turns.turn(cancel, "forward"):
                    self._run(program, chunk, rows.astype(np.int64), cancel)
                    at = start if all_logits else 0
                    result[at : at + len(rows)] = program.logits[: len(rows), :vocab]
                start += len(chunk)
        except BaseException:
            self.position = before
            raise
        return result if all_logits else result[0]

    def _run(
        self,
        program: Program,
        ids: NDArray[np.int64],
        rows: NDArray[np.int64],
        cancel: CancelToken | None,
    ) -> None:
        """One step: the tokens in the cache, and logits of the rows in the program's room."""
        model = self.model
        self._check_open()
        model.angles.reach(self.position + len(ids))
        state = np.zeros(abi.STATE_WORDS, np.int64)
        state[abi.ONE], state[abi.N_TOKENS], state[abi.N_ROWS] = 1, len(ids), len(rows)
        state[abi.START] = self.position
        state[abi.TOKENS], state[abi.ROWS] = ids.ctypes.data, rows.ctypes.data
        state[abi.CACHE] = self.cache.ctypes.data
        splits = -(-(self.position + len(ids)) // abi.ATTENTION_SPLIT)
        parallel = splits if len(ids) == 1 else 1
        state[abi.SPLITS], state[abi.PARALLEL] = splits, parallel
        state[abi.ATTENTION_UNITS] = -(-len(ids) // abi.ATTENTION_TOKENS) * parallel
        state[abi.ANGLES] = model.angles.table.ctypes.data
        state[abi.CANCEL] = cancel.address if cancel else 0
        state[abi.CLOSING] = self.closing.address
        state[abi.GIVE_UP_CORE] = model.give_up_core
        state[abi.SCRATCH] = model.scratch.ctypes.data
        state[abi.SCRATCH_BYTES] = model.scratch_bytes
        model.team.run(program.words, program.counters, state)
        self._check_open()
        if cancel:
            cancel.check("forward")
        self.position += len(ids)

    def _check_open(self) -> None:
        if self.closing.cancelled:
            what = "model" if self.model.closed else "session"
            raise ParameterError(f"the {what} is closed")

    def truncate(self, n: int) -> None:
        self.position = n

    def cache_bytes(self, n: int) -> int:
        """Blocks are kept whole."""
        return -(-n // abi.ATTENTION_BLOCK) * self.model.cache.block_bytes

    def export(self) -> Iterator[NDArray[np.uint8]]:
        self._check_open()
        shape, cache, used = self.model.cache, self.cache, self.position % abi.ATTENTION_BLOCK
        whole = self.position // abi.ATTENTION_BLOCK * shape.block_bytes
        yield cache[:whole]
        if used:
            last = cache[whole : whole + shape.block_bytes].copy()
            shape.blank(last, used)
            yield last

    def adopt(self, n: int, fill: Callable[[NDArray[np.uint8]], None]) -> None:
        self._check_open()
        fill(self.cache[: self.cache_bytes(n)])
        self.position = n

    def stop(self) -> None:
        self.closing.cancel()

    def close(self) -> None:
        self.stop()
        self.model.turns.finally_do(self._free)

    def _free(self) -> None:
        self.model.team.settle()
        self.cache = np.zeros(0, np.uint8)
