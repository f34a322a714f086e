"""ONNX models as bytes: the few messages that a decoder needs, written in a fixed order.

The same model gives the same bytes everywhere, so a model can be checked by making it again.
Source: onnx.proto of ONNX 1.16 (IR version 10) and protobuf.dev/programming-guides/encoding.
Knows nothing about what the nodes mean.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Attribute = int | float
Dims = Sequence[int | str]  # a name stands for a length that a call decides

IR_VERSION, OPSET, MICROSOFT_OPSET = 10, 21, 1
MICROSOFT = "com.microsoft"
PRODUCER = "edgellama"
DTYPES = {  # TensorProto.DataType
    "float32": 1,
    "uint8": 2,
    "int32": 6,
    "int64": 7,
    "float16": 10,
    "bfloat16": 16,
}
SIZES = {"float32": 4, "uint8": 1, "int32": 4, "int64": 8, "float16": 2, "bfloat16": 2}
EXTERNAL = 1  # TensorProto.DataLocation
_FLOAT, _INT = 1, 2  # AttributeProto.AttributeType


@dataclass(frozen=True)
class OnnxNode:
    """One operation; an empty name leaves an optional input or output out."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    domain: str = ""


@dataclass(frozen=True)
class Initializer:
    """A constant: bytes of its own, or so many bytes of the data file from `offset` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | None = None
    offset: int = 0

    @property
    def n_bytes(self) -> int:
        size = SIZES[self.dtype]
        for n in self.shape:
            size *= n
        return size


@dataclass(frozen=True)
class ValueInfo:
    """What goes in or comes out."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


@dataclass
class OnnxModel:
    """A whole graph. `data_file` is the one name that external data may have."""

    data_file: str
    nodes: list[OnnxNode] = field(default_factory=list)
    initializers: list[Initializer] = field(default_factory=list)
    inputs: list[ValueInfo] = field(default_factory=list)
    outputs: list[ValueInfo] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """The ModelProto."""
        parts = [_message(1, _node(node)) for node in self.nodes]
        parts.append(_text(2, PRODUCER))
        parts += [_message(5, self._initializer(i)) for i in self.initializers]
        parts += [_message(11, _value(v)) for v in self.inputs]
        parts += [_message(12, _value(v)) for v in self.outputs]
        opsets = [_opset("", OPSET), _opset(MICROSOFT, MICROSOFT_OPSET)]
        head = _integer(1, IR_VERSION) + _text(2, PRODUCER)
        return head + _message(7, b"".join(parts)) + b"".join(_message(8, o) for o in opsets)

    def _initializer(self, tensor: Initializer) -> bytes:
        dims = b"".join(_varint(n) for n in tensor.shape)
        head = _message(1, dims) + _integer(2, DTYPES[tensor.dtype]) + _text(8, tensor.name)
        if tensor.data is not None:
            return head + _message(9, tensor.data)
        entries = {
            "location": self.data_file,
            "offset": str(tensor.offset),
            "length": str(tensor.n_bytes),
        }
        where = [_message(13, _text(1, key) + _text(2, value)) for key, value in entries.items()]
        return head + b"".join(where) + _integer(14, EXTERNAL)


def _varint(value: int) -> bytes:
    value &= 2**64 - 1  # negative integers take ten bytes
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _text(number: int, text: str) -> bytes:
    return _message(number, text.encode())


def _opset(domain: str, version: int) -> bytes:
    return _text(1, domain) + _integer(2, version)


def _node(node: OnnxNode) -> bytes:
    parts = [_text(1, name) for name in node.inputs]
    parts += [_text(2, name) for name in node.outputs]
    name = next(output for output in node.outputs if output)
    parts += [_text(3, "/" + name), _text(4, node.op)]
    parts += [_message(5, _attribute(k, v)) for k, v in node.attributes.items()]
    return b"".join(parts) + (_text(7, node.domain) if node.domain else b"")


def _attribute(name: str, value: Attribute) -> bytes:
    if isinstance(value, float):
        content = _varint(2 << 3 | 5) + struct.pack("<f", value)
        return _text(1, name) + content + _integer(20, _FLOAT)
    return _text(1, name) + _integer(3, value) + _integer(20, _INT)


def _value(value: ValueInfo) -> bytes:
    dims = b"".join(
        _message(1, _integer(1, n) if isinstance(n, int) else _text(2, n)) for n in value.dims
    )
    tensor = _integer(1, DTYPES[value.dtype]) + _message(2, dims)
    return _text(1, value.name) + _message(2, _message(1, tensor))
