"""The certificate in a file: what it was made from answered so, and what it holds has these sums.

A checksum for each tensor and for each key, so that a change has a name; how far each tensor is
from the source's, row by row, so that a converter that mixes something up is found out whatever
the type; the token ids of a few prompts, so that another tokenizer shows; and the largest logits
of the source's own weights. Written by `convert.py`, replayed by `verify.py`. Knows nothing about
how the file is laid out.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgellama.errors import EdgeLlamaError, ModelFormatError, shown
from edgellama.quantize.blocks import decode
from edgellama.quantize.forecast import Forecast
from edgellama.tokenizer import Tokenizer, tokenizer_from_gguf

if TYPE_CHECKING:
    from edgellama.quantize.source import Source
    from edgellama.quantize.stream import Piece

KEY = "edgellama.certificate"
VERSION = 1
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old",
    "def mean(values):\n    return sum(values) /",
    "Größe, naïve, 你好 and 12,345.67 \U0001f600: all of this is",
)
TURNED = ("attn_q.weight", "attn_k.weight")  # whose rows rope pairs up
TOP = 16  # logits kept of each prompt
SUM = 16  # hexadecimal digits of a checksum
_LOGIT = 12  # characters that a rounded logit and its comma may take
_ERROR = 10  # those of an error
SAMPLE = 1 << 16  # weights of each tensor that are compared with the source's


@dataclass(frozen=True)
class Witnessed:
    """What the source answered to one prompt."""

    ids: tuple[int, ...]
    top: tuple[int, ...]  # the likeliest next tokens, the likeliest first
    logits: tuple[float, ...]  # theirs
    spread: float  # standard deviation of all logits


@dataclass(frozen=True)
class Certificate:
    """What a file's certificate says."""

    rope: str  # the source's convention: "half" or "interleaved"
    tensors: dict[str, str]  # checksums by name
    errors: dict[str, float]  # normalized mean square error of the first rows, by name
    keys: dict[str, str]
    prompts: tuple[Witnessed, ...]

    def to_json(self) -> str:
        prompts = [
            [list(p.ids), list(p.top), [round(x, 3) for x in p.logits], round(p.spread, 3)]
            for p in self.prompts
        ]
        document = {
            "version": VERSION,
            "rope": self.rope,
            "tensors": self.tensors,
            "errors": {name: float(f"{error:.3g}") for name, error in self.errors.items()},
            "keys": self.keys,
            "prompts": prompts,
        }
        return json.dumps(document, separators=(",", ":"))


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:SUM]


def key_checksums(metadata: Mapping[str, Any]) -> dict[str, str]:
    """A checksum for each key but the certificate itself; as a file keeps it, in float32."""
    return {key: checksum(_canonical(v)) for key, v in metadata.items() if key != KEY}


def _canonical(value: Any) -> bytes:
    """The same bytes for a value before it is written and after it was read."""
    if isinstance(value, str):
        return b"s" + value.encode("utf-8", "surrogatepass")
    if isinstance(value, bool | np.bool_):
        return b"b1" if value else b"b0"
    if isinstance(value, int | np.integer):
        return b"i%d" % int(value)
    if isinstance(value, float | np.floating):
        return b"f" + np.float32(value).tobytes()
    if len(value) and isinstance(value[0], str):
        parts = (text.encode("utf-8", "surrogatepass") for text in value)
        return b"S" + b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    array = np.asarray(value)
    if array.dtype.kind == "f":
        return b"F" + array.astype("<f4").tobytes()
    return b"I" + array.astype("<i8").tobytes()


def prompt_ids(tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    """The prompts as the file's own tokenizer has them, BOS where it asks for one."""
    encoded = (tokenizer.encode(prompt, bos=tokenizer.add_bos) for prompt in PROMPTS)
    kept = [ids for ids in encoded if ids and max(ids) < vocab_size]
    return kept


class Clerk:
    """Makes the certificate of a conversion: sees its pieces, then testifies (`convert.Witness`).

    `metadata` is what will be written.
    """

    key = KEY

    def __init__(
        self, source: "Source", metadata: Mapping[str, Any], tensors: Iterable[str]
    ) -> None:
        tokenizer = tokenizer_from_gguf(metadata, source.path)
        self._ids = prompt_ids(tokenizer, source.config.vocab_size)
        self._forecast = Forecast(source, self._ids)
        self._keys, self._rope = key_checksums(metadata), source.rope_convention
        self._head_dim = source.config.head_dim
        self._sums = {name: hashlib.sha256() for name in tensors}
        empty = Certificate(
            self._rope,
            dict.fromkeys(self._sums, "0" * SUM),
            dict.fromkeys(self._sums, 0.0),
            self._keys,
            tuple(Witnessed(tuple(ids), (), (), 0.0) for ids in self._ids),
        )
        longest_id = len(str(source.config.vocab_size)) + 1
        room = len(self._ids) * (TOP + 1) * (longest_id + _LOGIT)
        self.size = len(empty.to_json().encode()) + room + _ERROR * len(self._sums)
        self._errors: dict[str, float] = {}

    def see(self, piece: "Piece") -> None:
        assert piece.rows is not None
        self._sums[piece.planned.name].update(piece.data.data)
        if piece.first == 0:
            self._errors[piece.planned.name] = self._error(piece)
        self._forecast.see(piece.planned.name, piece.first, piece.rows)

    def _error(self, piece: "Piece") -> float:
        """How far the first rows of a tensor, as written, are from the source's."""
        assert piece.rows is not None
        rows = piece.rows.reshape(len(piece.rows), -1)
        if self._rope == "half" and piece.planned.name.endswith(TURNED):
            rows = side_by_side(rows, self._head_dim)
        count = max(self._head_dim, SAMPLE // rows.shape[1])
        wanted = rows[:count].astype(np.float64)
        found = decode(piece.planned.type, piece.data[:count]).reshape(wanted.shape)
        size = float(np.sum(wanted**2))
        return float(np.sum((found - wanted) ** 2)) / size if size else float(np.any(found))

    def testify(self) -> str:
        sums = {name: digest.hexdigest()[:SUM] for name, digest in self._sums.items()}
        prompts = [
            witnessed(ids, row) for ids, row in zip(self._ids, self._forecast.logits(), strict=True)
        ]
        found = Certificate(self._rope, sums, self._errors, self._keys, tuple(prompts))
        return found.to_json()


def side_by_side(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows of heads with dimension i next to i + head_dim / 2: GGUF's row 2i is row i, 2i + 1 the
    other. Said once more than in `SourceTensor.arrange`, which it is to check."""
    number = np.arange(len(rows))
    head, at = number // head_dim, number % head_dim
    turned: NDArray[np.float32] = rows[head * head_dim + at // 2 + at % 2 * (head_dim // 2)]
    return turned


def witnessed(ids: list[int], logits: NDArray[np.float32]) -> Witnessed:
    """What to keep of logits, (vocab_size,)."""
    top = np.argsort(-logits, kind="stable")[:TOP]
    spread = max(float(logits.std()), 0.001)
    return Witnessed(tuple(ids), tuple(top.tolist()), tuple(logits[top].tolist()), spread)


# --- reading -------------------------------------------------------------------------------------


def read_certificate(metadata: Mapping[str, Any], path: Any) -> Certificate:
    """The certificate among a file's keys. Raises ModelFormatError if it is none that we wrote,
    EdgeLlamaError if there is none."""
    text = metadata.get(KEY)
    if not isinstance(text, str):
        raise EdgeLlamaError(
            "the file has no certificate",
            path=path,
            field=KEY,
            hint="It was made by other software, or with --certificate none",
        )
    try:
        document = json.loads(text.rstrip())
        if document["version"] != VERSION:
            raise ValueError(f"version {shown(document['version'])}; this release reads {VERSION}")
        prompts = tuple(_prompt(*entry) for entry in document["prompts"])
        rope, tensors, keys = document["rope"], document["tensors"], document["keys"]
        errors = {name: _error(error) for name, error in document["errors"].items()}
        named = all(isinstance(x, str) for part in (tensors, keys) for x in part.values())
        if rope not in ("half", "interleaved") or not named or not prompts:
            raise ValueError("a field is not what the format says")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelFormatError(
            f"the certificate cannot be read: {error}", path=path, where=f"key '{KEY}'", field=KEY
        ) from error
    return Certificate(rope, tensors, errors, keys, prompts)


def _error(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
        raise ValueError("an error is no finite number from 0 on")
    return float(value)


def _prompt(ids: Any, top: Any, logits: Any, spread: Any) -> Witnessed:
    whole = all(type(x) is int and 0 <= x < 2**31 for x in (*ids, *top))
    real = all(type(x) in (int, float) and abs(x) < 1e30 for x in (*logits, spread))
    if not (whole and real and ids and len(top) == len(logits) and spread > 0):
        raise ValueError("a prompt's entry is not what the format says")
    return Witnessed(tuple(ids), tuple(top), tuple(map(float, logits)), float(spread))
