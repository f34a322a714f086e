"""Where the arrays of every weight lie in the data file of an ONNX folder.

Follows from the graph and the weights' types alone, so a folder needs no table of offsets. Weights
of one input and one type lie one behind the other: together they are one matrix. Knows nothing
about what the arrays hold.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from edgellama.graph import Graph, Node
from edgellama.runtimes import onnx_containers as containers
from edgellama.runtimes.onnx_containers import Container, container
from edgellama.runtimes.onnx_wire import SIZES
from edgellama.weights import expected_shapes

ALIGNMENT = 4096  # a page: what lies there can be mapped


@dataclass(frozen=True)
class Place:
    """An array in the data file."""

    dtype: str
    shape: tuple[int, ...]  # rows first
    offset: int

    @property
    def n_bytes(self) -> int:
        return self.row_bytes * self.shape[0]

    @property
    def row_bytes(self) -> int:
        size = SIZES[self.dtype]
        for n in self.shape[1:]:
            size *= n
        return size


@dataclass
class Layout:
    """All places, by weight and part; `types` are the GGUF types of all weights."""

    graph: Graph
    types: Mapping[str, str]
    how: str = containers.EXACT
    places: dict[tuple[str, str], Place] = field(default_factory=dict)
    size: int = 0  # bytes of the data file

    def __post_init__(self) -> None:
        self.shapes = expected_shapes(self.graph.config)
        self.embedding = next(n.weight for n in self.graph.nodes if n.op == "embed")
        for group in _groups(self.graph, self.types):
            forms = [self._parts(name) for name in group]
            for part in forms[0]:
                self.size = -(-self.size // ALIGNMENT) * ALIGNMENT
                for name, form in zip(group, forms, strict=True):
                    place = Place(*form[part], self.size)
                    self.places[name, part] = place
                    self.size += place.n_bytes

    def form(self, name: str) -> Container:
        return container(self.types[name], self.how)

    def packable(self, names: list[str]) -> bool:
        """Whether these weights, in this order, are one matrix."""
        first = self._parts(names[0])
        for part in first:
            places = [self.places.get((name, part)) for name in names]
            for a, b in itertools.pairwise(places):
                if a is None or b is None or a.offset + a.n_bytes != b.offset:
                    return False
                if (a.dtype, a.shape[1:]) != (b.dtype, b.shape[1:]):
                    return False
        return len({self.form(name) for name in names}) == 1

    def joined(self, names: list[str], part: str) -> Place:
        """The rows of several neighbours as one array."""
        places = [self.places[name, part] for name in names]
        rows = sum(place.shape[0] for place in places)
        return Place(places[0].dtype, (rows, *places[0].shape[1:]), places[0].offset)

    def _parts(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of each array of a weight."""
        shape, form = self.shapes[name], self.form(name)
        if len(shape) == 1:
            return {containers.VALUES: ("float32", shape)}
        if form.bits == 0:
            return {containers.VALUES: (containers.FLOAT_DTYPES[self.types[name]], shape)}
        blocks = shape[1] // form.block
        codes = (shape[0], blocks, form.block * form.bits // 8)
        found: dict[str, tuple[str, tuple[int, ...]]] = {containers.CODES: ("uint8", codes)}
        found[containers.SCALES] = (form.scale, (shape[0], blocks))
        if form.correction:
            found[containers.CORRECTIONS] = (form.correction, (shape[0], blocks))
        if form.zero_points or name == self.embedding:  # gathering wants them said in any case
            found[containers.ZERO_POINTS] = ("uint8", (shape[0], blocks))
        return found


def _groups(graph: Graph, types: Mapping[str, str]) -> Iterator[list[str]]:
    """The weights in the graph's order; query, key and value together if of one type."""
    group: list[str] = []
    source = None
    for node in _once(graph):
        assert node.weight is not None
        name, fits = node.weight, node.op == "linear" and node.output.endswith(QKV)
        if group and not (fits and node.inputs[0] == source and types[name] == types[group[0]]):
            yield group
            group = []
        group.append(name)
        source = node.inputs[0] if fits else None
    yield group


QKV = ("attn_q", "attn_k", "attn_v")


def _once(graph: Graph) -> Iterator[Node]:
    """The first node of each weight."""
    seen: set[str] = set()
    for node in graph.nodes:
        if node.weight and node.weight not in seen:
            seen.add(node.weight)
            yield node
