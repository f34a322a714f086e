"""Every value of the decoder graph on ONNX Runtime: the graph, with values as outputs.

Unfused, all the graph's values are there and ONNX Runtime optimizes nothing; fused, those whose
names survive the lowering. Knows nothing about what the values are compared for.
"""

from dataclasses import replace

import numpy as np

from edgellama.runtimes.onnx_lowering import LOGITS, Manner, lower, shown_name
from edgellama.runtimes.ort import Ort
from edgellama.runtimes.trace import Values


class OfOrt:
    """A second session over the same data file; `runtime` decides accuracy and device.

    Unfused always computes in float32: without its optimizations ONNX Runtime casts the scales in
    every call, and products with activations of 8 bits then give wrong numbers (1.31.1).
    """

    def __init__(self, runtime: Ort, fused: bool = False) -> None:
        manner = replace(runtime.manner, fused=fused)
        if not fused:
            manner = replace(manner, accuracy=0)
        names = [node.output for node in runtime.graph.nodes]
        made = _made(runtime, manner)
        self.shown = tuple(name for name in names if name in made)
        shown = replace(manner, shown=self.shown)
        self.runtime = Ort(runtime.folder, runtime.graph, runtime.options, shown)

    def values(self, ids: list[int]) -> Values:
        session = self.runtime.session()
        binding, n = session.prefill, len(ids)
        room = np.empty((1, n, self.runtime.graph.config.vocab_size), np.float32)
        positions = np.arange(n, dtype=np.int64)
        session.bind(binding, np.array([ids], np.int64), positions[None], positions, room)
        names = [name for name in self.shown if name != LOGITS]
        for name in names:
            binding.bind_output(shown_name(name, self.runtime.manner.dtype), "cpu")
        session.run(binding, n, None, 0)
        outputs = binding.get_outputs()[-len(names) :]  # they come in the order of binding
        found = {
            name: output.numpy()[0].astype(np.float32)
            for name, output in zip(names, outputs, strict=True)
        }
        return found | {LOGITS: room[0]}


def _made(runtime: Ort, manner: Manner) -> set[str]:
    """The names that the lowered graph computes."""
    model = lower(runtime.graph, runtime.folder.layout, manner)
    return {name for node in model.nodes for name in node.outputs}
