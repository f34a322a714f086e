"""Tensors against the config: what a kernel will touch is proven here, or the file is refused."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import badfiles as bad
import numpy as np
import pytest
from badfiles import SMALL, Spec, good, scalar, zeros
from tiny import tiny_config, tiny_weights, write_tiny

from edgellama import (
    EdgeLlamaError,
    ModelConfigError,
    ModelFormatError,
    NonFiniteError,
    UnsupportedModelError,
)
from edgellama.config import Rope
from edgellama.ggml import BY_NAME, HALVES, RUNNABLE
from edgellama.gguf import TensorInfo, open_gguf
from edgellama.graph import decoder
from edgellama.rope import llama3_factors
from edgellama.weights import (
    check_finite,
    check_tensors,
    expected_shapes,
    model_config,
    rope_factors,
)

FORMAT, CONFIG, UNSUPPORTED = ModelFormatError, ModelConfigError, UnsupportedModelError


def loaded(path: Path) -> list[str]:
    """What a loader does with a header; the warnings."""
    with open_gguf(path) as file:
        config = model_config(file)
        rope_factors(file, config)
        return check_tensors(file, config)


def without(name: str) -> Callable[[Spec], object]:
    return lambda spec: spec.tensors.remove(spec.find(name))


def adding(*tensors: bad.Tensor) -> Callable[[Spec], object]:
    return lambda spec: spec.tensors.extend(tensors)


def renamed(old: str, new: str) -> Callable[[Spec], object]:
    return lambda spec: setattr(spec.find(old), "name", new)


def key(name: str, value: int) -> Callable[[Spec], object]:
    return lambda spec: spec.set(name, scalar(bad.U32, value))


def typed(name: str, kind: str) -> Callable[[Spec], object]:
    """The tensor as zeros of another type."""

    def change(spec: Spec) -> None:
        tensor, form = spec.find(name), BY_NAME[kind]
        tensor.type = form.id
        tensor.data = bytes(int(np.prod(tensor.dims)) // form.block * form.size)

    return change


def factors(*values: float) -> bad.Tensor:
    return bad.Tensor("rope_freqs.weight", (len(values),), struct.pack(f"<{len(values)}f", *values))


def tokens(count: int) -> bytes:
    return bad.array(bad.STRING, b"".join(bad.text(f"t{i}") for i in range(count)), count)


NORM, Q, EMBEDDING = "output_norm.weight", "blk.0.attn_q.weight", "token_embd.weight"
EXPERTS = "blk.0.ffn_gate_exps.weight"

# id, the change to a good file, the class of the error, what its message must contain
REFUSED = [
    ("G21-513", key("llama.block_count", 513), CONFIG, "block_count = 513, but blocks 0..0 are in"),
    ("G21-fewer", adding(zeros("blk.2.attn_norm.weight", (32,))), CONFIG, "without block 1, are"),
    ("G21-none", lambda s: s.tensors.__delitem__(slice(1, 10)), CONFIG, "but no blocks are in the"),
    ("T14-norm", without(NORM), FORMAT, "'output_norm.weight': the tensor is missing; expected"),
    ("T14-q", without(Q), FORMAT, "'blk.0.attn_q.weight': the tensor is missing; expected shape ["),
    ("T14-embedding", without(EMBEDDING), FORMAT, "the tensor is missing; expected shape [40, 32]"),
    ("T15-bias", adding(zeros("blk.0.attn_q.bias", (32,))), UNSUPPORTED, "'blk.0.attn_q.bias'"),
    ("T15-ffn-bias", adding(zeros("blk.0.ffn_up.bias", (32,))), UNSUPPORTED, "ffn_up.bias"),
    ("T15-qk-norm", adding(zeros("blk.0.attn_q_norm.weight", (16,))), UNSUPPORTED, "not part of"),
    ("T15-qkv", adding(zeros("blk.0.attn_qkv.weight", (64, 32))), UNSUPPORTED, "fused projections"),
    ("T15-rope-7", adding(factors(*[1.0] * 7)), FORMAT, "F32 [7]; the config implies F32 [8]"),
    ("T15-rope-0", adding(factors(*[1.0] * 7, 0.0)), FORMAT, "element 7 is 0.0; expected a finite"),
    ("T15-rope-inf", adding(factors(*[np.inf] * 8)), FORMAT, "element 0 is inf"),
    ("T15-rope-nan", adding(factors(*[np.nan] * 8)), FORMAT, "element 0 is nan"),
    ("T17-fewer", key("llama.vocab_size", 41), CONFIG, "expected 40, the rows of token_embd"),
    ("T17-more", key("llama.vocab_size", 39), CONFIG, "expected 40, the rows of token_embd"),
    ("T17-tokens", lambda s: s.set("tokenizer.ggml.tokens", tokens(41)), CONFIG, "at most 40"),
    ("T18", adding(zeros("output.weight", (41, 32))), CONFIG, "[41, 32]; the config implies [40"),
    ("T19-norm-Q8_0", typed(NORM, "Q8_0"), UNSUPPORTED, "supported: F32, F16, BF16"),
    ("T19-q-MXFP4", typed(Q, "MXFP4"), UNSUPPORTED, "type MXFP4 is not supported here"),
    ("T7-MXFP4", typed(Q, "MXFP4"), UNSUPPORTED, ", ".join(RUNNABLE)),
    ("T7-I8", typed(Q, "I8"), UNSUPPORTED, "type I8 is not supported here"),
    *((f"T22-{n}", renamed(Q, f"blk.{n}.attn_q.weight"), FORMAT, "is not a block's number")
      for n in ("4294967296", "-1", "٣", "007", "", "0x0", " 0")),
    ("T22-beyond", renamed(Q, "blk.7.attn_q.weight"), CONFIG, "2 of the blocks 0..7, without"),
    ("T24-0", adding(zeros(EXPERTS, (4, 32, 32))), UNSUPPORTED, "experts are not supported"),
    ("T24-count", key("llama.expert_count", 8), UNSUPPORTED, "a mixture of 8 experts"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "fragment"), [r[1:] for r in REFUSED],
                         ids=[r[0] for r in REFUSED])  # fmt: skip
def test_model_that_disagrees_with_its_config_is_refused(
    tmp_path: Path,
    change: Callable[[Spec], object],
    kind: type[EdgeLlamaError],
    fragment: str,
) -> None:
    spec = good()
    change(spec)
    with pytest.raises(EdgeLlamaError) as caught:
        loaded(spec.write(tmp_path / "bad.gguf"))
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.startswith("bad.gguf: ") and fragment in message and message.isprintable()
    assert caught.value.where and caught.value.path == tmp_path / "bad.gguf"


def one_more(dims: tuple[int, ...], at: int) -> tuple[int, ...]:
    return tuple(dim + (i == at) for i, dim in enumerate(dims))


@pytest.mark.parametrize("name", expected_shapes(SMALL))
def test_every_tensor_of_every_wrong_shape_is_refused(tmp_path: Path, name: str) -> None:
    """T16: one more in a dimension, flattened, another rank; transposed where that differs."""
    dims = good().find(name).dims
    wrong = [one_more(dims, at) for at in range(len(dims))]
    wrong += [(int(np.prod(dims)) // 2, 2), (*dims, 1), (dims[0] - 1, *dims[1:])]
    wrong += [tuple(reversed(dims))] if len(set(dims)) > 1 else []
    for shape in wrong:
        spec = good()
        tensor = spec.find(name)
        tensor.dims, tensor.data = shape, bytes(4 * int(np.prod(shape)))
        with pytest.raises(ModelConfigError) as caught:
            loaded(spec.write(tmp_path / "bad.gguf"))
        expected = list(expected_shapes(SMALL)[name])
        told = f"shape {list(reversed(shape))}; the config implies {expected}"
        vocabulary = name == EMBEDDING and f"{shape[-1]}" in str(caught.value)
        assert told in str(caught.value) or vocabulary


def test_expected_shapes_are_those_of_the_graph() -> None:
    config = tiny_config(head_dim=24, n_kv_heads=1, rope=Rope(24))
    shapes = expected_shapes(config)
    assert tuple(shapes) == decoder(config).weights
    assert shapes["blk.1.attn_k.weight"] == (24, 64)
    assert shapes["blk.1.attn_output.weight"] == (64, 96)
    assert shapes["blk.0.ffn_down.weight"] == (64, 96)
    assert shapes["output.weight"] == (288, 64) and shapes["output_norm.weight"] == (64,)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == config.n_parameters
    assert "output.weight" not in expected_shapes(replace(config, tied_output=True))


@pytest.mark.parametrize("kind", RUNNABLE)
@pytest.mark.parametrize("tied", [False, True])
def test_good_models_pass_without_warnings(tmp_path: Path, kind: str, tied: bool) -> None:
    config = tiny_config(tied_output=tied, dim=256)
    path = write_tiny(tmp_path / "t.gguf", config, kind)
    assert loaded(path) == []
    with open_gguf(path) as file:
        assert model_config(file).tied_output is tied
        assert file.tensors["blk.1.ffn_up.weight"].type.name == kind


def test_types_may_be_mixed(tmp_path: Path) -> None:
    """T19: each matrix has its own type, each norm its own float."""
    types = {"": "Q4_0", "blk.0.attn_v": "Q8_0", "blk.1": "Q4_1", "output.": "F16"}
    types["blk.0.attn_norm.weight"] = "BF16"
    path = write_tiny(tmp_path / "t.gguf", types=types)
    assert loaded(path) == []
    with open_gguf(path) as file:
        found = {info.type.name for info in file.tensors.values()}
    assert found == {"Q4_0", "Q8_0", "Q4_1", "F16", "BF16", "F32"}


def test_rows_that_no_token_uses_are_legal(tmp_path: Path) -> None:
    """T17: embeddings are often padded to a round number."""
    spec = good().set("tokenizer.ggml.tokens", tokens(39))
    assert loaded(spec.write(tmp_path / "m.gguf")) == []


def test_unknown_tensors_give_one_warning(tmp_path: Path) -> None:
    """T15."""
    spec = good()
    names = [f"v.blk.{i}.attn_q.bias" for i in range(6)] + ["blk.0.attn_q.weight.lora_a"]
    spec.tensors += [zeros(name, (4,)) for name in names]
    listed = ", ".join(f"'{name}'" for name in names[:5])
    expected = [f"7 unknown tensors are ignored: {listed}, ..."]
    assert loaded(spec.write(tmp_path / "m.gguf")) == expected


@pytest.mark.parametrize(("file_type", "warnings"), [(2, 1), (0, 0), (999, 0)])
def test_file_type_that_no_tensor_has_gives_a_warning(tmp_path, file_type, warnings) -> None:
    """G28: the tensors are believed."""
    path = write_tiny(tmp_path / "t.gguf", metadata={"general.file_type": file_type})
    found = loaded(path)
    assert len(found) == warnings
    assert all("general.file_type says Q4_0" in text for text in found)


def test_rope_factors_of_llama_3(tmp_path: Path) -> None:
    config = tiny_config()
    factors = llama3_factors(config.rope, 8.0, 1.0, 4.0, 8192)
    path = write_tiny(tmp_path / "t.gguf", config, rope_factors=factors)
    with open_gguf(path) as file:
        np.testing.assert_allclose(rope_factors(file, config), factors, rtol=1e-7)
    with open_gguf(good().write(tmp_path / "g.gguf")) as file:
        assert rope_factors(file, SMALL) is None


def test_every_byte_of_the_header_may_be_wrong(tmp_path: Path) -> None:
    """A changed byte is refused, or leaves a model whose tensors fit its config."""
    spec = good()
    raw, header = bytearray(spec.build()), len(spec.header())
    path = tmp_path / "byte.gguf"
    passed = 0
    for at in range(header):
        changed = raw.copy()
        changed[at] ^= 1
        path.write_bytes(changed)
        try:
            loaded(path)
        except EdgeLlamaError as error:
            assert str(error).isprintable()
        else:
            passed += 1
    assert 0 < passed < header


# --- numbers that are not finite (T20, T21) ---


def info_of(kind: str) -> TensorInfo:
    form = BY_NAME[kind]
    columns = max(64, 2 * form.block)
    n_bytes = 4 * columns // form.block * form.size
    return TensorInfo("blk.0.attn_q.weight", (4, columns), form, 0, n_bytes, 0)


def chunk(kind: str) -> np.ndarray:
    """Four rows whose every scale or value is 1, and quants are all ones."""
    info = info_of(kind)
    if kind in HALVES:
        blocks = np.full((info.n_bytes // info.type.size, info.type.size), 255, np.uint8)
        for at in HALVES[kind]:
            blocks[:, at : at + 2] = (0x00, 0x3C)
        return blocks.reshape(4, -1)
    bits = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}[kind]
    one = {"F32": 0x3F800000, "F16": 0x3C00, "BF16": 0x3F80}[kind]
    return np.full((4, 64), one, bits).view(np.uint8)


def poison(kind: str, raw: np.ndarray, block: int, nan: bool, half: int = 0) -> None:
    blocks = raw.reshape(-1, BY_NAME[kind].size)
    infinity = {"F32": 0x7F800000, "BF16": 0xFF80}.get(kind, 0xFC00)
    bits = struct.pack("<I" if kind == "F32" else "<H", infinity + nan)
    at = HALVES.get(kind, (0,))[half]
    blocks[block, at : at + len(bits)] = np.frombuffer(bits, np.uint8)


@pytest.mark.parametrize("nan", [True, False], ids=["nan", "inf"])
@pytest.mark.parametrize("kind", RUNNABLE)
def test_numbers_that_are_not_finite_are_refused(kind: str, nan: bool) -> None:
    """T20."""
    info, raw = info_of(kind), chunk(kind)
    assert check_finite(info, raw) is False
    last = raw.size // info.type.size - 1
    poison(kind, raw, last, nan, half=-1)
    with pytest.raises(
        NonFiniteError, match=rf"x.gguf: .*'blk.0.attn_q.weight': block {last + 3}: .* 1 such"
    ):
        check_finite(info, raw, first_block=3, path="/m/x.gguf")
    poison(kind, raw, 1, nan)
    with pytest.raises(NonFiniteError, match=r"block 1: .* 2 such"):
        check_finite(info, raw)


@pytest.mark.parametrize("kind", RUNNABLE)
def test_zeros_and_tiny_scales_are_legal(kind: str) -> None:
    """T21: a chunk of zeros is reported, subnormals pass."""
    info, raw = info_of(kind), chunk(kind)
    zero = raw.copy().reshape(-1, info.type.size)
    for at in HALVES.get(kind, (0,)):
        zero[:, at : at + (4 if kind == "F32" else 2)] = 0
    assert check_finite(info, zero) is True
    zero.reshape(-1)[HALVES.get(kind, (0,))[-1]] = 1  # the smallest subnormal
    assert check_finite(info, zero) is False


def test_negative_zeros_are_zeros() -> None:
    raw = np.full((1, 64), -0.0, np.float32).view(np.uint8)
    assert check_finite(info_of("F32"), raw) is True


def test_weights_of_a_tiny_model_are_finite(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "t.gguf", types="Q4_1")
    with open_gguf(path) as file:
        for info in file.tensors.values():
            raw = np.empty(info.n_bytes, np.uint8)
            file.read_into(info.name, raw)
            assert check_finite(info, raw) is False


def test_tiny_models_are_reproducible(tmp_path: Path) -> None:
    one, two = (write_tiny(tmp_path / n, types="Q8_0", seed=3).read_bytes() for n in "ab")
    assert one == two != write_tiny(tmp_path / "c", types="Q8_0", seed=4).read_bytes()
    assert tiny_weights(tiny_config(), 1)["output.weight"].std() == pytest.approx(1 / 8, rel=0.05)
