"""The reader of PyTorch files: what it gives, and hostile files refused with their reasons.

Ids P7 to P12 are rows of the project's catalogue of bad inputs; P1 to P7 are in
`test_pickles.py`, P13 and P14 in `test_shards.py`, P15 in `test_checkpoint.py`.
"""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchfiles import (
    EMPTY_TUPLE,
    FALSE,
    GOOD,
    KEPT,
    ORDERED,
    REBUILD,
    REDUCE,
    Archive,
    Entry,
    accepted,
    archive,
    dictionary,
    many,
    name,
    number,
    pickled,
    refusal,
    refused_pickle,
    storage,
    torch_file,
    view,
)

from edgellama import EdgeLlamaError, UnsupportedModelError
from edgellama.quantize.raw_file import RawFile
from edgellama.quantize.torch_files import read_torch_file

DATA = Path(__file__).parent / "data"


def whole() -> "np.ndarray[Any, Any]":
    return np.arange(30, dtype=np.float32).reshape(6, 5) / 8


def test_files_that_pytorch_wrote() -> None:
    """Contiguous tensors, views, a transposed one, every float type, an empty one, a scalar."""
    with RawFile(DATA / "torch_views.bin") as file:
        tensors = read_torch_file(file)
        expected = {
            "f32": whole(),
            "rows": whole()[2:4],
            "columns": whole()[:, 1:3],
            "transposed": whole().T,
            "f16": whole(),
            "bf16": np.arange(16, dtype=np.float32).reshape(4, 4) / 8,
            "parameter": whole()[:2],
            "scalar": np.float32(2.5),
            "empty": np.empty((0, 5), np.float32),
        }
        assert tensors.keys() == expected.keys()
        for key, values in expected.items():
            np.testing.assert_array_equal(tensors[key].read(), values)
            assert tensors[key].shape == values.shape
        np.testing.assert_array_equal(tensors["transposed"].read(1, 4), whole().T[1:4])
        types = {key: tensor.dtype for key, tensor in tensors.items()}
    assert types["f16"] == "F16" and types["bf16"] == "BF16" and types["f32"] == "F32"


def test_a_module_state_dict_that_pytorch_wrote() -> None:
    with RawFile(DATA / "torch_module.bin") as file:
        tensors = read_torch_file(file)
        assert list(tensors) == ["weight", "bias"]
        np.testing.assert_array_equal(tensors["bias"].read(), np.float32([0, 1, 2]) / 8)


def test_rows_of_far_strided_tensors(tmp_path: Path) -> None:
    """Views too wide to read in one go: transposed, every other column, three axes."""
    n = 400
    values = np.arange(n * n, dtype=np.float32)
    kept = storage("0", "FloatStorage", n * n)
    items = {
        "transposed": view(kept, 0, (n, n), (1, n)),
        "sparse": view(kept, 7, (20, 15), (n * 19, 2)),
        "deep": view(kept, 0, (3, 50, 4), (1, n * 4, 5)),
        "line": view(kept, 3, (5,), (n * 70,)),
    }
    path = tmp_path / "strided.bin"
    path.write_bytes(archive(pickled(dictionary(items)), {"0": values.tobytes()}).bytes())
    square, at = values.reshape(n, n), np.arange
    expected = {
        "transposed": square.T,
        "sparse": values[7 + at(20)[:, None] * n * 19 + at(15) * 2],
        "deep": values[at(3)[:, None, None] + at(50)[:, None] * n * 4 + at(4) * 5],
        "line": values[3 + at(5) * n * 70],
    }
    with RawFile(path) as file:
        for key, tensor in read_torch_file(file).items():
            np.testing.assert_array_equal(tensor.read(), expected[key])
            np.testing.assert_array_equal(tensor.read(1, 3), expected[key][1:3])


def test_rows_of_a_transposed_tensor_do_not_need_it_whole(tmp_path: Path) -> None:
    n = 2048  # 16 MiB
    items = {"w": view(storage("0", "FloatStorage", n * n), 0, (n, n), (1, n))}
    path = tmp_path / "strided.bin"
    path.write_bytes(archive(pickled(dictionary(items)), {"0": bytes(4 * n * n)}).bytes())
    with RawFile(path) as file:
        tensor = read_torch_file(file)["w"]
        tracemalloc.start()
        tensor.read(0, 64)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * 2**20


VIEWS = {
    "negative offset": (-1, (2, 3), (3, 1), "storage offset -1"),
    "huge offset": (2**62, (2, 3), (3, 1), "storage offset"),
    "offset beyond": (7, (0,), (1,), "does not fit"),
    "past the end": (1, (2, 3), (3, 1), "does not fit its storage '0' of 6"),
    "stride past the end": (0, (2, 3), (4, 1), "does not fit"),
    "negative stride": (5, (2, 3), (-3, 1), "stride -3"),
    "negative size": (0, (-2, 3), (3, 1), "size -2"),
    "expansion": (0, (10**12,), (0,), "does not fit"),
    "expansion of few": (0, (7,), (0,), "does not fit"),
    "lengths": (0, (2, 3), (3,), "2 sizes and 1 strides"),
    "nine axes": (0, (1,) * 9, (1,) * 9, "at most 8"),
    "overflow": (0, (2**40, 2**40), (1, 1), "does not fit"),
}


@pytest.mark.parametrize("case", VIEWS)
def test_p8_views_outside_their_storage(tmp_path: Path, case: str) -> None:
    offset, size, stride, reason = VIEWS[case]
    body = dictionary({"w": view(KEPT, offset, size, stride)})
    assert reason in refused_pickle(tmp_path, pickled(body))


@pytest.mark.parametrize("size", [0, 20, 23, 25, 28, 48])
def test_p9_storage_of_another_size(tmp_path: Path, size: int) -> None:
    made = archive(pickled(dictionary({"w": GOOD})), {"0": bytes(size)})
    message = refusal(tmp_path, made.bytes())
    assert "'w'" in message and "take 24 bytes" in message and f"has {size}" in message


def test_p9_storage_missing_or_of_two_types(tmp_path: Path) -> None:
    made = archive(pickled(dictionary({"w": GOOD})), {"1": bytes(24)})
    assert "storage '0' is missing" in refusal(tmp_path, made.bytes())
    other = view(storage("0", "IntStorage", 6), 0, (6,), (1,))
    made = archive(pickled(dictionary({"w": GOOD, "v": other})), {"0": bytes(24)})
    assert "declared twice" in refusal(tmp_path, made.bytes())


KINDS = ["_rebuild_sparse_tensor", "_rebuild_qtensor", "_rebuild_meta_tensor_no_storage"]
KINDS += ["_rebuild_wrapper_subclass", "_rebuild_nested_tensor", "_rebuild_tensor"]


@pytest.mark.parametrize("function", KINDS)
def test_p10_tensors_that_are_not_plain(tmp_path: Path, function: str) -> None:
    body = name("torch._utils", function) + EMPTY_TUPLE + REDUCE
    assert function in refused_pickle(tmp_path, pickled(body), UnsupportedModelError)


def test_p10_tensor_with_its_class(tmp_path: Path) -> None:
    inner = many(KEPT, number(0), many(number(6)), many(number(1)), FALSE, ORDERED)
    typed = name("torch._tensor", "_rebuild_from_type_v2")

    def call(kind: bytes, function: bytes = REBUILD, arguments: bytes = inner) -> bytes:
        return pickled(dictionary({"w": typed + many(function, kind, arguments, ORDERED) + REDUCE}))

    good = call(name("torch.nn.parameter", "Parameter"))
    assert accepted(tmp_path, archive(good, {"0": bytes(24)}).bytes())["w"].shape == (6,)
    refused_pickle(tmp_path, call(name("torch", "FloatStorage")))
    refused_pickle(tmp_path, call(name("torch", "Tensor"), name("collections", "OrderedDict")))
    refused_pickle(tmp_path, call(name("torch", "Tensor"), arguments=many(*[KEPT] * 50)))


def zipped(**changes: Any) -> Archive:
    """A good archive whose storage entry has these fields."""
    made = archive(pickled(dictionary({"w": GOOD})), {"0": bytes(24)})
    for key, value in changes.items():
        setattr(made.entries[2], key, value)
    return made


def test_p11_the_unchanged_archive_is_good(tmp_path: Path) -> None:
    assert accepted(tmp_path, zipped().bytes())["w"].shape == (2, 3)
    described = zipped(flags=8, local_size=0)  # sizes after the data, as PyTorch writes them
    described.entries[3].before = b"PK\7\x08" + struct.pack("<III", 0, 24, 24)
    assert accepted(tmp_path, described.bytes())["w"].shape == (2, 3)


ZIPS: dict[str, tuple[dict[str, Any], str]] = {
    "compressed": ({"method": 8}, "compressed"),
    "encrypted": ({"flags": 1}, "encrypted"),
    "strongly encrypted": ({"flags": 64}, "encrypted"),
    "sizes differ": ({"packed": 23}, "23 stored"),
    "larger than the file": ({"size": 10_000}, "10000 bytes"),
    "zip64 without sizes": ({"size": 0xFFFF_FFFF}, "no zip64 sizes"),
    "zip64 lie": (
        {"size": 0xFFFF_FFFF, "extra": struct.pack("<HHQQ", 1, 16, 2**63, 2**63)},
        str(2**63),
    ),
    "zip64 lie of the offset": (
        {"header": 0xFFFF_FFFF, "extra": struct.pack("<HHQ", 1, 8, 2**64 - 1)},
        str(2**64 - 1),
    ),
    "local size": ({"local_size": 25}, "25 bytes"),
    "local name": ({"local_name": b"m/data/1"}, "another name"),
    "overlap": ({"header": 0}, "inside the entry"),
    "duplicate": ({"name": "m/byteorder"}, "two entries are named"),
    "not UTF-8": ({"name": b"m/data/\xff"}, "UTF-8"),
    "bytes between": ({"before": b"hidden!"}, "7 bytes lie before it"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_p11_archives(tmp_path: Path, case: str) -> None:
    changes, reason = ZIPS[case]
    message = refusal(tmp_path, zipped(**changes).bytes(), EdgeLlamaError, exact=False)
    assert reason in message


def test_p11_around_the_archive(tmp_path: Path) -> None:
    good = zipped().bytes()
    assert "comment of 9 bytes" not in refusal(tmp_path, good + b"123456789")
    made = zipped()
    made.comment = good  # a second archive in the comment of the first ends the file
    refusal(tmp_path, made.bytes())
    made.comment = b"123456789"
    refusal(tmp_path, made.bytes())
    refusal(tmp_path, b"#!/bin/sh\n" + good)
    for count in (0, 3, 5, 65_535):
        made = zipped()
        made.count = count
        refusal(tmp_path, made.bytes())
    shifted = good.index(b"m/data/0") - 30 + 16  # where no header is, by a gap that is allowed
    assert "no local header" in refusal(tmp_path, zipped(header=shifted).bytes())
    made = zipped()
    made.before_directory = b"hidden"
    assert "6 bytes lie between" in refusal(tmp_path, made.bytes())
    names = Archive([Entry("../../etc/passwd", b"x"), Entry("a\0b", b"y")])
    assert "data.pkl" in refusal(tmp_path, names.bytes())  # names are only looked up, never opened


def test_p11_many_entries(tmp_path: Path) -> None:
    """A zip64 record that promises a million entries in a few bytes."""
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, 10**6, 10**6, 46, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 46, 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF, 0)
    message = refusal(tmp_path, bytes(46) + record + locator + end)
    assert "1000000 entries" in message and "at most 131072" in message


@pytest.mark.parametrize("length", [0, 1, 21, 22, 60, 200])
def test_p11_cut_files(tmp_path: Path, length: int) -> None:
    good = zipped().bytes()
    assert "incomplete" in refusal(tmp_path, good[:length])


def test_p12_byte_order_and_other_entries(tmp_path: Path) -> None:
    made = zipped()
    made.entries[1].data = b"big"
    assert "big" in refusal(tmp_path, made.bytes(), UnsupportedModelError)
    made.entries = [made.entries[0], made.entries[2]]  # older files: no byteorder, no version
    assert accepted(tmp_path, made.bytes())["w"].shape == (2, 3)
    made.entries.append(Entry("m/.data/serialization_id", b"1" * 40))
    assert accepted(tmp_path, made.bytes())["w"].shape == (2, 3)
    made.entries.append(Entry("other/data.pkl", b""))
    assert "2 entries named data.pkl" in refusal(tmp_path, made.bytes())


def test_a_training_script_puts_the_weights_deeper(tmp_path: Path) -> None:
    for key in ("model", "state_dict", "module"):
        body = dictionary({"step": number(7), key: dictionary({"w": GOOD})})
        raw = archive(pickled(body), {"0": bytes(24)}).bytes()
        assert list(accepted(tmp_path, raw)) == ["w"]


def test_the_helper_writes_what_is_read(tmp_path: Path) -> None:
    arrays = {"a": whole(), "b": whole().astype(np.float16)}
    for key, values in accepted(tmp_path, torch_file(arrays)).items():
        np.testing.assert_array_equal(values, arrays[key].astype(np.float32))


def ended(raw: bytes, **fields: int) -> bytes:
    """An archive whose end record has these fields changed."""
    names = ("disk", "first_disk", "here", "count", "size", "start", "comment")
    values = dict(zip(names, struct.unpack("<4H2IH", raw[-18:]), strict=True)) | fields
    return raw[:-18] + struct.pack("<4H2IH", *values.values())


def ended64(
    raw: bytes, magic: bytes = b"PK\6\6", size: int = 44, at: int = 0, disks: int = 1
) -> bytes:
    """The same archive with a zip64 record."""
    body, (here, count, length, start) = raw[:-22], struct.unpack("<2H2I", raw[-14:-2])
    fields = (0, 0, 0, 0, here, count, length, start)
    record = struct.pack("<4sQ2H2I4Q", magic, size, *fields)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(body) + at, disks)
    return body + record + locator + raw[-22:]


def test_p11_zip64_records(tmp_path: Path) -> None:
    good = zipped().bytes()
    assert accepted(tmp_path, ended64(good))["w"].shape == (2, 3)
    assert "record is damaged" in refusal(tmp_path, ended64(good, magic=b"PK\6\5"))
    assert "record is damaged" in refusal(tmp_path, ended64(good, size=45))
    assert "does not end at byte" in refusal(tmp_path, ended64(good, disks=2))
    for at in (-1, 1, 2**62):
        assert "does not end at byte" in refusal(tmp_path, ended64(good, at=at))


def test_p11_end_records(tmp_path: Path) -> None:
    good = zipped().bytes()
    assert "comment of 5 bytes" in refusal(tmp_path, ended(good, comment=5))
    for field in ("disk", "first_disk", "here"):
        assert "one part of several" in refusal(tmp_path, ended(good, **{field: 3}))
    start, size = good.index(b"PK\1\2"), len(good) - 22 - good.index(b"PK\1\2")
    assert "follow the 3 entries" in refusal(tmp_path, ended(good, here=3, count=3))
    longer = zipped(extra=bytes(20)).bytes()
    assert "cut short" in refusal(tmp_path, ended(longer, here=5, count=5))
    assert "does not end at byte" in refusal(tmp_path, ended(good, start=start - 1))
    assert "does not end at byte" in refusal(tmp_path, ended(good, size=size - 1))
    assert "does not end at byte" in refusal(tmp_path, ended(good, here=9, count=9))
    shifted = ended(good, start=start + 1, size=size - 1)
    assert "of the directory is damaged" in refusal(tmp_path, shifted)


def test_p11_entries_only_the_directory_calls_compressed(tmp_path: Path) -> None:
    """Both headers are asked: a reader that asks one sees another file than one that asks both."""
    good = zipped().bytes()
    local, central = good.index(b"m/data/0") - 30, good.rindex(b"m/data/0") - 46
    for at in (central + 10, central + 8):  # method, flags
        lie = good[:at] + b"\1" + good[at + 1 :]
        assert "the entry is" in refusal(tmp_path, lie, UnsupportedModelError)
    for at in (local + 8, local + 6):
        assert "its local header says" in refusal(tmp_path, good[:at] + b"\1" + good[at + 1 :])
