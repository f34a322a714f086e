"""Importance matrices: what is collected, resumed, written and read; damaged files are refused."""

import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny import tiny_config, write_tiny

import edgellama
from edgellama.perplexity import chunked
from edgellama.quantize.importance import (
    Importance,
    collect,
    load_importance,
    read_importance,
    write_importance,
)
from edgellama.runtimes import llamacpp
from edgellama.runtimes.reference import ReferenceSession

WORDS = "the cat and the dog sat on a mat in the rain " * 8
CHUNK = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 64 and of 72 columns: the latter end in the middle of a block."""
    path = tmp_path_factory.mktemp("importance") / "tiny.gguf"
    return write_tiny(path, tiny_config(ffn_dim=72), seed=3)


def gathered(path: Path, **more: Any) -> Importance:
    return collect(path, WORDS, **({"context": CHUNK, "threads": 1} | more))


@pytest.fixture(scope="module")
def found(model: Path) -> Importance:
    return gathered(model)


# --- collecting ---------------------------------------------------------------------------------


def reference_sums(path: Path, chunks: int | None = None) -> dict[str, np.ndarray]:
    """Sums of squares of what goes into every product in the layers, from the plain runtime."""
    sums: dict[str, np.ndarray] = {}
    with edgellama.load(path, "reference", context=CHUNK) as model:
        for chunk in chunked(model.tokenizer, WORDS, CHUNK, chunks):
            session = model.session()._runtime_session
            assert isinstance(session, ReferenceSession)
            values = session.run(chunk, [])
            for node in model.graph.nodes:
                if node.op == "linear" and node.weight and node.weight.startswith("blk."):
                    squares = (values[node.inputs[0]].astype(np.float64) ** 2).sum(axis=0)
                    sums[node.weight] = sums.get(node.weight, 0) + squares
    return sums


def test_sums_are_those_of_the_reference(model: Path, found: Importance) -> None:
    wanted = reference_sums(model)
    assert set(found.sums) == set(wanted) and len(wanted) == 2 * 7
    for name, sums in wanted.items():
        assert found.sums[name].dtype == np.float32
        np.testing.assert_allclose(found.sums[name], sums, rtol=1e-4, err_msg=name)
        assert found.counts[name] == found.chunks * CHUNK
        np.testing.assert_allclose(found.weights()[name], sums / found.counts[name], rtol=1e-4)


def test_quantized_models_are_observed_too(tmp_path: Path) -> None:
    """Types that multiply integers and one that multiplies floats, in one group of products."""
    types = {"": "Q8_0", "blk.0.attn_k": "F16", "blk.1.ffn_down": "Q4_0"}
    path = write_tiny(tmp_path / "mixed.gguf", types=types, seed=4)
    got, wanted = gathered(path), reference_sums(path)
    assert set(got.sums) == set(wanted) and len(wanted) == 2 * 7
    for name, sums in wanted.items():
        np.testing.assert_allclose(got.sums[name], sums, rtol=0.05, err_msg=name)


def test_threads_do_not_change_the_sums(model: Path, found: Importance) -> None:
    other = gathered(model, threads=3)
    assert all((other.sums[name] == sums).all() for name, sums in found.sums.items())


def test_resumed_is_identical(model: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.gguf", tmp_path / "parts.gguf"
    gathered(model, output=whole)
    gathered(model, output=parts, chunks=2)
    assert read_importance(parts).chunks == 2
    steps: list[int] = []

    def progress(done: int, _total: int, what: str) -> None:
        if what == "collecting importance":
            steps.append(done // CHUNK)

    gathered(model, output=parts, progress=progress)
    assert steps[0] == 2 and parts.read_bytes() == whole.read_bytes()
    gathered(model, output=parts, progress=progress)
    assert steps[-1] == steps[-2] and parts.read_bytes() == whole.read_bytes()  # nothing to do


def test_cancelled_keeps_what_is_saved(model: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.gguf", tmp_path / "parts.gguf"
    gathered(model, output=whole)
    token = edgellama.CancelToken()

    def progress(done: int, _total: int, what: str) -> None:
        if what == "collecting importance" and done == 3 * CHUNK:
            token.cancel()

    with pytest.raises(edgellama.Cancelled):
        gathered(model, output=parts, save_every=2, cancel=token, progress=progress)
    assert read_importance(parts).chunks == 2
    gathered(model, output=parts)
    assert parts.read_bytes() == whole.read_bytes()


def test_other_models_and_texts_start_anew(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    gathered(model, output=output, chunks=2)
    other = write_tiny(tmp_path / "other.gguf", tiny_config(ffn_dim=72), seed=9)
    assert (gathered(other, output=output, chunks=3).sums["blk.0.attn_q.weight"] > 0).all()
    assert load_importance(output)["blk.0.attn_q.weight"] == pytest.approx(
        gathered(other, chunks=3).weights()["blk.0.attn_q.weight"]
    )
    fewer = gathered(other, output=output, chunks=1)  # sums cannot be taken back
    assert fewer.chunks == read_importance(output).chunks == 1


def test_overflow_names_the_tensor(tmp_path: Path) -> None:
    huge = {"blk.1.ffn_norm.weight": np.full(64, 1e30, np.float32)}
    path = write_tiny(tmp_path / "huge.gguf", weights=huge)
    with pytest.raises(edgellama.NonFiniteError, match=r"huge\.gguf: tensor 'blk\.1\.ffn_gate"):
        gathered(path)


def test_too_short_a_text(model: Path) -> None:
    with pytest.raises(edgellama.EdgeLlamaError, match="two chunks"):
        collect(model, "the cat", context=CHUNK)


# --- files --------------------------------------------------------------------------------------


def test_written_as_llamacpp_reads_it(found: Importance, tmp_path: Path) -> None:
    found.datasets = ["words.txt"]
    write_importance(tmp_path / "i.gguf", found)
    read = gguf.GGUFReader(tmp_path / "i.gguf")
    assert read.fields["general.type"].contents() == "imatrix"
    assert read.fields["imatrix.datasets"].contents() == ["words.txt"]
    for key, value in (("chunk_count", found.chunks), ("chunk_size", CHUNK)):
        field = read.fields[f"imatrix.{key}"]
        assert field.contents() == value and field.types == [gguf.GGUFValueType.UINT32]
    tensors = {tensor.name: tensor for tensor in read.tensors}
    assert list(tensors)[:2] == ["blk.0.attn_k.weight.in_sum2", "blk.0.attn_k.weight.counts"]
    for name, sums in found.sums.items():
        squares, counts = tensors[name + ".in_sum2"], tensors[name + ".counts"]
        assert list(squares.shape) == [len(sums), 1] and list(counts.shape) == [1, 1]
        assert (squares.data == sums).all() and counts.data == found.counts[name]


def test_read_again(found: Importance, tmp_path: Path) -> None:
    write_importance(tmp_path / "i.gguf", found)
    again = read_importance(tmp_path / "i.gguf")
    assert (again.chunks, again.chunk_tokens, again.datasets, again.keys) == (
        found.chunks,
        CHUNK,
        found.datasets,
        found.keys,
    )
    for name, sums in found.sums.items():
        assert (again.sums[name] == sums).all() and again.counts[name] == found.counts[name]


def written(path: Path, *, keys: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """A file by the `gguf` package; `a` stands for the tensor name `x.in_sum2`, `b` for counts."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    kept = {"general.type": "imatrix", "imatrix.chunk_count": 1, "imatrix.chunk_size": 512}
    for key, value in (kept | (keys or {})).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for short, name in (("a", "x.in_sum2"), ("b", "x.counts"), ("c", "other")):
        if short in tensors:
            writer.add_tensor(name, np.asarray(tensors[short]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SUMS, COUNTS = np.array([[2.0, 6.0]], np.float32), np.array([[4.0]], np.float32)


def test_experts_and_what_was_never_met(tmp_path: Path) -> None:
    sums = np.array([[2, 6], [0, 0], [1, 1]], np.float32)
    counts = np.array([[4], [0], [2]], np.float32)
    path = written(tmp_path / "i.gguf", a=sums, b=counts, c=SUMS)
    assert load_importance(path)["x"].tolist() == [0.5, 1.5, 1, 1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": SUMS}, "has no 'x.counts' beside it"),
        ({"b": COUNTS}, "has no 'x.in_sum2' beside it"),
        ({"c": SUMS}, "no statistics"),
        ({"a": SUMS.astype(np.float16), "b": COUNTS}, "F16; expected F32"),
        ({"a": SUMS, "b": COUNTS.astype(np.float64)}, "F64"),
        ({"a": -SUMS, "b": COUNTS}, "negative or not finite"),
        ({"a": SUMS * np.float32(np.inf), "b": COUNTS}, "negative or not finite"),
        ({"a": SUMS, "b": COUNTS * np.float32(np.nan)}, "negative or not finite"),
        ({"a": SUMS, "b": COUNTS + np.float32(0.5)}, "no whole number"),
        ({"a": SUMS, "b": COUNTS * np.float32(1e30)}, "no whole number"),
        ({"a": SUMS, "b": np.ones((3, 1), np.float32)}, "2 sums do not go with 3 counts"),
        ({"a": SUMS, "b": COUNTS, "keys": {"general.type": "model"}}, "general.type is 'model'"),
        ({"a": SUMS, "b": COUNTS, "keys": {"general.type": None}}, "general.type is None"),
        ({"a": SUMS, "b": COUNTS, "keys": {"imatrix.chunk_count": None}}, "chunk_count.*missing"),
        (
            {"a": SUMS, "b": COUNTS, "keys": {"imatrix.chunk_size": "512"}},
            "chunk_size.*'512'",
        ),
    ],
)
def test_damaged_gguf(tmp_path: Path, tensors: dict[str, Any], said: str) -> None:
    path = written(tmp_path / "bad.gguf", **tensors)
    with pytest.raises(edgellama.EdgeLlamaError, match=rf"bad\.gguf: .*{said}"):
        load_importance(path)


def test_every_cut_is_refused(tmp_path: Path) -> None:
    whole = written(tmp_path / "i.gguf", a=SUMS, b=COUNTS).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in range(len(whole) - 32 + 4):  # the end is padding
        path.write_bytes(whole[:size])
        with pytest.raises(edgellama.EdgeLlamaError):
            load_importance(path)


# --- the older form -----------------------------------------------------------------------------


def entry(name: bytes, calls: int, values: list[float]) -> bytes:
    head = struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values))
    return head + struct.pack(f"<{len(values)}f", *values)


def test_dat(tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    data = struct.pack("<i", 2) + entry(b"a", 4, [2, 6]) + entry(b"b", 0, [5])
    path.write_bytes(data)
    assert {n: w.tolist() for n, w in load_importance(path).items()} == {"a": [0.5, 1.5], "b": [5]}
    path.write_bytes(data + struct.pack("<ii", 7, 4) + b"text")
    read = read_importance(path)
    assert (read.chunks, read.datasets) == (7, ["text"])
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(edgellama.ModelFormatError, match=r"old\.dat"):
            load_importance(path)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<i", -1),
        struct.pack("<i", 0),
        struct.pack("<ii", 1, -5) + bytes(50),
        struct.pack("<ii", 1, 1 << 30) + bytes(50),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", -1, 1) + bytes(4),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 1 << 30) + bytes(4),
        struct.pack("<i", 1) + entry(b"a", 1, [float("nan")]),
        struct.pack("<i", 1) + entry(b"a", 1, [-1.0]),
        struct.pack("<i", 2) + entry(b"a", 1, [1.0]) * 2,
    ],
)
def test_damaged_dat(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.dat"
    path.write_bytes(data)
    with pytest.raises(edgellama.ModelFormatError, match=r"bad\.dat"):
        load_importance(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(edgellama.EdgeLlamaError, match="cannot be read"):
        load_importance(tmp_path / "absent")
    with pytest.raises(edgellama.EdgeLlamaError, match=r"a folder|cannot be read"):
        load_importance(tmp_path)
    with pytest.raises(edgellama.EdgeLlamaError, match=r"'im\\x00\.gguf' is not a file name"):
        load_importance("im\0.gguf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(edgellama.EdgeLlamaError, match="not a regular file"):
        load_importance(tmp_path / "pipe")


# --- llama.cpp takes it -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api() -> Any:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    return llamacpp._bindings()  # quiet


def test_llamacpp_opens_it(api: Any, found: Importance, tmp_path: Path) -> None:
    """With its own reader of GGUF, which llama-quantize calls."""
    write_importance(tmp_path / "i.gguf", found)
    folder = Path(api.__file__).parent / "lib"
    paths = [p for p in folder.iterdir() if p.name.startswith(("libggml-base.", "ggml-base."))]
    if not paths:
        pytest.skip("its library is not laid out as expected")
    lib = ctypes.CDLL(os.fspath(paths[0]))
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
    for name in ("gguf_get_n_tensors", "gguf_find_tensor", "gguf_find_key"):
        function = getattr(lib, name)
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_void_p, ctypes.c_char_p]
    lib.gguf_get_val_u32.restype = ctypes.c_uint32
    lib.gguf_get_val_u32.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    opened = lib.gguf_init_from_file(os.fsencode(tmp_path / "i.gguf"), Params(True, None))
    assert opened and lib.gguf_get_n_tensors(opened, None) == 2 * len(found.sums)
    assert lib.gguf_find_tensor(opened, b"blk.1.ffn_down.weight.in_sum2") >= 0
    key = lib.gguf_find_key(opened, b"imatrix.chunk_count")
    assert lib.gguf_get_val_u32(opened, key) == found.chunks
    lib.gguf_free.argtypes = [ctypes.c_void_p]
    lib.gguf_free(opened)


class Params(ctypes.Structure):
    """llama.cpp's gguf_init_params."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def quantized_by_llamacpp(
    api: Any, path: Path, output: Path, weights: dict[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = 2, 1, True  # Q4_0
    if weights is not None:
        flat = {name.encode(): np.ascontiguousarray(w) for name, w in weights.items()}
        kind, pointer = api.llama_model_imatrix_data, ctypes.POINTER(ctypes.c_float)
        entries = [kind(n, w.ctypes.data_as(pointer), w.size) for n, w in flat.items()]
        params.imatrix = (kind * (len(entries) + 1))(*entries, kind())
    status = api.llama_model_quantize(os.fsencode(path), os.fsencode(output), ctypes.byref(params))
    assert status == 0
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(output).tensors}


def test_llamacpp_quantizes_with_it(api: Any, tmp_path: Path) -> None:
    """And as our encoder does, given the same weights."""
    encode: Callable[..., np.ndarray] = pytest.importorskip("edgellama.quantize.encode").encode
    config = tiny_config(ffn_dim=128)
    path = write_tiny(tmp_path / "tiny.gguf", config)
    collect(path, WORDS, tmp_path / "i.gguf", context=CHUNK, threads=1)
    weights = load_importance(tmp_path / "i.gguf")
    plain = quantized_by_llamacpp(api, path, tmp_path / "plain.gguf", None)
    with_it = quantized_by_llamacpp(api, path, tmp_path / "weighted.gguf", weights)
    rows = {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}
    for name in ("blk.1.attn_q.weight", "blk.0.ffn_gate.weight"):
        assert (plain[name] != with_it[name]).any()
        assert (encode(rows[name], "Q4_0", importance=weights[name]) == with_it[name]).all()
