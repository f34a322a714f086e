"""Opening GGUF files: what is legal reads as others read it, whatever the file system does."""

import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import badfiles as bad
import gguf
import numpy as np
import pytest
from badfiles import array, good, scalar, string, text
from hypothesis import given, settings, strategies as st
from tiny import tiny_config, write_tiny

from edgellama import EdgeLlamaError, ModelFormatError
from edgellama.ggml import RUNNABLE
from edgellama.gguf import open_gguf


def test_much_metadata_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """G30: 65,536 unknown keys and 60 MB of them are legal."""
    value = string("v" * 880)
    spec = good()
    spec.keys = [(f"unknown.{i}", value) for i in range(65_536)]
    path = spec.write(tmp_path / "much.gguf")
    assert path.stat().st_size > 58_000_000
    tracemalloc.start()
    with open_gguf(path) as file:
        peak = tracemalloc.get_traced_memory()[1]
        assert len(file.metadata) == 65_536 and file.metadata["unknown.65535"] == "v" * 880
    tracemalloc.stop()
    assert peak < 64 * 2**20 + 8 * path.stat().st_size


@pytest.mark.parametrize("kind", [bad.U8, bad.U16, bad.I32, bad.F32, bad.F64])
def test_long_array_is_read_in_bounded_memory(tmp_path: Path, kind: int) -> None:
    spec = good()
    spec.keys = [("long", array(kind, raw := os.urandom(8 * 2**20), len(raw) // kind_size(kind)))]
    path = spec.write(tmp_path / "long.gguf")
    tracemalloc.start()
    with open_gguf(path) as file:
        peak = tracemalloc.get_traced_memory()[1]
        values = file.metadata["long"]
    tracemalloc.stop()
    assert values.tobytes() == raw
    assert peak < 5 * len(raw)


def kind_size(kind: int) -> int:
    return struct.calcsize(bad.CODES[kind])


def test_one_key_too_many(tmp_path: Path) -> None:
    spec = good()
    spec.keys = [(f"k{i}", scalar(bad.U8, 0)) for i in range(65_537)]
    with pytest.raises(ModelFormatError, match="n_kv = 65537; allowed: 0"):
        open_gguf(spec.write(tmp_path / "keys.gguf"))


@pytest.mark.parametrize(("extra", "warns"), [(31, True), (1, True), (0, False)])
def test_bytes_after_the_last_tensor(tmp_path: Path, extra: int, warns: bool) -> None:
    """T12."""
    spec = good()
    spec.trailing = b"x" * extra
    with open_gguf(spec.write(tmp_path / "more.gguf")) as file:
        expected = [f"{extra} bytes after the last tensor are ignored"] if warns else []
        assert file.warnings == expected


def test_last_tensor_needs_no_padding(tmp_path: Path) -> None:
    """T12: the data may end where the last tensor does."""
    spec = good()
    spec.tensors.append(bad.zeros("extra", (3,)))
    path = tmp_path / "unpadded.gguf"
    path.write_bytes(spec.build()[:-20])
    with open_gguf(path) as file:
        assert file.warnings == [] and file.tensors["extra"].n_bytes == 12


def test_sparse_file_is_opened_without_touching_its_data(tmp_path: Path) -> None:
    """T23: a terabyte that is not there costs nothing to open."""
    spec = good()
    spec.tensors = [bad.Tensor("big", (2**20, 2**18))]
    path = spec.write(tmp_path / "sparse.gguf")
    try:
        os.truncate(path, path.stat().st_size + 2**40)
    except OSError as error:
        pytest.skip(f"no sparse file of 1 TiB here: {error}")
    tracemalloc.start()
    with open_gguf(path) as file:
        assert file.n_bytes > 2**40 and file.tensors["big"].n_bytes == 2**40
        part = bytearray(b"x" * 16)
        file.read_into("big", part, 2**40 - 16)
        assert part == bytes(16)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", RUNNABLE)
def test_reads_what_the_reference_reader_reads(tmp_path: Path, kind: str) -> None:
    path = write_tiny(
        tmp_path / "t.gguf", tiny_config(vocab_size=301), kind, metadata={"x.y": True}
    )
    theirs = gguf.GGUFReader(path)
    with open_gguf(path) as ours:
        fields = {k: v for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
        assert list(ours.metadata) == list(fields)
        for key, field in fields.items():
            value = ours.metadata[key]
            same = value if isinstance(value, (bool, int, float, str)) else list(value)
            assert same == field.contents(), key
        assert [t.name for t in theirs.tensors] == list(ours.tensors)
        for tensor in theirs.tensors:
            info, data = ours.tensors[tensor.name], np.asarray(tensor.data).view(np.uint8)
            assert info.shape == tuple(int(d) for d in reversed(tensor.shape))
            assert (info.type.name, info.n_bytes) == (tensor.tensor_type.name, tensor.n_bytes)
            assert info.n_rows * info.row_bytes == info.n_bytes
            read = np.empty(info.n_bytes, np.uint8)
            ours.read_into(info.name, read)
            assert np.array_equal(read, data.reshape(-1))
            part = np.zeros((info.n_bytes - 6) // 2 * 2, np.uint8).reshape(2, -1)
            ours.read_into(info.name, part, 3)
            assert np.array_equal(part.reshape(-1), data.reshape(-1)[3 : 3 + part.size])
    assert (ours.version, ours.n_bytes, ours.path) == (3, path.stat().st_size, path)


VALUES = st.one_of(
    st.tuples(st.just("string"), st.text(max_size=40)),
    st.tuples(st.just("bool"), st.booleans()),
    st.tuples(st.just("i64"), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just("u64"), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("f32"), st.floats(width=32, allow_nan=False)),
    st.tuples(st.just("array of string"), st.lists(st.text(max_size=10), max_size=20)),
    st.tuples(st.just("array of u16"), st.lists(st.integers(0, 65_535), max_size=20)),
    st.tuples(st.just("array of bool"), st.lists(st.booleans(), max_size=20)),
)


def encoded(kind: str, value: object) -> bytes:
    if kind == "string":
        return string(value)
    if kind == "array of string":
        return array(bad.STRING, b"".join(text(v) for v in value), len(value))
    if kind == "array of u16":
        return array(bad.U16, struct.pack(f"<{len(value)}H", *value), len(value))
    if kind == "array of bool":
        return array(bad.BOOL, bytes(value), len(value))
    return scalar({"bool": bad.BOOL, "i64": bad.I64, "u64": bad.U64, "f32": bad.F32}[kind], value)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(VALUES, max_size=12), st.sampled_from([2, 3]))
def test_metadata_round_trip(tmp_path_factory, pairs, number) -> None:
    path = tmp_path_factory.getbasetemp() / "round.gguf"
    spec = bad.Spec([(f"k{i}", encoded(*pair)) for i, pair in enumerate(pairs)], [], version=number)
    with open_gguf(spec.write(path)) as file:
        assert list(file.kinds.values()) == [kind for kind, _ in pairs]
        read = [list(v) if kind[:5] == "array" else v for kind, v in
                zip(file.kinds.values(), file.metadata.values(), strict=True)]  # fmt: skip
        assert read == [value for _, value in pairs]
        assert file.version == number


def test_strings_across_the_reading_window(tmp_path: Path) -> None:
    """Long arrays are read through a window of 1 MiB; elements fall on its borders."""
    words = [chr(97 + i % 26) * (i % 1000) for i in range(5000)]
    spec = good()
    spec.keys = [("w", array(bad.STRING, b"".join(map(text, words)), len(words)))]
    spec.keys.append(("after", scalar(bad.U32, 7)))
    with open_gguf(spec.write(tmp_path / "words.gguf")) as file:
        assert file.metadata == {"w": words, "after": 7}


# --- the file system ---


def refusal(path: "str | Path") -> EdgeLlamaError:
    with pytest.raises(EdgeLlamaError) as caught:
        open_gguf(path)
    return caught.value


def test_missing_file(tmp_path: Path) -> None:
    assert (
        str(refusal(tmp_path / "no.gguf")) == "no.gguf: cannot be read: No such file or directory"
    )


def test_folder_is_named_as_such(tmp_path: Path) -> None:
    assert "this is an empty folder" in str(refusal(tmp_path))


def test_impossible_name() -> None:
    assert r"'a\x00b' is not a file name" in str(refusal("a\0b"))


def test_unreadable_file(tmp_path: Path) -> None:
    path = good().write(tmp_path / "m.gguf")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    assert "Permission denied" in str(refusal(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system here")
def test_pipe_and_device_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "not a regular file" in str(refusal(tmp_path / "pipe.gguf"))
    assert "not a regular file" in str(refusal("/dev/zero"))


def test_link_loop(tmp_path: Path) -> None:
    link = tmp_path / "loop.gguf"
    link.symlink_to(link)
    assert "loop.gguf: cannot be read" in str(refusal(link))


def test_file_that_shrinks_while_open(tmp_path: Path) -> None:
    path = good().write(tmp_path / "m.gguf")
    with open_gguf(path) as file:
        info = file.tensors["token_embd.weight"]
        os.truncate(path, info.offset + 100)
        with pytest.raises(ModelFormatError, match="changed since it was opened"):
            file.read_into(info.name, bytearray(info.n_bytes))
        file.read_into(info.name, bytearray(100))


def test_reading_leaves_nothing_heavy_imported(tmp_path: Path) -> None:
    path = good().write(tmp_path / "m.gguf")
    program = (
        "import sys; from edgellama.gguf import open_gguf; open_gguf(sys.argv[1]).close();"
        "print([m for m in ('numpy', 'numba', 'gguf', 'mmap') if m in sys.modules])"
    )
    command = [sys.executable, "-c", program, str(path)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "[]\n"
