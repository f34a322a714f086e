"""Which type each tensor of a quantized model gets, and how many bits a weight then takes.

The mixes are llama.cpp's (`llama_tensor_get_type` of version b10069's `llama-quant.cpp`, as
llama-cpp-python 0.3.36 ships it), so that a file made here has the types that its name promises
everywhere. Knows nothing about how values are encoded or files written.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellama.config import ModelConfig
from edgellama.errors import ParameterError, require_choice, shown
from edgellama.ggml import BY_NAME, FLOATS

if TYPE_CHECKING:
    from edgellama.quantize.source import Source, SourceTensor

FILE_TYPES = {  # what can be asked for: its number (`general.file_type`), its ordinary tensors
    "F32": (0, "F32"),
    "F16": (1, "F16"),
    "BF16": (32, "BF16"),
    "Q8_0": (7, "Q8_0"),
    "Q4_0": (2, "Q4_0"),
    "Q4_1": (3, "Q4_1"),
    "Q5_0": (8, "Q5_0"),
    "Q5_1": (9, "Q5_1"),
    "IQ4_NL": (25, "IQ4_NL"),
    "Q2_K": (10, "Q2_K"),
    "Q3_K_S": (11, "Q3_K"),
    "Q3_K_M": (12, "Q3_K"),
    "Q3_K_L": (13, "Q3_K"),
    "Q4_K_S": (14, "Q4_K"),
    "Q4_K_M": (15, "Q4_K"),
    "Q5_K_S": (16, "Q5_K"),
    "Q5_K_M": (17, "Q5_K"),
    "Q6_K": (18, "Q6_K"),
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
FALLBACKS = {  # for rows that are no multiple of 256: a type of blocks of 32, a little larger
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
_BLOCK = re.compile(r"blk\.([0-9]{1,9})\.")


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output."""

    name: str
    shape: tuple[int, ...]  # slowest dimension first
    source_type: str
    type: str
    reason: str  # "" for the plan's ordinary type, else why it is another one
    fallback: bool = False  # whether its rows do not fit the type that it should have had

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // BY_NAME[self.type].block * BY_NAME[self.type].size

    @property
    def n_bytes(self) -> int:
        return self.n_elements // self.shape[-1] * self.row_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """The types of all tensors, in the order in which they are written."""

    type: str  # the name asked for, in full: "Q4_K_M"
    file_type: int  # `general.file_type`
    tensors: tuple[PlannedTensor, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of tensor data, without padding and header."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Really stored bits a weight: scales, fallbacks and unquantized tensors included."""
        return 8 * self.n_bytes / sum(tensor.n_elements for tensor in self.tensors)

    @property
    def types(self) -> dict[str, int]:
        """How many tensors have each type, the most frequent type first."""
        return dict(Counter(tensor.type for tensor in self.tensors).most_common())

    @property
    def fallbacks(self) -> tuple[PlannedTensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.fallback)


def type_name(name: str) -> str:
    """The full name of a file type, any case in: "q4_k" is "Q4_K_M". Raises ParameterError."""
    upper = name.upper() if isinstance(name, str) else ""
    full = ALIASES.get(upper, upper)
    if full not in FILE_TYPES:
        require_choice("type", name, (*FILE_TYPES, *ALIASES))
    return full


def plan(source: "Source", type: str, strict: bool = False, *, importance: bool = False) -> Plan:
    """The types that the source's tensors get in a file of the named type.

    `importance`: whether there are weights of importance; some mixes then spend their bits
    elsewhere. Raises ParameterError for an unknown type; with `strict` also if the rows of a tensor
    do not fit the type it should have, for which it otherwise gets a larger one.
    """
    full = type_name(type)
    mix = _Mix(full, source.config, "output.weight" not in source.tensors, importance)
    tensors = tuple(mix.planned(tensor) for tensor in source.tensors.values())
    found = Plan(full, FILE_TYPES[full][0], tensors)
    if strict and found.fallbacks:
        raise _refusal(found)
    return found


def _refusal(plan: Plan) -> ParameterError:
    first = plan.fallbacks[0]
    blocks = {name: BY_NAME[ordinary].block for name, (_, ordinary) in FILE_TYPES.items()}
    fitting = ", ".join(n for n, block in blocks.items() if first.shape[-1] % block == 0)
    problem = f"type = {plan.type}: {len(plan.fallbacks)} of {len(plan.tensors)} tensors would get"
    problem += f" a larger type, the first is {shown(first.name)}: {first.reason}"
    hint = f"Types that fit it: {fitting}"
    return ParameterError(problem, field="type", value=plan.type, allowed=fitting, hint=hint)


class _Mix:
    """One file type's rules for one model."""

    def __init__(self, name: str, config: ModelConfig, tied: bool, importance: bool) -> None:
        self.name, self.importance = name, importance
        self.ordinary = FILE_TYPES[name][1]
        self.head = "token_embd.weight" if tied else "output.weight"
        self.layers = config.n_layers
        self.sharing = config.n_heads // config.n_kv_heads  # query heads that share one value head
        self.is_70b = config.n_layers == 80 and self.sharing > 1

    def planned(self, tensor: "SourceTensor") -> PlannedTensor:
        chosen, reason, fallback = self.ordinary, "", False
        if len(tensor.shape) == 1:
            chosen, reason = "F32", "one dimension"
        elif not tensor.name.endswith("weight") or tensor.name.endswith("_norm.weight"):
            chosen, reason = tensor.type, "no matrix of weights: kept"
        elif self.ordinary not in FLOATS:
            chosen, reason, fallback = self._quantized(tensor.name, tensor.shape[-1])
        return PlannedTensor(tensor.name, tensor.shape, tensor.type, chosen, reason, fallback)

    def _quantized(self, name: str, columns: int) -> tuple[str, str, bool]:
        """Type, reason, and whether it is a fallback."""
        fitting, reason = wanted, _ = self._wanted(name)
        if columns % BY_NAME[fitting].block:
            fitting = FALLBACKS.get(fitting, fitting)
        if columns % BY_NAME[fitting].block:
            fitting = "F16"
        if fitting == wanted:
            return wanted, reason, False
        block = BY_NAME[wanted].block
        return fitting, f"rows of {columns} are no multiple of {block}, as {wanted} needs", True

    def _wanted(self, name: str) -> tuple[str, str]:
        """The type that the mix gives to a tensor of fitting rows, and why."""
        if name == self.head:
            chosen = "Q8_0" if self.ordinary == "Q8_0" else "Q6_K"
            return chosen, "" if chosen == self.ordinary else "output head"
        match = _BLOCK.match(name)
        role = name.removesuffix(".weight").rpartition(".")[2]
        special = self._in_block(role, int(match[1])) if match else None
        if special is None or special == self.ordinary:
            return self.ordinary, ""
        return special, f"part of the mix {self.name}"

    def _in_block(self, role: str, layer: int) -> str | None:
        match role:
            case "attn_v":
                return self._attn_v(layer)
            case "ffn_down":
                return self._ffn_down(layer)
            case "attn_output":
                return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.name)
        return None

    def _attn_v(self, layer: int) -> str:
        chosen = self.ordinary
        match self.name:
            case "Q2_K":
                chosen = "Q4_K" if self.sharing >= 4 else "Q3_K"
            case "Q3_K_M":
                chosen = "Q5_K" if layer < 2 else "Q4_K"
            case "Q3_K_L":
                chosen = "Q5_K"
            case "Q4_K_S" if layer < 4:
                chosen = "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if self._sensitive(layer):
                chosen = "Q6_K"
            case "IQ4_NL" if self.sharing >= 4:
                chosen = "Q5_K"
        if self.is_70b and chosen in ("Q3_K", "Q4_K"):  # an eighth of attn_q: bits are cheap here
            chosen = "Q5_K"
        return chosen

    def _ffn_down(self, layer: int) -> str | None:
        early = layer < self.layers // 8
        match self.name:
            case "Q2_K":
                return "Q3_K"
            case "Q3_K_M":
                return "Q5_K" if layer < self.layers // 16 else "Q4_K"
            case "Q3_K_L":
                return "Q5_K"
            case "Q4_K_S" if early:
                return "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if self._sensitive(layer):
                return "Q6_K"
            case "IQ4_NL" if early and not self.importance:
                return "Q5_K"
            case "Q4_0" | "Q5_0" if early and self.importance:
                return self.name.replace("_0", "_1")
        return None

    def _sensitive(self, layer: int) -> bool:
        """The first and the last eighth of the layers, and every third one between."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2
