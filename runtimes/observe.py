"""Looking into the cpu runtime: what goes into each product, as its kernels see it.

Runs a program in slices and shows what was packed in between. Knows nothing about what the
numbers are wanted for.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgellama.control import CancelToken
from edgellama.runtimes import abi, kernel_cache
from edgellama.runtimes.cpu import Cpu, CpuSession
from edgellama.runtimes.places import Packing
from edgellama.runtimes.program import PLAIN, Program, kernel_names, lower

See = Callable[[tuple[str, ...], NDArray[np.float32]], None]
OBSERVED = replace(PLAIN, observed=True)


class Observer:
    """Runs a loaded model's tokens and shows the inputs of the layers' products."""

    def __init__(self, model: Cpu) -> None:
        self.model = model
        matrices, vectors = model.weights.matrices, model.weights.vectors
        types = {name: matrix.type for name, matrix in matrices.items()}
        names = kernel_names(model.graph, types, [model.cache.kv_type], OBSERVED)
        kernels = kernel_cache.addresses(names, model.level)
        self.program = lower(model.graph, matrices, vectors, kernels, model.cache, OBSERVED)
        inner = [p for p in self.program.packings if p.weights[0].startswith("blk.")]
        ends = [packing.instructions for packing in inner]
        self.steps = [
            (part(self.program, first, last), packing)
            for first, last, packing in zip([0, *ends[:-1]], ends, inner, strict=True)
        ]

    def forward(
        self, session: CpuSession, ids: Sequence[int], see: See, cancel: CancelToken | None = None
    ) -> None:
        """Append ids to the session's cache, without logits.

        `see` is given weights' names and what they are multiplied with, float32 (tokens, columns),
        valid during its call: layer by layer, and again for every so many tokens. Raises Cancelled
        with the session's position as it was, as `CpuSession.forward` does.
        """
        before, none = session.position, np.zeros(0, np.int64)
        try:
            for start in range(0, len(ids), OBSERVED.tokens):
                chunk = np.asarray(ids[start : start + OBSERVED.tokens], np.int64)
                position = session.position
                with self.model.turns.turn(cancel, "forward"):
                    for step, packing in self.steps:
                        session.position = position  # each part moves it on
                        session._run(step, chunk, none, cancel)
                        see(packing.weights, unpacked(self.program, packing, len(chunk)))
        except BaseException:
            session.position = before
            raise


def unpacked(program: Program, packing: Packing, n_tokens: int) -> NDArray[np.float32]:
    """What was packed, float32 (tokens, columns): a view, until the program goes on."""
    size = abi.F32_COLUMNS
    eights = -(-packing.columns // size)
    room = next(b for b in program.buffers if b.ctypes.data == packing.address)
    packed = room.view(np.float32)[: eights * n_tokens * size].reshape(eights, n_tokens, size)
    return packed.transpose(1, 0, 2).reshape(n_tokens, -1)[:, : packing.columns]


def part(program: Program, first: int, last: int) -> Program:
    """Some of its instructions; all memory is the same."""
    counters = program.counters[first * abi.COUNTER_BYTES : last * abi.COUNTER_BYTES]
    return replace(program, words=program.words[first:last], counters=counters)
