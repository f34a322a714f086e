"""Lowering: from the decoder graph to the flat program that the kernels run.

Folds what belongs together: products of one input become one instruction where their weights lie
side by side, a residual addition goes into the product before it, rope stores into the cache,
norm and swiglu pack for the product after them. Buffers are allocated once, for a `Batch`.

Knows nothing about threads, sessions or files.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgellama.graph import Graph, Node
from edgellama.runtimes import abi
from edgellama.runtimes.places import (
    CacheShape,
    Matrix,
    Packing,
    aligned,
    attention_bytes,
    part_bytes,
)
from edgellama.runtimes.repack import LAYOUTS, column_blocks, padded


@dataclass(frozen=True)
class Batch:
    """What one call of a program can take, and how it multiplies many tokens."""

    tokens: int  # and rows of logits
    tiles: str = ""  # kernels for products of quantized weights, if not the plain ones
    observed: bool = False  # what goes into products is packed as float32, too: see `Packing`


PLAIN = Batch(64)
TILED = Batch(256, "tiles")  # unpacking a panel is worth it for many tokens


@dataclass(frozen=True)
class Place:
    """Rows of float32: where the first begins, and bytes from one to the next."""

    address: int
    stride: int


@dataclass(frozen=True)
class Program:
    """Instructions ready to run, the memory they work in, and where the logits appear."""

    batch: Batch
    words: NDArray[np.int64]  # (instructions, INSTRUCTION_WORDS)
    counters: NDArray[np.uint8]  # (instructions * COUNTER_BYTES,)
    logits: NDArray[np.float32]  # (batch.tokens, padded vocabulary)
    buffers: list[NDArray[np.uint8]]
    packings: list[Packing]  # of an observed batch
    written: dict[str, tuple[int, Place]]  # values of the graph: there after so many instructions

    @property
    def scratch_bytes(self) -> int:
        return sum(b.nbytes for b in self.buffers) + self.words.nbytes + self.counters.nbytes


def scratch_bytes(graph: Graph, batch: Batch) -> int:
    """Private memory that a thread's kernels need."""
    config = graph.config
    group = config.n_heads // config.n_kv_heads
    panel = padded(max(config.dim, config.q_dim, config.ffn_dim), 256) // abi.BLOCK * abi.PANEL
    tiles = abi.TILE * abi.TILE * 4 + panel if batch.tiles else 0
    return padded(max(attention_bytes(group, config.head_dim), abi.TILE * 64, tiles), 128)


def products(graph: Graph) -> list[tuple[Node, ...]]:
    """The linear nodes, those with the same input together."""
    groups: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "linear":
            groups.setdefault(node.inputs[0], []).append(node)
    return [tuple(group) for group in groups.values()]


def kernel_names(
    graph: Graph, types: dict[str, str], kv_types: Iterable[str], batch: Batch = PLAIN
) -> list[str]:
    """The kernels that a graph needs, given its weights' types and those of its cache."""
    names = ["lead", "follow", "norm", "pack_rows", "swiglu", "select", "rope", "merge"]
    names += [f"attention:{kv_type}" for kv_type in kv_types]
    names += product_kernels(graph, types, batch).values()
    names += [f"embed:{types[n.weight]}" for n in graph.nodes if n.op == "embed" and n.weight]
    return list(dict.fromkeys(names))


def product_kernels(graph: Graph, types: dict[str, str], batch: Batch = PLAIN) -> dict[str, str]:
    """The kernel of each product, by its output: `fine` where rounding would do lasting harm.

    That is in queries, keys and values, which later tokens meet again, and in the logits. Measured
    on the default model: half the distance to full precision for 4 % of the prefill's speed.
    Tiles need no such distinction; logits are wanted of a few tokens only.
    """
    used_by: dict[str, set[str]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            used_by.setdefault(name, set()).add(node.op)
    kernels = {}
    for node in graph.nodes:
        if node.op != "linear" or not node.weight:
            continue
        kind, how = types[node.weight], "linear"
        if LAYOUTS[kind].integer:
            lasting = used_by.get(node.output, set()) <= {"rope", "attention"}
            how = "fine" if lasting else how
            how = batch.tiles if batch.tiles and node.output in used_by else how
        kernels[node.output] = f"{how}:{kind}"
    return kernels


def lower(
    graph: Graph,
    matrices: dict[str, Matrix],
    vectors: dict[str, NDArray[np.float32]],
    kernels: dict[str, int],
    cache: CacheShape,
    batch: Batch = PLAIN,
) -> Program:
    """The program of a graph.

    `vectors` are the norms' weights, padded with zeros to a multiple of 32; `kernels` maps the
    names of `kernel_names` to addresses.
    """
    lowering = _Lowering(graph, matrices, vectors, kernels, cache, batch)
    written = {}
    for node in graph.nodes:
        getattr(lowering, node.op)(node)
        if node.op != "rope" and node.output in lowering.places:  # rotated later, in place
            written[node.output] = (len(lowering.instructions), lowering.places[node.output])
    words = np.zeros((len(lowering.instructions), abi.INSTRUCTION_WORDS), np.int64)
    for row, instruction in zip(words, lowering.instructions, strict=True):
        row[: len(instruction)] = instruction
    counters = aligned(len(words) * abi.COUNTER_BYTES)
    logits, buffers = lowering.logits(), lowering.buffers
    return Program(batch, words, counters, logits, buffers, lowering.packings, written)


def _bits(value: float) -> int:
    """A float64 as the int64 word that holds it."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


_FORMATS = {"q8": abi.Q8_RECORD, "f32": abi.BLOCK * 4, "bf16": abi.BF16_RECORD}  # of 32 columns


@dataclass
class _Lowering:
    graph: Graph
    matrices: dict[str, Matrix]
    vectors: dict[str, NDArray[np.float32]]
    kernels: dict[str, int]
    cache: CacheShape
    batch: Batch
    instructions: list[list[int]] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)
    buffers: list[NDArray[np.uint8]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)  # linear nodes already emitted
    packings: list[Packing] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Packed activations share one room a format: each is read before the next is written."""
        types = {name: matrix.type for name, matrix in self.matrices.items()}
        self.product_kernels = product_kernels(self.graph, types, self.batch)
        self.products = {group[0].inputs[0]: group for group in products(self.graph)}
        self.consumers: dict[str, list[Node]] = {}
        widest = dict.fromkeys(_FORMATS, 0)
        for node in self.graph.nodes:
            for name in node.inputs:
                self.consumers.setdefault(name, []).append(node)
            if node.op == "linear":
                columns = padded(self._matrix(node).columns, abi.BLOCK)
                for kind in self._formats((node,)):
                    widest[kind] = max(widest[kind], columns)
        self.packed = {
            kind: self._room(columns // abi.BLOCK * _FORMATS[kind] * self.batch.tokens)
            for kind, columns in widest.items()
        }
        self.rooms: dict[tuple[str, int], Place] = {}

    def _room(self, n_bytes: int) -> int:
        self.buffers.append(aligned(n_bytes))
        return self.buffers[-1].ctypes.data

    def _rows(self, purpose: str, columns: int) -> Place:
        """Rows of float32 for one purpose: every layer uses the same."""
        stride = padded(columns, abi.BLOCK) * 4
        if (purpose, stride) not in self.rooms:
            self.rooms[purpose, stride] = Place(self._room(self.batch.tokens * stride), stride)
        return self.rooms[purpose, stride]

    def _emit(self, kernel: str, units: int, times: int, *args: int) -> None:
        self.instructions.append([self.kernels[kernel], units, times, *args])

    def _packed(self, value: str) -> tuple[int, int, int]:
        """(q8 address, f32 address, bf16 address) that the products of a value want, 0 for none."""
        nodes = self.products[value]
        kinds = self._formats(nodes)
        if self.batch.observed:  # the instruction at hand will have packed them
            weights = tuple(node.weight or "" for node in nodes)
            columns, after = self._matrix(nodes[0]).columns, len(self.instructions) + 1
            self.packings.append(Packing(after, weights, columns, self.packed["f32"]))
        q8, f32, bf16 = (self.packed[kind] if kind in kinds else 0 for kind in _FORMATS)
        return q8, f32, bf16

    def _formats(self, nodes: tuple[Node, ...]) -> set[str]:
        kinds = {self._format(node) for node in nodes}
        return kinds | {"f32"} if self.batch.observed else kinds

    def _format(self, node: Node) -> str:
        """How the product's kernel wants the activations packed."""
        if self.product_kernels[node.output].partition(":")[0] == self.batch.tiles:
            return "bf16"
        return "q8" if self._matrix(node).integer else "f32"

    def _matrix(self, node: Node) -> Matrix:
        assert node.weight is not None
        return self.matrices[node.weight]

    def _times(self, value: str) -> int:
        return abi.N_ROWS if value in ("output_norm", "output") else abi.N_TOKENS

    # --- operators: each emits what its node needs, or notes that another has done it -----------

    def embed(self, node: Node) -> None:
        m = self._matrix(node)
        place = self._rows("residual", m.columns)
        blocks = column_blocks(m.type, m.columns)
        self._emit(
            f"embed:{m.type}", 1, abi.N_TOKENS, m.address, blocks, place.address, place.stride
        )
        self.places[node.output] = place

    def select(self, node: Node) -> None:
        source = self.places[node.inputs[0]]
        place = self._rows("selected", self.graph.config.dim)
        self._emit("select", 1, abi.N_ROWS, source.address, place.address, source.stride)
        self.places[node.output] = place

    def norm(self, node: Node) -> None:
        config, times = self.graph.config, self._times(node.output)
        place, weight = self.places[node.inputs[0]], self.vectors[node.weight or ""]
        q8, f32, bf16 = self._packed(node.output)
        self._emit(
            "norm",
            1,
            times,
            place.address,
            place.stride,
            padded(config.dim, abi.BLOCK) // abi.BLOCK,
            q8,
            f32,
            weight.ctypes.data,
            _bits(config.norm_eps),
            _bits(1.0 / config.dim),
            times,
            bf16,
        )

    def linear(self, node: Node) -> None:
        """With the first of the products of one input, all of them."""
        if node.output in self.seen:
            return
        group = self.products[node.inputs[0]]
        self.seen.update(n.output for n in group)
        residual = self._residual(node)
        if residual is not None:
            self._product([node], residual, accumulate=True)
            return
        width = sum(map(self._groups, group)) * abi.LANES
        room = self._rows(f"products of {len(group)}", width)
        at = room.address
        for run in self._neighbours(group):
            self._product(run, Place(at, room.stride), accumulate=False)
            for n in run:
                self.places[n.output] = Place(at, room.stride)
                at += self._groups(n) * abi.LANES * 4

    def _residual(self, node: Node) -> Place | None:
        """Where the product is added to, if an addition is its only consumer."""
        consumers = self.consumers.get(node.output, [])
        if len(consumers) != 1 or consumers[0].op != "add":
            return None
        x = next(name for name in consumers[0].inputs if name != node.output)
        return self.places[x]

    def _neighbours(self, group: tuple[Node, ...]) -> Iterator[list[Node]]:
        """Runs of products whose weights are of one type and lie one behind the other."""
        run: list[Node] = []
        for node in group:
            if run and not self._follows(self._matrix(run[-1]), self._matrix(node)):
                yield run
                run = []
            run.append(node)
        yield run

    @staticmethod
    def _follows(a: Matrix, b: Matrix) -> bool:
        size = a.groups * column_blocks(a.type, a.columns) * LAYOUTS[a.type].block_bytes
        return a.type == b.type and a.address + size == b.address

    def _product(self, run: list[Node], place: Place, *, accumulate: bool) -> None:
        first, times = self._matrix(run[0]), self._times(run[0].output)
        kernel, groups = self.product_kernels[run[0].output], sum(map(self._groups, run))
        tiled = self._format(run[0]) == "bf16"
        self._emit(
            kernel,
            -(-groups * abi.LANES // abi.TILE) if tiled else groups,
            abi.ONE,
            first.address,
            column_blocks(first.type, first.columns),
            self.packed[self._format(run[0])],
            place.address,
            place.stride,
            int(accumulate),
            times,
            groups,
        )

    def _groups(self, node: Node) -> int:
        return self._matrix(node).groups

    def rope(self, node: Node) -> None:
        """Done with the attention, in place."""
        self.places[node.output] = self.places[node.inputs[0]]

    def attention(self, node: Node) -> None:
        config, cache = self.graph.config, self.cache
        assert node.layer is not None
        q, k, v = (self.places[name] for name in node.inputs)
        where = (node.layer * cache.layer_bytes, cache.block_bytes)
        heads = (config.n_heads, config.n_kv_heads, config.head_dim)
        self._emit(
            "rope",
            config.n_heads + config.n_kv_heads,
            abi.N_TOKENS,
            *(q.address, k.address, v.address, q.stride),
            *(*heads, config.rope.dim // 2, cache.kind, *where),
        )
        parts = self._parts()
        self._emit(
            f"attention:{cache.kv_type}",
            config.n_kv_heads,
            abi.ATTENTION_UNITS,
            *(q.address, q.stride, parts.address, parts.stride),
            *(config.n_kv_heads, config.n_heads // config.n_kv_heads, config.head_dim, *where),
            _bits(config.head_dim**-0.5),
            config.sliding_window or 0,
        )
        out = self._rows("attention", config.q_dim)
        self._emit(
            "merge",
            config.n_heads,
            abi.N_TOKENS,
            *(parts.address, parts.stride, out.address, out.stride),
            *(config.n_heads, config.head_dim),
        )
        blocks = padded(config.q_dim, abi.BLOCK) // abi.BLOCK
        packed = self._packed(node.output)
        self._emit("pack_rows", 1, abi.N_TOKENS, out.address, out.stride, blocks, *packed)

    def _parts(self) -> Place:
        """Sums of attention: of every token, or of every split of the cache for a single one."""
        stride = part_bytes(self.graph.config.head_dim)
        if ("parts", stride) not in self.rooms:
            count = max(self.batch.tokens, self.cache.most_splits) * self.graph.config.n_heads
            self.rooms["parts", stride] = Place(self._room(count * stride), stride)
        return self.rooms["parts", stride]

    def swiglu(self, node: Node) -> None:
        gate, up = (self.places[name] for name in node.inputs)
        blocks = padded(self.graph.config.ffn_dim, abi.BLOCK) // abi.BLOCK
        q8, f32, bf16 = self._packed(node.output)
        columns = padded(self.graph.config.ffn_dim, abi.LANES) // abi.LANES
        places = (gate.address, up.address, gate.stride)
        self._emit("swiglu", blocks, abi.N_TOKENS, *places, blocks, q8, f32, columns, bf16)

    def add(self, node: Node) -> None:
        """The product before it has added to the residual, in place."""
        x = next(name for name in node.inputs if name in self.places)
        self.places[node.output] = self.places[x]

    def logits(self) -> NDArray[np.float32]:
        place = self.places["output"]
        room = next(b for b in self.buffers if b.ctypes.data == place.address)
        return room.view(np.float32).reshape(self.batch.tokens, place.stride // 4)
