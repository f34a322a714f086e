"""Why an ONNX graph is not the one expected: the first thing in it that edgellama never writes.

Reads untrusted bytes, whose number the caller has bounded; follows no reference. Knows nothing
about what operators compute. Source: onnx.proto of ONNX 1.16.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NoReturn

from edgellama.errors import (
    EdgeLlamaError,
    ModelFormatError,
    UnsafeModelError,
    UnsupportedModelError as Unsupported,
    shown,
)
from edgellama.quantize.protobuf import BYTES, Field, Message
from edgellama.runtimes.onnx_wire import (
    DTYPES,
    IR_VERSION,
    MICROSOFT_OPSET,
    OPSET,
    SIZES,
    OnnxModel,
)

AGAIN = "Make the folder again: edgellama quantize CHECKPOINT OUTPUT.onnx --type Q4_0"
LONGEST = 65_535  # bytes of a name
MOST_DIMS = 8  # of a tensor; the exporter writes 3 at most
_EXTRAS = {14: "metadata_props", 20: "training_info", 25: "functions", 26: "configuration"}
_SUBGRAPHS = (6, 11)  # AttributeProto.g, .graphs
_SIZES = {DTYPES[name]: size for name, size in SIZES.items()}


class _Model(Message):
    def refuse(self, problem: str, at: int, value: object = None) -> NoReturn:
        where = f"byte {at}"
        raise ModelFormatError(problem, path=self.path, where=where, value=value, hint=AGAIN)

    def name(self, found: Field) -> str:
        return self.text(found, "a name", LONGEST)


@dataclass
class _Tensor:
    """An initializer's reference to the data file."""

    name: str = ""
    dtype: int = 0
    dims: list[int] = field(default_factory=list)
    entries: list[tuple[str, str]] = field(default_factory=list)


def explain(path: Path, data: bytes, expected: OnnxModel, data_size: int) -> EdgeLlamaError:
    """The error for a graph that differs from `expected`; `data_size`: of the data file."""
    try:
        _Inspection(_Model(data, path), expected, data_size).run()
    except EdgeLlamaError as error:
        return error
    problem = "the graph is not the one that the folder's tensors mean"
    return ModelFormatError(problem, path=path, hint=AGAIN)


@dataclass
class _Inspection:
    message: _Model
    expected: OnnxModel
    data_size: int

    def __post_init__(self) -> None:
        self.places = {i.name: (i.offset, i.n_bytes) for i in self.expected.initializers}
        self.operators = {(node.op, node.domain) for node in self.expected.nodes}

    def run(self) -> None:
        for found in self.message.fields():
            if found.number == 1:
                self.equal("ir_version", self.message.integer(found, "ir_version"), IR_VERSION)
            elif found.number == 7:
                self.graph(found)
            elif found.number == 8:
                self.opset(found)
            elif found.number in _EXTRAS:
                raise self.unsupported(f"holds {_EXTRAS[found.number]}", _EXTRAS[found.number])

    def equal(self, name: str, value: object, wanted: object) -> None:
        if value != wanted:
            problem = f"{name} = {shown(value)}; expected {wanted}"
            raise self.unsupported(problem, name, value, str(wanted))

    def unsupported(
        self, problem: str, name: str, value: object = None, allowed: str | None = None
    ) -> EdgeLlamaError:
        path = self.message.path
        return Unsupported(problem, path=path, field=name, value=value, allowed=allowed, hint=AGAIN)

    def opset(self, found: Field) -> None:
        domain, version = "", 0
        for part in self.message.inner(found, "opset_import"):
            if part.number == 1:
                domain = self.message.name(part)
            elif part.number == 2:
                version = self.message.integer(part, "version")
        allowed = {"": OPSET, "com.microsoft": MICROSOFT_OPSET}
        if domain not in allowed:
            raise self.unsupported(f"imports operators of {shown(domain)}", "opset_import", domain)
        self.equal(f"opset of {shown(domain)}", version, allowed[domain])

    def graph(self, found: Field) -> None:
        names: dict[int, list[str]] = {11: [], 12: []}
        for part in self.message.inner(found, "graph"):
            if part.number == 1:
                self.node(part)
            elif part.number == 5:
                self.initializer(part)
            elif part.number in names:
                names[part.number] += self.names(part)
        for number, what, wanted in (
            (11, "inputs", self.expected.inputs),
            (12, "outputs", self.expected.outputs),
        ):
            expected = [value.name for value in wanted]
            if names[number] != expected:
                self.rim(what, names[number], expected)

    def rim(self, what: str, found: list[str], expected: list[str]) -> None:
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), -1)
        value = f"{len(found)} {what}" if at < 0 else found[at]
        allowed = f"{len(expected)} {what}" if at < 0 else expected[at]
        raise self.unsupported(f"{what}: {shown(value)}; expected {allowed}", what, value, allowed)

    def names(self, part: Field) -> Iterator[str]:
        for inner in self.message.inner(part, "value"):
            if inner.number == 1:
                yield self.message.name(inner)

    def node(self, found: Field) -> None:
        op, domain = "", ""
        for part in self.message.inner(found, "node"):
            if part.number == 4:
                op = self.message.name(part)
            elif part.number == 7:
                domain = self.message.name(part)
            elif part.number == 5:
                self.attribute(part)
        if (op, domain) not in self.operators:
            full = f"{domain}.{op}" if domain else op
            raise self.unsupported(f"operator {shown(full)} is not allowed", "op_type", full)

    def attribute(self, found: Field) -> None:
        for part in self.message.inner(found, "attribute"):
            if part.number in _SUBGRAPHS:
                raise self.unsupported("a node holds a graph of its own", "attribute")

    # --- external data --------------------------------------------------------------------------

    def initializer(self, found: Field) -> None:
        tensor = _Tensor()
        for part in self.message.inner(found, "initializer"):
            self.tensor_field(tensor, part)
        if tensor.entries:
            self.external(tensor)

    def tensor_field(self, tensor: _Tensor, part: Field) -> None:
        if part.number == 1:
            tensor.dims += islice(self.dims(part), MOST_DIMS + 1 - len(tensor.dims))
        elif part.number == 2:
            tensor.dtype = self.message.integer(part, "data_type")
        elif part.number == 8:
            tensor.name = self.message.name(part)
        elif part.number == 13:
            tensor.entries.append(self.entry(part))

    def dims(self, part: Field) -> Iterator[int]:
        """One, or a packed sequence of them."""
        if part.wire != BYTES:
            yield part.value
            return
        at = part.start
        while at < part.end:
            value, at = self.message._varint(at, part.end)
            yield value

    def entry(self, part: Field) -> tuple[str, str]:
        """Key and value."""
        texts = {1: "", 2: ""}
        for inner in self.message.inner(part, "external_data"):
            if inner.number in texts:
                texts[inner.number] = self.message.name(inner)
        return texts[1], texts[2]

    def external(self, tensor: _Tensor) -> None:
        entries = dict(tensor.entries)
        location = entries.get("location")
        if location != self.expected.data_file:
            allowed = self.expected.data_file
            raise UnsafeModelError(
                f"its data would be read from {shown(location)}; only {allowed} is allowed",
                path=self.message.path,
                where=f"tensor {shown(tensor.name)}",
                field="location",
                value=location,
                allowed=allowed,
            )
        if len(entries) != len(tensor.entries):
            raise self.damaged(tensor, "a key of external_data is there twice", "external_data")
        if unknown := set(entries) - {"location", "offset", "length"}:
            key = min(unknown)
            raise self.damaged(tensor, f"external_data has the key {shown(key)}", key)
        offset, length = (
            self.number(tensor, entries, "offset"),
            self.number(tensor, entries, "length"),
        )
        size = self.size(tensor)
        if length != size:
            raise self.damaged(tensor, f"length = {length}; its shape takes {size}", "length")
        if offset + length > self.data_size:
            problem = f"offset {offset} + length {length} is past the end of the data file"
            raise self.damaged(tensor, f"{problem} ({self.data_size} bytes)", "offset")
        wanted = self.places.get(tensor.name)
        if wanted != (offset, length):
            problem = f"offset = {offset}; another tensor's data lies there, or none"
            raise self.damaged(tensor, problem, "offset")

    def size(self, tensor: _Tensor) -> int:
        """What its shape takes, in bytes: of few dimensions, a number of few digits."""
        if len(tensor.dims) > MOST_DIMS:
            raise self.damaged(tensor, f"it has more than {MOST_DIMS} dimensions", "dims")
        if (largest := max(tensor.dims, default=0)) >= 2**63:  # int64
            raise self.damaged(tensor, f"a dimension is {largest - 2**64}", "dims")
        return _SIZES.get(tensor.dtype, 0) * math.prod(tensor.dims)

    def number(self, tensor: _Tensor, entries: dict[str, str], key: str) -> int:
        text = entries.get(key, "")
        if not (text.isascii() and text.isdecimal() and len(text) <= 19):
            raise self.damaged(tensor, f"{key} = {shown(text)}; expected a decimal number", key)
        return int(text)

    def damaged(self, tensor: _Tensor, problem: str, name: str) -> EdgeLlamaError:
        where = f"tensor {shown(tensor.name)}"
        path = self.message.path
        return ModelFormatError(problem, path=path, where=where, field=name, hint=AGAIN)
