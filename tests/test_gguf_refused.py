"""Hostile GGUF files: each is refused with its reason, in bounded time and memory.

The ids are rows of the project's catalogue of bad inputs: G the header and the keys, T the tensors.
"""

import json
import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import badfiles as bad
import pytest
from badfiles import HUGE, array, changed, good, only, scalar, string, text, with_key, with_tensor

from edgellama import EdgeLlamaError, ModelFormatError, UnsupportedModelError
from edgellama.gguf import open_gguf

FORMAT, UNSUPPORTED = ModelFormatError, UnsupportedModelError


def fixed(raw: bytes) -> Callable[[], bytes]:
    return lambda: raw


def magic(value: bytes) -> Callable[[], bytes]:
    return changed(lambda spec: setattr(spec, "magic", value))


def version(value: int) -> Callable[[], bytes]:
    return changed(lambda spec: setattr(spec, "version", value))


def counts(n_tensors: int, n_kv: int) -> Callable[[], bytes]:
    return fixed(b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_kv))


def key_length(length: int) -> Callable[[], bytes]:
    return changed(lambda spec: spec.key_lengths.update({7: length}))


def alignment(value: bytes) -> Callable[[], bytes]:
    return with_key("general.alignment", value)


def nested(depth: int) -> bytes:
    return array(bad.ARRAY, struct.pack("<IQ", bad.ARRAY, 1) * depth, 1)


def same_offset(spec: bad.Spec) -> None:
    for tensor in spec.tensors:
        tensor.offset = 0


def hole(spec: bad.Spec) -> None:
    spec.tensors[1].offset = len(spec.tensors[0].data) + 32
    spec.trailing = bytes(1024)


def coarse(spec: bad.Spec) -> None:  # the data would start at 65536
    spec.set("general.alignment", scalar(bad.U32, 65_536))
    spec.alignment = 65_536


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 668788096\n"
SAFETENSORS = struct.pack("<Q", 16) + b'{"__metadata__"}' + bytes(64)
ONNX = b"\x08\x08\x12\x07pytorch" + bytes(64)

# id, the file, the class of the error, what its message must contain
REFUSED = [
    ("G1-empty", fixed(b""), FORMAT, "file is empty"),
    ("G3-GGML", magic(b"GGML"), FORMAT, "first 4 bytes are 'GGML'; expected 'GGUF'. Convert the"),
    ("G3-ggjt", magic(b"ggjt"), FORMAT, "old GGML format"),
    ("G3-tjgg", magic(b"tjgg"), FORMAT, "old GGML format"),
    ("G3-FUGG", magic(b"FUGG"), FORMAT, "first 4 bytes are 'FUGG'; expected 'GGUF'"),
    ("G3-gguf", magic(b"gguf"), FORMAT, "first 4 bytes are 'gguf'"),
    ("G3-zeros", fixed(bytes(100)), FORMAT, r"'\x00\x00\x00\x00'"),
    ("G4-html", fixed(b"\n <!DOCTYPE html><html>404"), FORMAT, "this is a web page (26 bytes)"),
    ("G4-lfs", fixed(LFS), FORMAT, f"this is a Git LFS pointer ({len(LFS)} bytes)"),
    ("G4-lfs-hint", fixed(LFS), FORMAT, "git lfs pull"),
    ("G4-zip", fixed(b"PK\x03\x04" + bytes(60)), FORMAT, "this is a zip archive"),
    ("G4-pickle", fixed(b"\x80\x02}q\x00."), FORMAT, "a Python pickle"),
    ("G4-safetensors", fixed(SAFETENSORS), FORMAT, "this is a safetensors file"),
    ("G4-onnx", fixed(ONNX), FORMAT, "this is an ONNX model"),
    ("G4-gzip", fixed(b"\x1f\x8b\x08" + bytes(60)), FORMAT, "this is a gzip file"),
    ("G5-version-0", version(0), UNSUPPORTED, "GGUF version 0; supported: 2, 3"),
    ("G5-version-1", version(1), UNSUPPORTED, "GGUF version 1; supported: 2, 3"),
    ("G5-version-4", version(4), UNSUPPORTED, "GGUF version 4; supported: 2, 3"),
    ("G5-version-2^31", version(2**31), UNSUPPORTED, "GGUF version 2147483648"),
    ("G6-big-endian-3", version(0x03000000), UNSUPPORTED, "big-endian GGUF"),
    ("G6-big-endian-2", version(0x02000000), UNSUPPORTED, "big-endian GGUF"),
    ("G7-2^63", counts(HUGE, 0), FORMAT, f"n_tensors = {HUGE}; allowed: 0..65536, and at most 0"),
    ("G7-2^64-1", counts(2**64 - 1, 0), FORMAT, f"n_tensors = {2**64 - 1}"),
    ("G7-10^9", counts(10**9, 0), FORMAT, "n_tensors = 1000000000"),
    ("G7-9", counts(9, 0), FORMAT, "n_tensors = 9; at most 0 fit in the 8 bytes left"),
    ("G8-2^63-1", counts(0, HUGE - 1), FORMAT, f"n_kv = {HUGE - 1}; allowed: 0..65536"),
    ("G8-9", counts(0, 9), FORMAT, "n_kv = 9; at most 0 fit in the 0 bytes left"),
    ("G9-0", key_length(0), FORMAT, "key 7: the length of the key = 0; allowed: 1..65535"),
    ("G9-65536", key_length(65_536), FORMAT, "key 7: the length of the key = 65536"),
    ("G9-2^63", key_length(HUGE), FORMAT, f"key 7: the length of the key = {HUGE}"),
    ("G10-not-utf8", with_key(b"a\xff\x1b[31m", scalar(0, 1)), FORMAT, r"not UTF-8: b'a\xff\x1b["),
    ("G10-nul", with_key("a\0b", scalar(0, 1)), FORMAT, r"'a\x00b' holds a character"),
    ("G10-escape", with_key("\x1b[31m", scalar(0, 1)), FORMAT, r"'\x1b[31m'"),
    ("G10-bidi", with_key("a\u202eb", scalar(0, 1)), FORMAT, r"'a\u202eb'"),
    ("G11", with_key("general.name", string("x")), FORMAT, "twice, as key 1 and key 14"),
    ("G12-13", with_key("x", struct.pack("<I", 13)), FORMAT, "key 'x': value type 13; allowed"),
    ("G12-99", with_key("x", struct.pack("<I", 99)), FORMAT, "value type 99; allowed 0..12"),
    ("G12-2^32-1", with_key("x", b"\xff" * 4), FORMAT, "value type 4294967295"),
    ("G12-in-array", with_key("x", array(13, b"", 0)), FORMAT, "element type = 13"),
    ("G13-2^63", with_key("x", string("v", HUGE)), FORMAT, f"the length of the string = {HUGE}"),
    ("G13-past", only(text("k") + string("v", 2)), FORMAT, "its length is 2 at byte 37; at most 1"),
    ("G14-2^63", only(text("k") + array(0, b"", HUGE)), FORMAT, f"length = {HUGE}; allowed: 0..16"),
    ("G14-2^30", only(text("k") + array(0, b"", 2**30)), FORMAT, "at most 0 fit in the 0 bytes"),
    ("G14-10^6", only(text("k") + array(0, b"", 10**6)), FORMAT, "1000000; at most 0 fit"),
    ("G14-strings", only(text("k") + array(8, bytes(16), 3)), FORMAT, "= 3; at most 2 fit"),
    ("G15-1", with_key("x", nested(1)), FORMAT, "an array inside an array"),
    ("G15-1000", with_key("x", nested(1000)), FORMAT, "an array inside an array"),
    (
        "G16",
        only(text("k") + array(8, text("abcdefgh") + text("b", 3) + b"x", 2)),
        FORMAT,
        "while reading element 1: its length is 3 at byte 65; at most 2 fit",
    ),
    ("G16-utf8", with_key("x", array(8, text("a") + text(b"\xff"), 2)), FORMAT, "element 1 at"),
    ("G17-2", with_key("x", struct.pack("<IB", 7, 2)), FORMAT, "a boolean = 2; allowed: 0 or 1"),
    ("G17-array", with_key("x", array(7, b"\0\1\xff\1", 4)), FORMAT, "a boolean = 255"),
    ("G18-0", alignment(scalar(4, 0)), FORMAT, "general.alignment = 0; allowed: a power of two"),
    ("G18-1", alignment(scalar(4, 1)), FORMAT, "general.alignment = 1; allowed: a power of two"),
    ("G18-13", alignment(scalar(4, 13)), FORMAT, "a power of two, 8..65536 (u32)"),
    ("G18-2^31", alignment(scalar(4, 2**31)), FORMAT, "general.alignment = 2147483648"),
    ("G18-string", alignment(string("32")), FORMAT, "general.alignment = \"string '32'\""),
    ("G18-i32", alignment(scalar(5, 32)), FORMAT, "general.alignment = 'i32 32'"),
    ("G18-array", alignment(array(4, bytes(4), 1)), FORMAT, "general.alignment = \"array of u32"),
    ("T1-0", with_tensor(name_length=0), FORMAT, "tensor 1: the length of the name = 0; allowed"),
    ("T1-65", with_tensor(name="n" * 65), FORMAT, "the length of the name = 65; allowed: 1..64"),
    ("T1-2^63", with_tensor(name_length=HUGE), FORMAT, f"the length of the name = {HUGE}"),
    ("T1-not-utf8", with_tensor(name=b"a\xfe"), FORMAT, r"not UTF-8: b'a\xfe'"),
    ("T1-nul", with_tensor(name="a\0"), FORMAT, r"'a\x00' holds a character"),
    ("T1-newline", with_tensor(name="a\nb"), FORMAT, r"'a\nb' holds a character"),
    ("T1-escape", with_tensor(name="\x1b]0;"), FORMAT, r"'\x1b]0;' holds a character"),
    ("T2", with_tensor(name="token_embd.weight"), FORMAT, "twice, as tensor 0 and tensor 1"),
    ("T3-0", with_tensor(n_dims=0), FORMAT, "n_dims = 0; allowed 1..4"),
    ("T3-5", with_tensor(n_dims=5), FORMAT, "n_dims = 5; allowed 1..4"),
    ("T3-2^32-1", with_tensor(n_dims=2**32 - 1), FORMAT, "n_dims = 4294967295; allowed 1..4"),
    ("T4-0", with_tensor(dims=(32, 0)), FORMAT, "dimension 1 = 0; allowed: 1..2147483647"),
    ("T4-2^63", with_tensor(dims=(HUGE,)), FORMAT, f"dimension 0 (9.22e+18 elements) = {HUGE}"),
    ("T4-minus-1", with_tensor(dims=(32, -1)), FORMAT, f"= {2**64 - 1}; allowed"),
    ("T5-2^32x2^32", with_tensor(dims=(2**32, 2**32)), FORMAT, "1.84e+19 elements"),
    ("T5-2^31x2^31x4", with_tensor(dims=(2**31, 2**31, 4)), FORMAT, "1.84e+19 elements"),
    ("T5-2^42+1", with_tensor(dims=(2**42 + 1, 1152)), FORMAT, "5.07e+15 elements"),
    ("T5-in-range", with_tensor(dims=(2**30, 2**30)), FORMAT, "1.15e+18 elements"),
    ("T6-wrap", with_tensor(dims=(2**62 - 1,)), FORMAT, "4.61e+18 elements"),
    ("T6-fits", with_tensor(dims=(2**20, 2**20)), FORMAT, "which end at 4398046516224"),
    *((f"T7-{n}", with_tensor(type=n), FORMAT, "not a ggml") for n in (4, 5, 36, 37, 38, 43, 99)),
    ("T7-minus-1", with_tensor(type=-1), FORMAT, "type 4294967295 is not a ggml tensor type"),
    ("T8-33", with_tensor(dims=(33,), type=2), FORMAT, "33 is not a multiple of 32 for Q4_0"),
    ("T8-255", with_tensor(dims=(255,), type=12), FORMAT, "255 is not a multiple of 256 for Q4_K"),
    ("T9-unaligned", with_tensor(offset=5121), FORMAT, "5121 is not a multiple of the alignment"),
    ("T9-minus-32", with_tensor(offset=-32), FORMAT, f"offset {2**64 - 32} + size 128 is past"),
    ("T9-2^63", with_tensor(offset=HUGE), FORMAT, f"offset {HUGE} + size 128 is past the end"),
    ("T9-sum-wraps", with_tensor(offset=-128), FORMAT, f"offset {2**64 - 128} + size 128 is past"),
    ("T9-descending", with_tensor(offset=0), FORMAT, "offset 0 overlaps the tensors before it"),
    ("T10-bomb", changed(same_offset), FORMAT, "offset 0 overlaps the tensors before it"),
    ("T10-hole", changed(hole), FORMAT, "leaves a hole of 32 bytes"),
    ("T11-last", lambda: good().build()[:-1], FORMAT, "the file is incomplete"),
    ("T13", lambda: changed(coarse)()[:60_000], FORMAT, "the file is incomplete"),
]  # fmt: skip


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.mark.parametrize(("build", "kind", "fragment"), [r[1:] for r in REFUSED],
                         ids=[r[0] for r in REFUSED])  # fmt: skip
def test_bad_file_is_refused_with_its_reason(
    tmp_path: Path,
    build: Callable[[], bytes],
    kind: type[EdgeLlamaError],
    fragment: str,
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw := build())
    before = open_files()
    with pytest.raises(EdgeLlamaError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert message.startswith("bad.gguf: ") and fragment in message
    assert message.isprintable() and len(message) < 1000
    assert caught.value.path == path and open_files() == before
    assert path.read_bytes() == raw
    with open_gguf(good().write(tmp_path / "good.gguf")) as file:
        assert len(file.tensors) == 11


def test_limits_hold_whatever_a_file_declares(tmp_path: Path) -> None:
    """U1, U2: every bad file within 64 MiB of address space and 20 s of processor time in all."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc to know this process's address space")
    for name, build, *_ in REFUSED:
        (tmp_path / name).write_bytes(build())
    program = """
        import os, resource, sys
        from edgellama import EdgeLlamaError
        from edgellama.gguf import open_gguf
        pages = int(open("/proc/self/statm").read().split()[0])
        room = pages * os.sysconf("SC_PAGE_SIZE") + 64 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        for name in sorted(os.listdir(sys.argv[1])):
            try:
                open_gguf(os.path.join(sys.argv[1], name))
            except EdgeLlamaError as error:
                print(type(error).__name__)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(REFUSED)


def test_every_prefix_of_a_good_file_is_refused(tmp_path: Path) -> None:
    """G2, T11: cut in the header it says where and in what, cut in the data what is missing."""
    spec = good()
    raw, header = spec.build(), len(spec.header())
    path = tmp_path / "cut.gguf"
    for size in [*range(1, header + 64), *range(header + 64, len(raw), 97)]:
        path.write_bytes(raw[:size])
        with pytest.raises(ModelFormatError) as caught:
            open_gguf(path)
        expected = f"truncated at byte {size} while reading "
        assert (expected if size < header else f"ends at byte {size}, needed") in str(caught.value)
        assert "incomplete" in str(caught.value)


def test_every_byte_of_the_header_may_be_wrong(tmp_path: Path) -> None:
    """Whatever a byte becomes, the file opens or is refused: no other exception, no hang."""
    spec = good()
    raw, header = bytearray(spec.build()), len(spec.header())
    path = tmp_path / "byte.gguf"
    path.write_bytes(raw)
    opened = refused = 0
    with path.open("r+b", buffering=0) as file:
        for at in range(header):
            for value in {0, 255, raw[at] ^ 1, raw[at] ^ 0x80} - {raw[at]}:
                file.seek(at)
                file.write(bytes([value]))
                try:
                    open_gguf(path).close()
                    opened += 1
                except EdgeLlamaError:
                    refused += 1
            file.seek(at)
            file.write(raw[at : at + 1])
    assert opened and refused
    assert path.read_bytes() == raw


def test_errors_carry_their_parts(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(with_tensor(n_dims=5)())
    with pytest.raises(EdgeLlamaError) as caught:
        open_gguf(path)
    error = caught.value
    told = [error.path, error.where, error.field, error.value, error.allowed]
    assert told == [path, "tensor 'blk.0.attn_norm.weight'", "n_dims", 5, "1..4"]
    assert json.dumps(str(error))
