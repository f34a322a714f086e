"""The interpreter of pickles: attacks, bombs and damage refused with their reasons, nothing run.

Ids P1 to P7 are rows of the project's catalogue of bad inputs.
"""

import os
import pickle
import struct
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from torchfiles import (
    BUILD,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    FALSE,
    GOOD,
    KEPT,
    MARK,
    NONE,
    ORDERED,
    PERSID,
    PROTO,
    REBUILD,
    REDUCE,
    SETITEM,
    STOP,
    TRUE,
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
    text,
    view,
)

from edgellama import ModelFormatError, UnsafeModelError, UnsupportedModelError
from edgellama.quantize.raw_file import RawFile
from edgellama.quantize.torch_files import read_torch_file

DATA = Path(__file__).parent / "data"

CODE = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("builtins", "eval"),
    ("__builtin__", "exec"),
    ("torch.hub", "load"),
    ("numpy.core.multiarray", "scalar"),
    ("torch", "load"),
    ("torch._utils", "os.system"),
    ("collections", "OrderedDict.__init__.__globals__"),
    ("torch.FloatStorage", "__new__"),
    ("argparse", "Namespace"),
]


@pytest.mark.parametrize(("module", "attribute"), CODE)
def test_p1_names_that_could_run(tmp_path: Path, module: str, attribute: str) -> None:
    call = name(module, attribute) + many(text("echo")) + REDUCE
    stacked = text(module) + text(attribute) + b"\x93" + many(text("echo")) + REDUCE
    for body in (call, stacked):
        message = refused_pickle(tmp_path, pickled(body), UnsafeModelError)
        assert f"asks to run or create '{module}.{attribute}'" in message
        assert "safetensors" in message


class _Attack:
    def __reduce__(self) -> Any:
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_p1_a_real_attack_runs_nothing_and_imports_nothing(tmp_path: Path, protocol: int) -> None:
    """In a process of its own, whose audit hook sees every import and every call outside."""
    raw = pickle.dumps({"w": _Attack()}, protocol)
    (tmp_path / "a.bin").write_bytes(archive(raw, {}).bytes())
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from edgellama import UnsafeModelError
        from edgellama.quantize.raw_file import RawFile
        from edgellama.quantize.torch_files import read_torch_file
        seen, watching = [], True
        sys.addaudithook(lambda event, _: seen.append(event) if watching else None)
        before = set(sys.modules)
        try:
            with RawFile(Path("a.bin")) as file:
                read_torch_file(file)
        except UnsafeModelError as error:
            assert "posix.mkdir" in str(error) or "nt.mkdir" in str(error), error
        else:
            sys.exit("accepted")
        watching = False
        assert set(sys.modules) == before, set(sys.modules) - before
        assert not {e for e in seen if e.startswith(("os.", "import", "exec", "subprocess"))}, seen
        assert "pickle" not in sys.modules or "pickle.find_class" not in seen
    """)
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=120)
    assert not (tmp_path / "attacked").exists()


TENSOR_CALLS = {
    "too few arguments": REBUILD + many(KEPT, number(0)) + REDUCE,
    "too many arguments": REBUILD + many(KEPT, *[number(0)] * 40) + REDUCE,
    "no storage": REBUILD + many(NONE, number(0), many(), many(), FALSE, ORDERED) + REDUCE,
    "a list for a size": REBUILD
    + many(KEPT, number(0), EMPTY_LIST, EMPTY_LIST, FALSE, ORDERED)
    + REDUCE,
    "a list for arguments": REBUILD + EMPTY_LIST + REDUCE,
    "a dict that is filled": name("collections", "OrderedDict") + many(EMPTY_LIST) + REDUCE,
    "a class that is called": name("torch", "FloatStorage") + many(number(1)) + REDUCE,
    "a persistent id of text": text("storage") + PERSID,
    "a persistent id of another kind": many(text("module"), NONE, NONE) + PERSID,
    "a truth value for a count": many(
        text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), TRUE
    )
    + PERSID,
}


@pytest.mark.parametrize("case", TENSOR_CALLS)
def test_p2_allowed_names_with_wrong_arguments(tmp_path: Path, case: str) -> None:
    message = refused_pickle(tmp_path, pickled(dictionary({"w": TENSOR_CALLS[case]})))
    assert "byte " in message


@pytest.mark.parametrize("key", ["__class__", "__dict__", "__setstate__", "append", "_metadata"])
def test_p2_build_sets_no_attributes(tmp_path: Path, key: str) -> None:
    state = dictionary({key: NONE, "__class__2": NONE})
    for target in (ORDERED, GOOD, EMPTY_DICT, EMPTY_LIST, name("torch", "Tensor")):
        message = refused_pickle(tmp_path, pickled(target + state + BUILD), UnsafeModelError)
        assert "BUILD" in message


def test_p2_metadata_of_modules_is_let_pass(tmp_path: Path) -> None:
    body = ORDERED + text("w") + GOOD + SETITEM + dictionary({"_metadata": ORDERED}) + BUILD
    assert accepted(tmp_path, archive(pickled(body), {"0": bytes(24)}).bytes())["w"].shape == (2, 3)


REFUSED = {
    "NEWOBJ": name("torch", "Tensor") + EMPTY_TUPLE + b"\x81",
    "NEWOBJ_EX": name("torch", "Tensor") + EMPTY_TUPLE + EMPTY_DICT + b"\x92",
    "INST": MARK + b"ios\nsystem\n",
    "OBJ": MARK + name("torch", "Tensor") + b"o",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"\x98",
    "PERSID": b"Pos.system\n",
}


@pytest.mark.parametrize("opcode", REFUSED)
def test_p2_opcodes_that_create_or_reach_out(tmp_path: Path, opcode: str) -> None:
    body = REFUSED[opcode]
    message = refused_pickle(tmp_path, pickled(body), UnsafeModelError)
    assert f"opcode {opcode} " in message and "byte " in message


@pytest.mark.parametrize("opcode", [b"2", b"I1\n", b"Va\n", b"S'a'\n", b"\x8f", b"\x00", b"\xff"])
def test_p2_opcodes_that_no_state_dict_needs(tmp_path: Path, opcode: bytes) -> None:
    message = refused_pickle(tmp_path, pickled(number(1) + opcode))
    assert f"opcode {opcode[0]:#04x}" in message


@pytest.mark.parametrize("target", [KEPT, GOOD, EMPTY_TUPLE, text("x"), name("torch", "Tensor")])
def test_p3_items_are_set_on_dicts_and_lists_only(tmp_path: Path, target: bytes) -> None:
    item = target + text("k") + NONE + SETITEM
    assert "sets an item" in refused_pickle(tmp_path, pickled(item), UnsafeModelError)
    appended = target + NONE + b"a"
    assert "appends to" in refused_pickle(tmp_path, pickled(appended), UnsafeModelError)
    many_appended = target + MARK + NONE + b"e"
    assert "appends to" in refused_pickle(tmp_path, pickled(many_appended), UnsafeModelError)


def test_p3_keys_are_text_and_not_repeated(tmp_path: Path) -> None:
    for key in (EMPTY_TUPLE, NONE, GOOD, EMPTY_LIST, number(2**40), TRUE):
        assert "a key is" in refused_pickle(tmp_path, pickled(EMPTY_DICT + key + NONE + SETITEM))
    twice = EMPTY_DICT + (text("w") + GOOD + SETITEM) * 2
    assert "'w' occurs twice" in refused_pickle(tmp_path, pickled(twice))
    odd = EMPTY_DICT + MARK + text("w") + b"u"
    assert "no value" in refused_pickle(tmp_path, pickled(odd))


ATTACK = name("os", "system") + many(text("x")) + REDUCE


def test_p4_damage_before_and_after_an_attack(tmp_path: Path) -> None:
    assert "os.system" in refused_pickle(tmp_path, PROTO + ATTACK + b"\xff" * 9, UnsafeModelError)
    refused_pickle(tmp_path, PROTO + b"\xff" + ATTACK + STOP)
    after = pickled(dictionary({"w": GOOD})) + pickled(ATTACK)
    assert "bytes follow the end" in refused_pickle(tmp_path, after)
    assert "bytes needed, 0 left" in refused_pickle(tmp_path, PROTO + dictionary({"w": GOOD}))
    left = pickled(NONE + dictionary({"w": GOOD}))
    assert "2 values are left" in refused_pickle(tmp_path, left)
    assert "values are left" in refused_pickle(tmp_path, pickled(MARK))
    assert "no dict of tensors" in refused_pickle(tmp_path, pickled(GOOD))
    assert "no dict of tensors" in refused_pickle(tmp_path, pickled(dictionary({"w": NONE})))


def test_p4_every_prefix_of_a_pickle(tmp_path: Path) -> None:
    good = pickled(dictionary({"w": GOOD, "v": view(KEPT, 2, (2,), (1,))}))
    for end in range(len(good)):
        kind = UnsupportedModelError if end < 2 else ModelFormatError
        refused_pickle(tmp_path, good[:end], kind)


BOMBS = {
    "memo of 2^27": (NONE + b"r" + struct.pack("<I", 2**27), None),
    "memo of 2^32-1": (NONE + b"r" + struct.pack("<I", 2**32 - 1), None),
    "memo that was never set": (b"j" + struct.pack("<I", 5), "memo 5"),
    "marks": (MARK * 10_000_000, "on the stack"),
    "values": (NONE * 200_000, "on the stack"),
    "steps": (NONE + b"q\x00" * 550_000, "opcodes"),
    "laughs": (EMPTY_TUPLE + b"q\x00" + (b"h\x00h\x00h\x00\x87q\x00" * 40_000), "values are left"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_p5_bombs(tmp_path: Path, case: str) -> None:
    """A few bytes that make the reader of the standard library allocate gigabytes, or hang."""
    body, reason = BOMBS[case]
    path = tmp_path / "bad.bin"
    path.write_bytes(archive(pickled(body), {}).bytes())
    if case != "steps":  # which allocates nothing, but tracing makes slow
        tracemalloc.start()
    start = time.monotonic()
    with RawFile(path) as file, pytest.raises(ModelFormatError, match=reason):
        read_torch_file(file)
    assert time.monotonic() - start < 60
    peak = tracemalloc.get_traced_memory()[1] if tracemalloc.is_tracing() else 0
    tracemalloc.stop()
    assert peak < 64 * 2**20 + 8 * len(body)


@pytest.mark.parametrize("code", [b"\x8d", b"\x8e", b"\x95"])
@pytest.mark.parametrize("length", [2**62, 2**64 - 1, 100])
def test_p6_lengths_of_eight_bytes(tmp_path: Path, code: bytes, length: int) -> None:
    message = refused_pickle(tmp_path, pickled(code + struct.pack("<Q", length)))
    assert str(length) in message and "left" in message


@pytest.mark.parametrize("code", [b"\x8b", b"X", b"B"])
def test_p6_lengths_of_four_bytes(tmp_path: Path, code: bytes) -> None:
    refused_pickle(tmp_path, pickled(code + struct.pack("<I", 2**31 - 1)))
    refused_pickle(tmp_path, pickled(b"\x8b" + struct.pack("<I", 200) + bytes(200)))
    refused_pickle(tmp_path, pickled(b"c" + b"x" * 2000))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_p7_protocols_two_to_five(tmp_path: Path, protocol: int) -> None:
    """The standard library's pickles of plain data are understood, framed and memoized or not."""
    data = {"a": [1, 2**40, -1, 2.5, None, True, ("x", ()), b"raw"], "b": OrderedDict(c={"d": 1})}
    raw = pickle.dumps(data, protocol)
    body = raw[2:-1]
    if protocol == 2:  # which spells bytes as a call
        data["a"].pop()
        body = pickle.dumps(data, 2)[2:-1]
    kept = EMPTY_DICT + text("extra") + body + SETITEM + text("w") + GOOD + SETITEM
    if protocol >= 4:  # a frame would promise more than it holds
        kept = kept.replace(raw[2:11], b"")
    whole_pickle = b"\x80" + bytes([protocol]) + kept + STOP
    assert accepted(tmp_path, archive(whole_pickle, {"0": bytes(24)}).bytes())["w"].shape == (2, 3)


@pytest.mark.parametrize("raw", [b"(dp0\n.", b"", b"\x80", b"\x80\x01.", b"\x80\x06.", b"}."])
def test_p7_other_protocols(tmp_path: Path, raw: bytes) -> None:
    refused_pickle(tmp_path, raw, UnsupportedModelError)


def test_p7_torchscript(tmp_path: Path) -> None:
    made = archive(pickled(dictionary({"w": GOOD})), {"0": bytes(24)})
    made.entries.append(Entry("m/code/__torch__.py", b"def forward(): pass"))
    assert "TorchScript" in refusal(tmp_path, made.bytes(), UnsupportedModelError)
