"""The parts that an ONNX graph is put together from: nodes, and constants of the data file.

Each constant and each cast is made once. Knows nothing about the decoder's operators.
"""

import struct
from dataclasses import dataclass, field

from edgellama.runtimes.onnx_layout import Layout, Place
from edgellama.runtimes.onnx_wire import DTYPES, Attribute, Initializer, OnnxModel, OnnxNode

DATA_FILE = "model.onnx.data"


@dataclass
class Builder:
    """An ONNX model in the making; `dtype` is that of activations."""

    layout: Layout
    dtype: str
    model: OnnxModel = field(default_factory=lambda: OnnxModel(DATA_FILE))
    made: set[str] = field(default_factory=set)

    def node(
        self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **kw: Attribute
    ) -> str:
        self.model.nodes.append(OnnxNode(op, tuple(inputs), tuple(outputs), kw, domain))
        return outputs[0]

    def constant(
        self,
        weights: list[str],
        part: str,
        shape: tuple[int, ...] | None = None,
        cast: bool = True,
    ) -> str:
        """The name of an array of the data file, in the activations' type if it is a number."""
        place = self.layout.joined(weights, part)
        name = ".".join([weights[0].removesuffix(".weight"), part])
        if len(weights) > 1:
            name += f".{len(weights)}"
        if shape is not None:
            name += f".{len(shape)}d"
        self._external(name, place, shape or place.shape)
        if place.dtype in ("uint8", self.dtype) or not cast:
            return name
        changed = f"{name}.{self.dtype}"
        if changed not in self.made:
            self.made.add(changed)
            self.node("Cast", [name], [changed], to=DTYPES[self.dtype])
        return changed

    def _external(self, name: str, place: Place, shape: tuple[int, ...]) -> None:
        if name not in self.made:
            self.made.add(name)
            tensor = Initializer(name, place.dtype, shape, offset=place.offset)
            self.model.initializers.append(tensor)

    def number(self, value: int) -> str:
        """An int32 array of one number."""
        name = f"int32.{value}"
        data = struct.pack("<i", value)
        self.model.initializers.append(Initializer(name, "int32", (1,), data))
        return name

    def shape(self, *sizes: int) -> str:
        name = "shape." + ".".join(map(str, sizes))
        if name not in self.made:
            self.made.add(name)
            data = struct.pack(f"<{len(sizes)}q", *sizes)
            self.model.initializers.append(Initializer(name, "int64", (len(sizes),), data))
        return name
