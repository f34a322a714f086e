"""Lowering: from the decoder graph to an ONNX model that computes it.

Values have the graph's names. Fused, products of one input are one, rotation happens inside the
attention and an addition inside the norm after it; unfused, every node's value exists. Knows
nothing about files, sessions or devices.

Inputs: tokens int64 (1, t); rows int64 (r,); past int32 (1,), tokens in the cache, the new ones
included, less 1; total int32 (), its size for the attention; cos and sin (positions, rope.dim / 2);
keys.i and values.i (1, n_kv_heads, context, head_dim), which the outputs keys.i.new and
values.i.new must share. Unfused also positions int64 (1, t). Output: float32 (1, r, vocab_size).
"""

from collections.abc import Callable
from dataclasses import dataclass

from edgellama.config import ModelConfig
from edgellama.graph import Graph, Node
from edgellama.runtimes import onnx_containers as containers
from edgellama.runtimes.onnx_builder import Builder
from edgellama.runtimes.onnx_layout import QKV, Layout
from edgellama.runtimes.onnx_wire import (
    DTYPES,
    MICROSOFT,
    Attribute,
    OnnxModel,
    ValueInfo,
)

LOGITS = "output"
TOP = "top"  # of each row: the likeliest tokens' logits, their ids, the first one's log p
NEXT, NEXT_PAST = "next", "past.next"  # the likeliest of a single row, and `past` one further
ROTATED = 16  # the attention itself rotates heads and parts of heads of multiples of this only
HEADS = 8  # it takes heads of multiples of this: others are padded with zeros


@dataclass(frozen=True)
class Manner:
    """How a graph is lowered. `accuracy`: 4 rounds activations to 8 bits, 0 computes in float32."""

    dtype: str = "float32"  # of activations, keys and values
    accuracy: int = 4
    fused: bool = True
    shown: tuple[str, ...] = ()  # values of the graph to give as outputs
    candidates: int = 0  # how many of the likeliest tokens to give as outputs; 0: logits alone


def lower(graph: Graph, layout: Layout, manner: Manner) -> OnnxModel:
    """The ONNX model of a graph whose weights lie as the layout says."""
    lowering = _Lowering(graph, layout, manner)
    lowering.inputs()
    for node in graph.nodes:
        lowering.emit(node)
    lowering.outputs()
    return lowering.model


class _Lowering(Builder):
    def __init__(self, graph: Graph, layout: Layout, manner: Manner) -> None:
        super().__init__(layout, manner.dtype)
        self.graph, self.config, self.manner = graph, graph.config, manner
        fitting = self.config.head_dim % ROTATED == self.config.rope.dim % ROTATED == 0
        self.rotates, self.width = manner.fused and fitting, cache_width(self.config)
        self.producers = {node.output: node for node in graph.nodes}
        self.waiting: dict[str, Node] = {}  # by output: done by a later node

    # --- the model's rim ------------------------------------------------------------------------

    def inputs(self) -> None:
        c = self.config
        info, half = self.model.inputs, c.rope.dim // 2
        info.append(ValueInfo("tokens", "int64", (1, "t")))
        if not self.rotates:
            info.append(ValueInfo("positions", "int64", (1, "t")))
        info.append(ValueInfo("rows", "int64", ("r",)))
        info.append(ValueInfo("past", "int32", (1,)))
        info.append(ValueInfo("total", "int32", ()))
        angles = angles_dtype(self.dtype)
        info += [ValueInfo(name, angles, ("positions", half)) for name in ("cos", "sin")]
        info += [self._cache(name) for name in cache_names(c.n_layers)]

    def outputs(self) -> None:
        c, out = self.config, self.model.outputs
        out.append(ValueInfo(LOGITS, "float32", (1, "r", c.vocab_size)))
        out += [self._cache(new_name(name)) for name in cache_names(c.n_layers)]
        if self.manner.candidates:
            self._choices(min(self.manner.candidates, c.vocab_size))
        for name in self.manner.shown:
            if name != LOGITS:
                self._show(name)

    def _show(self, name: str) -> None:
        """A value of the graph as an output that NumPy has a type for."""
        dtype, shown = angles_dtype(self.dtype), shown_name(name, self.dtype)
        if shown != name:
            self.node("Cast", [name], [shown], to=DTYPES[dtype])
        self.model.outputs.append(ValueInfo(shown, dtype, (1, "n", "width")))

    def _choices(self, count: int) -> None:
        """The likeliest tokens; and what a step needs to be fed with its own result.

        `top` is one array, so that one copy takes it off the device; float32 holds every id.
        `past.next` depends on `next`, so that it is written last. No reductions: on CUDA they
        would need cuDNN.
        """
        logits, ids = "top.logits", "top.ids"
        self.node("TopK", [LOGITS, self.shape(count)], [logits, ids], axis=-1, sorted=1)
        first = self.node("Slice", [ids, *map(self.shape, (0, 1, 2))], ["next.first"])
        every = self.node("LogSoftmax", [LOGITS], ["log_p"], axis=-1)
        log_p = self.node("GatherElements", [every, first], ["top.log_p"], axis=-1)
        numbers = self.node("Cast", [ids], ["top.ids.float32"], to=DTYPES["float32"])
        self.node("Concat", [logits, numbers, log_p], [TOP], axis=-1)
        self.node("Reshape", [first, self.shape(1, -1)], [NEXT])
        narrow = self.node("Cast", [NEXT], ["next.int32"], to=DTYPES["int32"])
        zero = self.node("Mul", [narrow, self.number(0)], ["next.zero"])
        flat = self.node("Reshape", [zero, self.shape(-1)], ["next.zero.flat"])
        further = self.node("Add", ["past", self.number(1)], ["past.further"])
        self.node("Add", [further, flat], [NEXT_PAST])
        info = self.model.outputs
        info.append(ValueInfo(TOP, "float32", (1, "r", 2 * count + 1)))
        info.append(ValueInfo(NEXT, "int64", (1, "r")))
        info.append(ValueInfo(NEXT_PAST, "int32", ("r",)))

    def _cache(self, name: str) -> ValueInfo:
        c = self.config
        return ValueInfo(name, self.dtype, (1, c.n_kv_heads, "context", self.width))

    # --- nodes ----------------------------------------------------------------------------------

    def emit(self, node: Node) -> None:
        """The ONNX nodes of a graph node, unless a later one does its work."""
        fused = self.manner.fused
        if fused and (
            node.op == "add"
            or (node.op == "rope" and self.rotates)
            or (node.op == "linear" and node.output.endswith(QKV))
        ):
            self.waiting[node.output] = node
            return
        operator: Callable[[Node], None] = getattr(self, node.op)
        operator(node)

    def value(self, name: str) -> str:
        """A value's name, its node emitted if it was waiting."""
        node = self.waiting.pop(name, None)
        if node is not None:
            operator: Callable[[Node], None] = getattr(self, node.op)
            operator(node)
        return name

    def embed(self, node: Node) -> None:
        assert node.weight is not None
        name, form = node.weight, self.layout.form(node.weight)
        if form.bits == 0:
            rows = self.constant([name], containers.VALUES, cast=False)
            stored = self.layout.places[name, containers.VALUES].dtype
            found = node.output if stored == self.dtype else node.output + ".stored"
            self.node("Gather", [rows, "tokens"], [found])
            if found != node.output:
                self.node("Cast", [found], [node.output], to=DTYPES[self.dtype])
            return
        place = self.layout.places[name, containers.SCALES]
        cubic = (*place.shape, 1)
        kinds = (containers.SCALES, containers.ZERO_POINTS)
        scales, zeros = (self.constant([name], kind, cubic) for kind in kinds)
        codes = self.constant([name], containers.CODES)
        blocks = self.node(
            "GatherBlockQuantized",
            [codes, "tokens", scales, zeros],
            [node.output + ".blocks"],
            MICROSOFT,
            bits=form.bits,
            block_size=form.block,
            gather_axis=0,
            quantize_axis=2,
        )
        if form.correction:
            extra = self.constant([name], containers.CORRECTIONS, cubic)
            gathered = self.node("Gather", [extra, "tokens"], [node.output + ".gathered"])
            blocks = self.node("Add", [blocks, gathered], [node.output + ".corrected"])
        self.node("Reshape", [blocks, self.shape(0, 0, self.config.dim)], [node.output])

    def norm(self, node: Node) -> None:
        assert node.weight is not None
        weight, epsilon = (
            self.constant([node.weight], containers.VALUES),
            self.config.norm_eps,
        )
        add = self.waiting.pop(node.inputs[0], None)
        if add is None:
            self.node(
                "SimplifiedLayerNormalization",
                [self.value(node.inputs[0]), weight],
                [node.output],
                axis=-1,
                epsilon=epsilon,
                stash_type=1,
            )
            return
        a, b = (self.value(name) for name in add.inputs)
        outputs = [node.output, "", "", add.output]
        self.node(
            "SkipSimplifiedLayerNormalization", [a, b, weight], outputs, MICROSOFT, epsilon=epsilon
        )

    def linear(self, node: Node) -> None:
        assert node.weight is not None
        source, out = self.value(node.inputs[0]), node.output
        if out != LOGITS or self.dtype == "float32":
            self._product(source, [node.weight], out)
            return
        self._product(source, [node.weight], LOGITS + ".half")
        self.node("Cast", [LOGITS + ".half"], [LOGITS], to=DTYPES["float32"])

    def _product(self, source: str, weights: list[str], out: str) -> str:
        """source @ rows of the weights, one behind the other."""
        form = self.layout.form(weights[0])
        if form.bits == 0:
            matrix = self.constant(weights, containers.VALUES)
            return self.node("FusedMatMul", [source, matrix], [out], MICROSOFT, transB=1)
        codes = self.layout.joined(weights, containers.CODES)
        kinds = [containers.CODES, containers.SCALES]
        kinds += [containers.ZERO_POINTS] if form.zero_points else []
        inputs = [source, *(self.constant(weights, kind) for kind in kinds)]
        result = out + ".centred" if form.correction else out
        rows, blocks, _ = codes.shape
        self.node(
            "MatMulNBits",
            inputs,
            [result],
            MICROSOFT,
            K=blocks * form.block,
            N=rows,
            bits=form.bits,
            block_size=form.block,
            accuracy_level=self.manner.accuracy,
        )
        if form.correction:
            sums = self._block_sums(source, blocks, form.block)
            extra = self.constant(weights, containers.CORRECTIONS)
            part = out + ".correction"
            self.node("FusedMatMul", [sums, extra], [part], MICROSOFT, transB=1)
            self.node("Add", [result, part], [out])
        return out

    def _block_sums(self, source: str, blocks: int, width: int) -> str:
        """(1, t, blocks): what a weight's corrections are multiplied by."""
        name = f"{source}.sums{width}"
        if name not in self.made:
            self.made.add(name)
            cut = self.node("Reshape", [source, self.shape(0, 0, blocks, width)], [name + ".cut"])
            self.node("ReduceSum", [cut, self.shape(3)], [name], keepdims=0)
        return name

    def rope(self, node: Node) -> None:
        c = self.config
        self.node(
            "RotaryEmbedding",
            [self.value(node.inputs[0]), "positions", *self._angles()],
            [node.output],
            MICROSOFT,
            interleaved=1,
            num_heads=self._heads(node.output),
            rotary_embedding_dim=0 if c.rope.dim == c.head_dim else c.rope.dim,
        )

    def attention(self, node: Node) -> None:
        c, layer = self.config, node.layer
        names = [f"keys.{layer}", f"values.{layer}"]
        inputs = [*self._queries(node), *names, "past", "total"]
        attributes: dict[str, Attribute] = {
            "num_heads": c.n_heads,
            "kv_num_heads": c.n_kv_heads,
            "scale": c.head_dim**-0.5,
        }
        if self.rotates:
            inputs += self._angles()
            attributes |= {"do_rotary": 1, "rotary_interleaved": 1}
        if c.sliding_window is not None:
            attributes["local_window_size"] = c.sliding_window
        padded = self.width != c.head_dim
        out = node.output + ".padded" if padded else node.output
        outputs = [out, *map(new_name, names)]
        self.node("GroupQueryAttention", inputs, outputs, MICROSOFT, **attributes)
        if padded:
            self._narrowed(out, node.output)

    def _angles(self) -> list[str]:
        """cos and sin in the activations' type."""
        if angles_dtype(self.dtype) == self.dtype:
            return ["cos", "sin"]
        names = [f"{name}.{self.dtype}" for name in ("cos", "sin")]
        for name, out in zip(("cos", "sin"), names, strict=True):
            if out not in self.made:
                self.made.add(out)
                self.node("Cast", [name], [out], to=DTYPES[self.dtype])
        return names

    def _queries(self, node: Node) -> list[str]:
        """Queries, keys, values; as one product's rows where the weights allow it."""
        if not self.rotates:
            names = [self.value(name) for name in node.inputs]
            return names if self.width == self.config.head_dim else list(map(self._padded, names))
        linears = [self._unrotated(name) for name in node.inputs]
        for name in node.inputs:  # the attention will rotate them
            if self.producers[name].op == "rope":
                self.waiting.pop(name, None)
        if not self._packable(linears):
            return [self.value(n.output) for n in linears]
        for n in linears:
            self.waiting.pop(n.output)
        name = node.output + "_qkv"
        weights = [n.weight for n in linears if n.weight]
        return [self._product(self.value(linears[0].inputs[0]), weights, name), "", ""]

    def _packable(self, linears: list[Node]) -> bool:
        """Whether products are rows of one."""
        weights = [n.weight for n in linears if n.weight and n.op == "linear"]
        one = len({n.inputs for n in linears}) == 1 and len(weights) == len(linears)
        return one and self.layout.packable(weights)

    def _heads(self, name: str) -> int:
        return self.config.n_heads if "attn_q" in name else self.config.n_kv_heads

    def _padded(self, name: str) -> str:
        """Every head with zeros behind it: they add nothing to a product."""
        size, width = self.config.head_dim, self.width
        heads = self.node("Reshape", [name, self.shape(0, 0, -1, size)], [name + ".heads"])
        pads = self.shape(0, 0, 0, 0, 0, 0, 0, width - size)
        wide = self.node("Pad", [heads, pads], [name + ".wide"])
        flat = self.shape(0, 0, self.width * self._heads(name))
        return self.node("Reshape", [wide, flat], [name + ".padded"])

    def _narrowed(self, name: str, out: str) -> None:
        """Every head without the zeros."""
        size, width = self.config.head_dim, self.width
        heads = self.node("Reshape", [name, self.shape(0, 0, -1, width)], [name + ".heads"])
        ends = [self.shape(0), self.shape(size), self.shape(3)]
        cut = self.node("Slice", [heads, *ends], [name + ".cut"])
        self.node("Reshape", [cut, self.shape(0, 0, self.config.q_dim)], [out])

    def _unrotated(self, name: str) -> Node:
        node = self.producers[name]
        return self.producers[node.inputs[0]] if node.op == "rope" else node

    def swiglu(self, node: Node) -> None:
        gate, up = (self.value(name) for name in node.inputs)
        if self.manner.fused:
            gated = self.node("QuickGelu", [gate], [node.output + ".silu"], MICROSOFT, alpha=1.0)
        else:
            sigmoid = self.node("Sigmoid", [gate], [node.output + ".sigmoid"])
            gated = self.node("Mul", [gate, sigmoid], [node.output + ".silu"])
        self.node("Mul", [gated, up], [node.output])

    def add(self, node: Node) -> None:
        self.node("Add", [self.value(name) for name in node.inputs], [node.output])

    def select(self, node: Node) -> None:
        self.node("Gather", [self.value(node.inputs[0]), "rows"], [node.output], axis=1)


def cache_names(layers: int) -> list[str]:
    """The inputs that are a session's cache."""
    return [f"{kind}.{layer}" for layer in range(layers) for kind in ("keys", "values")]


def cache_width(config: ModelConfig) -> int:
    """Numbers that a position's keys or values of one head take."""
    return -(-config.head_dim // HEADS) * HEADS


def angles_dtype(dtype: str) -> str:
    """The type of cos and sin as inputs: NumPy has no bfloat16."""
    return "float32" if dtype == "bfloat16" else dtype


def shown_name(name: str, dtype: str) -> str:
    """The output that shows a value."""
    return name + ".shown" if dtype == "bfloat16" else name


def new_name(name: str) -> str:
    """The output that a cache's input shares its memory with."""
    return name + ".new"
