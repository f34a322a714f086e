"""Converting: what comes out, what is refused, and that an old output survives whatever happens."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import digest, kill_many
from make_plan_fixture import quantized, silence
from tiny import tiny_config, tiny_weights, write_tiny

import edgellama
from edgellama.cli.main import run
from edgellama.config import Rope
from edgellama.errors import (
    Cancelled,
    EdgeLlamaError,
    NonFiniteError,
    OutputError,
    ParameterError,
)
from edgellama.gguf import open_gguf
from edgellama.quantize import Report, convert
from edgellama.quantize.blocks import decode
from edgellama.quantize.plan import FILE_TYPES, PlannedTensor, plan
from edgellama.quantize.source import open_source
from edgellama.quantize.writer import Writer
from edgellama.weights import expected_shapes

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes and limits")
quantize: Callable[..., Report] = partial(convert.quantize, certificate="none")
WIDE = tiny_config(  # rows of 256 fit every type; the larger matrices are several pieces
    dim=256,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    ffn_dim=1280,
    rope=Rope(64),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("models")
    write_tiny(at / "small.gguf")
    for kind in ("F32", "F16", "BF16"):
        write_tiny(at / f"{kind}.gguf", WIDE, kind)
    return at


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor."""
    found = {}
    with open_gguf(path) as file:
        for name, info in file.tensors.items():
            raw = bytearray(info.n_bytes)
            file.read_into(name, raw)
            found[name] = info.type.name, bytes(raw)
    return found


def values(path: Path, name: str) -> np.ndarray:
    with open_source(path) as source:
        return source.tensors[name].read()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_output_is_as_planned_and_near_the_source(models: Path, tmp_path: Path, kind: str) -> None:
    source, output = models / "F32.gguf", tmp_path / "out.gguf"
    report = quantize(source, output, kind.lower())
    with open_source(source) as opened:
        planned = plan(opened, kind)
    found = tensors(output)
    assert {name: type for name, (type, _) in found.items()} == {
        tensor.name: tensor.type for tensor in planned.tensors
    }
    with open_gguf(output) as file:
        assert not file.warnings
        assert file.metadata["general.file_type"] == FILE_TYPES[kind][0]
        assert file.metadata["general.quantization_version"] == 2
    for name, (type, raw) in found.items():
        exact = values(source, name)
        rows = np.frombuffer(raw, np.uint8).reshape(exact.shape[0] if exact.ndim > 1 else 1, -1)
        error = decode(type, rows).reshape(exact.shape) - exact
        assert np.square(error).sum() <= LARGEST_NMSE[type] * np.square(exact).sum(), name
    assert report.types == planned.types
    assert report.bits_per_weight == planned.bits_per_weight
    assert report.bytes == output.stat().st_size
    assert (report.type, report.source, report.output) == (kind, source, output)


LARGEST_NMSE = {  # of weights that are normally distributed, with room to spare
    "F32": 0.0,
    "F16": 1e-6,
    "BF16": 1e-5,
    "Q8_0": 1e-4,
    "Q6_K": 1e-3,
    "Q5_0": 4e-3,
    "Q5_1": 4e-3,
    "Q5_K": 3e-3,
    "Q4_0": 0.015,
    "Q4_1": 0.012,
    "Q4_K": 0.01,
    "IQ4_NL": 0.01,
    "Q3_K": 0.04,
    "Q2_K": 0.15,
}


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_what_has_its_type_already_is_copied(models: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out.gguf"
    quantize(models / f"{kind}.gguf", output, kind)
    assert tensors(output) == tensors(models / f"{kind}.gguf")
    wide = tmp_path / "wide.gguf"
    quantize(output, wide, "F32")
    for name in tensors(wide):
        assert np.array_equal(values(wide, name), values(output, name))


def test_requantizing_copies_blocks_bit_for_bit(tmp_path: Path) -> None:
    source, output = tmp_path / "a.gguf", tmp_path / "out.gguf"
    write_tiny(
        source, WIDE, {"blk": "Q4_K", "blk.0.attn_v": "Q6_K", "output": "Q6_K", "tok": "F16"}
    )
    report = quantize(source, output, "Q4_K_S")
    before, after = tensors(source), tensors(output)
    same = [name for name in before if before[name][0] == after[name][0]]
    assert all(before[name] == after[name] for name in same)
    changed = set(before) - set(same)
    assert changed == {"token_embd.weight", "blk.0.attn_v.weight", "blk.1.attn_v.weight"}
    assert any("starts from quantized weights" in note for note in report.notes)


def test_keys_are_kept_but_the_files_own(tmp_path: Path) -> None:
    own = {"general.file_type": 0, "edgellama.word": "old", "general.url": "x", "split.count": 1}
    source, output = write_tiny(tmp_path / "a.gguf", metadata=own), tmp_path / "out.gguf"
    quantize(source, output, "F16")
    with open_gguf(source) as before, open_gguf(output) as after:
        own_keys = {"general.file_type", "general.quantization_version"}
        kept = {k: v for k, v in before.metadata.items() if k not in {*own, "split.count"}}
        found = {k: v for k, v in after.metadata.items() if k not in own_keys}
        assert found == kept | {"general.url": "x"}
        assert {k: after.kinds[k] for k in kept} == {k: before.kinds[k] for k in kept}


def test_same_input_same_bytes(models: Path, tmp_path: Path) -> None:
    found = set()
    for threads in (1, 2, 3):
        for _ in range(2):
            output = tmp_path / "out.gguf"
            quantize(models / "F16.gguf", output, "Q4_K_M", threads=threads)
            found.add(digest(output))
    assert len(found) == 1


def test_output_runs_here(models: Path, tmp_path: Path) -> None:
    """Q8_0 changes little: the likeliest token stays."""
    output = tmp_path / "out.gguf"
    quantize(models / "F32.gguf", output, "Q8_0")
    logits = []
    for path in (models / "F32.gguf", output):
        with edgellama.load(path, runtime="reference") as model:
            logits.append(model.session().forward([1, 5, 9], all_logits=True))
    error = np.square(logits[0] - logits[1]).sum() / np.square(logits[0]).sum()
    assert 0 < error < 1e-3


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q3_K_M", "Q4_K_M"])
def test_tensors_are_the_installed_llama_cpps(models: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra llamacpp")
    silence()
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    for name in ("F16", "small"):
        quantize(models / f"{name}.gguf", ours, kind)
        quantized(models / f"{name}.gguf", theirs, FILE_TYPES[kind][0])
        assert tensors(ours) == tensors(theirs)


def test_importance_changes_the_bytes(models: Path, tmp_path: Path) -> None:
    name = "blk.0.ffn_up.weight"
    weights = np.linspace(0.01, 100, 256, dtype=np.float32)
    plain, weighted = tmp_path / "plain.gguf", tmp_path / "weighted.gguf"
    quantize(models / "F32.gguf", plain, "Q4_K_S")
    quantize(models / "F32.gguf", weighted, "Q4_K_S", importance={name: weights})
    before, after = tensors(plain), tensors(weighted)
    assert [n for n in before if before[n] != after[n]] == [name]
    exact = values(models / "F32.gguf", name)
    errors = [np.square(values(path, name) - exact) @ weights for path in (plain, weighted)]
    assert errors[1].sum() < errors[0].sum()


def test_importance_of_another_model_is_refused(models: Path, tmp_path: Path) -> None:
    for wrong in (
        {"blk.9.ffn_up.weight": np.ones(256, np.float32)},
        {"blk.0.ffn_up.weight": np.ones(64, np.float32)},
        {"blk.0.ffn_up.weight": np.full(256, np.nan, np.float32)},
        {"blk.0.ffn_up.weight": np.full(256, -1, np.float32)},
    ):
        with pytest.raises(ParameterError, match=r"importance of .*another model"):
            quantize(models / "F32.gguf", tmp_path / "out.gguf", "Q4_0", importance=wrong)
    assert names_in(tmp_path) == []


# --- weights that are no numbers ----------------------------------------------------------------


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number(tmp_path: Path, stored: str, kind: str, value: float) -> None:
    name = "blk.1.ffn_down.weight"
    bad = tiny_weights(tiny_config())[name]
    bad[37, 11] = bad[40, 0] = value
    with np.errstate(invalid="ignore"):
        source = write_tiny(tmp_path / "a.gguf", types=stored, weights={name: bad})
    output = tmp_path / "out.gguf"
    output.write_bytes(b"old")
    with pytest.raises(NonFiniteError, match=rf"a\.gguf: tensor '{name}': row 37: .*2 such rows"):
        quantize(source, output, kind)
    assert output.read_bytes() == b"old" and names_in(tmp_path) == ["a.gguf", "out.gguf"]


def test_a_vector_that_is_no_number(tmp_path: Path) -> None:
    bad = np.ones(64, np.float32)
    bad[63] = np.nan
    source = write_tiny(tmp_path / "a.gguf", weights={"blk.0.attn_norm.weight": bad})
    with pytest.raises(NonFiniteError, match=r"'blk.0.attn_norm.weight': row 63"):
        quantize(source, tmp_path / "out.gguf", "Q8_0")


def test_a_block_whose_scale_is_no_number(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "a.gguf", types="Q8_0")
    with open_gguf(source) as file:
        info = file.tensors["blk.0.attn_q.weight"]
    with source.open("r+b") as raw:
        raw.seek(info.offset + 5 * info.row_bytes + 34)  # the second block of row 5
        raw.write(b"\x00\x7c")
    with pytest.raises(NonFiniteError, match=r"'blk.0.attn_q.weight': row 5: .*damaged"):
        quantize(source, tmp_path / "out.gguf", "Q8_0")


@pytest.mark.parametrize(("kind", "size"), [("F16", 7e4), ("Q8_0", 1e8), ("Q4_0", 1e7)])
def test_a_weight_too_large_for_its_type(tmp_path: Path, kind: str, size: float) -> None:
    name = "blk.0.attn_q.weight"
    big = tiny_weights(tiny_config())[name]
    big[9, 9] = size
    source = write_tiny(tmp_path / "a.gguf", types="BF16", weights={name: big})
    with pytest.raises(NonFiniteError, match=rf"'{name}': row 9: .*too large for {kind}.*BF16"):
        quantize(source, tmp_path / "out.gguf", kind)
    quantize(source, tmp_path / "out.gguf", "F32")
    assert values(tmp_path / "out.gguf", name)[9, 9] == pytest.approx(size, rel=0.01)


# --- arguments ----------------------------------------------------------------------------------


def test_output_that_is_the_input_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    source = write_tiny(tmp_path / "a.gguf")
    before = digest(source)
    (tmp_path / "folder").mkdir()
    os.link(source, tmp_path / "hard.gguf")
    (tmp_path / "soft.gguf").symlink_to(source)
    (tmp_path / "folder" / "there.gguf").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    for name in (
        source,
        "a.gguf",
        "./a.gguf",
        "folder/../a.gguf",
        "hard.gguf",
        "soft.gguf",
        "folder/there.gguf/a.gguf",
    ):
        with pytest.raises(ParameterError, match="the output is the input"):
            quantize(source, name, "F16")
        with pytest.raises(ParameterError, match="the output is the input"):
            quantize(name, source, "F16")
    assert digest(source) == before


def test_output_that_is_a_part_of_the_input_is_refused(tmp_path: Path) -> None:
    part = tmp_path / "a-00002-of-00002.gguf"
    part.write_bytes(b"")
    with pytest.raises(ParameterError, match="the output is the input"):
        quantize(tmp_path / "a-00001-of-00002.gguf", part, "F16")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "x.gguf").write_bytes(b"")
    with pytest.raises(ParameterError, match="the output is the input"):
        quantize(checkpoint, checkpoint / "x.gguf", "F16")


def test_arguments_are_checked(models: Path, tmp_path: Path) -> None:
    source, output = models / "small.gguf", tmp_path / "out.gguf"
    for wrong in (
        {"type": "Q9"},
        {"certificate": "half"},
        {"threads": 0},
        {"output": tmp_path / "out.bin"},
        {"strict": True, "type": "Q6_K"},
    ):
        with pytest.raises(ParameterError):
            quantize(**({"source": source, "output": output, "type": "F16"} | wrong))
    with pytest.raises(ParameterError, match="K types cannot be written for ONNX Runtime"):
        quantize(source, tmp_path / "out.onnx", "Q4_K")
    with pytest.raises(EdgeLlamaError, match="missing"):
        quantize(tmp_path / "missing.gguf", output, "F16")
    assert names_in(tmp_path) == []


# --- an old output survives ---------------------------------------------------------------------


def test_existing_output_is_replaced(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    output.write_bytes(b"old")
    quantize(models / "small.gguf", output, "F16")
    with open_gguf(output) as file:
        assert file.tensors["blk.0.attn_q.weight"].type.name == "F16"
    assert names_in(tmp_path) == ["out.gguf"]


def test_output_where_none_can_be(models: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    for output in (tmp_path / "missing" / "out.gguf", tmp_path / "folder.gguf"):
        with pytest.raises(OutputError):
            quantize(models / "small.gguf", output, "F16")
    assert names_in(tmp_path) == ["folder.gguf"]


CHILD = """
import os, resource, signal, sys
from edgellama.errors import EdgeLlamaError
from edgellama.measure import peak_bytes
from edgellama.quantize import quantize
source, output, kind, limit, number = sys.argv[1:]
if limit == "user":
    os.seteuid(int(number))
elif limit:
    number = int(number)
    if limit == "RLIMIT_AS":
        number += int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(getattr(resource, limit), (number, number))
try:
    quantize(source, output, kind, certificate="none", threads=2)
    print(peak_bytes())
except EdgeLlamaError as error:
    print(f"{type(error).__name__}: {error}")
"""


def limited(source: Path, output: Path, kind: str, limit: str = "", number: int = 0) -> str:
    """What a conversion in a process with that limit prints: an error, or its peak memory."""
    command = [sys.executable, "-c", CHILD, str(source), str(output), kind, limit, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout.strip()


@posix
def test_full_disk(models: Path, tmp_path: Path) -> None:
    """A limit on a file's size makes writing fail, as a full disk does, wherever it strikes."""
    output = tmp_path / "out.gguf"
    size = quantize(models / "small.gguf", output, "F16").bytes
    output.write_bytes(b"old")
    for room in (0, 100, size // 2, size - 1):
        said = limited(models / "small.gguf", output, "F16", "RLIMIT_FSIZE", room)
        assert said.startswith("OutputError: out.gguf: cannot be written: "), said
        assert output.read_bytes() == b"old" and names_in(tmp_path) == ["out.gguf"]
    said = limited(models / "small.gguf", output, "F16", "RLIMIT_FSIZE", size)
    assert said.isdigit(), said
    assert output.stat().st_size == size


@posix
def test_folder_that_cannot_be_written(models: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        source, output = folder / "a.gguf", folder / "out.gguf"
        source.write_bytes((models / "small.gguf").read_bytes())
        output.write_bytes(b"old")
        folder.chmod(0o555)
        other = 65534 if os.geteuid() == 0 else os.geteuid()  # nothing is closed to root
        said = limited(source, output, "F16", "user", other)
        folder.chmod(0o755)
        assert said.startswith("OutputError: out.gguf: cannot be written: Permission denied")
        assert output.read_bytes() == b"old" and names_in(folder) == ["a.gguf", "out.gguf"]


@posix
def test_killed_at_any_moment(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "a.gguf", WIDE)
    folder = tmp_path / "outputs"
    folder.mkdir()
    found = kill_many(source, folder, "F16", times=10)
    assert found["damaged"] == found["litter"] == 0
    assert found["old"] + found["new"] == found["killed"] + found["ended"]
    assert found["killed"] == 10 and found["left"] <= 1


@pytest.mark.parametrize("moment", [0.0, 0.5])
def test_cancelled(models: Path, tmp_path: Path, moment: float) -> None:
    output, token = tmp_path / "out.gguf", edgellama.CancelToken()
    output.write_bytes(b"old")
    if not moment:
        token.cancel()

    def progress(done: int, total: int, what: str) -> None:
        if done >= moment * total:
            token.cancel()

    with pytest.raises(Cancelled):
        quantize(models / "F32.gguf", output, "Q8_0", cancel=token, progress=progress)
    assert output.read_bytes() == b"old" and names_in(tmp_path) == ["out.gguf"]
    assert not [t for t in threading.enumerate() if t.name.startswith("edgellama-quantize")]


def big_model(path: Path, rows: int) -> Path:
    """A model of zeros, F16, with an embedding of so many rows of 1024; takes no room on disks."""
    config = tiny_config(
        n_layers=1,
        dim=1024,
        n_heads=16,
        n_kv_heads=16,
        head_dim=64,
        rope=Rope(64),
        tied_output=True,
    )
    with open_source(write_tiny(path, config, "F16")) as small:
        metadata = small.metadata | {"llama.vocab_size": rows}
    shapes = expected_shapes(replace(config, vocab_size=rows))
    kinds = {name: "F16" if len(shape) > 1 else "F32" for name, shape in shapes.items()}
    planned = [PlannedTensor(n, s, kinds[n], kinds[n], "") for n, s in shapes.items()]
    with path.open("wb") as file:
        file.truncate(Writer(file, metadata, planned).n_bytes)
    return path


def test_cancelled_inside_a_large_tensor(tmp_path: Path) -> None:
    source = big_model(tmp_path / "big.gguf", 2**17)
    token, moment = edgellama.CancelToken(), []

    def cancel(done: int, total: int, what: str) -> None:
        assert done < total
        moment.append(time.monotonic())
        token.cancel()

    with pytest.raises(Cancelled):
        quantize(source, tmp_path / "out.gguf", "Q3_K_M", cancel=token, progress=cancel)
    assert time.monotonic() - moment[0] < 1.0
    assert names_in(tmp_path) == ["big.gguf"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_memory_stays_small(tmp_path: Path) -> None:
    """A tensor of 256 MB; as float32 it alone would take 512 MB."""
    source, output = big_model(tmp_path / "big.gguf", 2**17), tmp_path / "out.gguf"
    said = limited(source, output, "Q8_0", "RLIMIT_AS", 300 * 2**20)
    assert said.isdigit(), said
    assert int(said) < 300e6
    with open_gguf(output) as file:
        assert file.tensors["token_embd.weight"].n_bytes == 2**22 * 34


def test_progress_counts_the_bytes(models: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    output = tmp_path / "out.gguf"
    quantize(models / "F32.gguf", output, "F16", progress=lambda *now: told.append(now))
    done = [now[0] for now in told]
    assert done == sorted(done) and told[-1][0] == told[-1][1]
    assert 0 <= output.stat().st_size - told[-1][1] < 2**16  # header and padding


# --- the command --------------------------------------------------------------------------------


def test_command_converts(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.gguf"
    assert run(["quantize", str(models / "small.gguf"), str(output), "--type", "f16"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "F16: " in said.err and "bits per weight, in " in said.err
    assert output.exists()


def test_command_shows_the_plan(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["quantize", str(models / "small.gguf"), str(tmp_path / "out.gguf"), "--dry-run"]
    assert run([*line, "--type", "q4_k"]) == 0
    said = capsys.readouterr()
    rows = [" ".join(row.split()) for row in said.out.splitlines()]
    assert rows[0] == "tensors from to MB why"
    assert "attn_q x 2 F32 Q5_0 0.0 rows of 64 are no multiple of 256, as Q4_K needs" in rows
    assert rows[-1].startswith("Q4_K_M: ") and rows[-1].endswith(" bits per weight")
    assert "note: 16 of 21 tensors get a larger type" in said.err
    assert names_in(tmp_path) == []


def test_command_in_json(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.gguf"
    line = ["quantize", str(models / "small.gguf"), str(output), "--type", "F16", "--json"]
    assert run([*line, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert run([*line, "--quiet"]) == 0
    said = capsys.readouterr()
    done = json.loads(said.out)
    assert said.err == ""
    assert done["type"] == "F16" and done["types"] == {"F16": 16, "F32": 5}
    assert done["bytes"] == output.stat().st_size and done["seconds"] > 0
    assert "seconds" not in planned
    assert done["tensors"] == planned["tensors"] and len(done["tensors"]) == 21
    assert done["tensors"][0] == {
        "name": "token_embd.weight",
        "shape": [288, 64],
        "source_type": "F32",
        "type": "F16",
        "reason": "",
        "fallback": False,
        "bytes": 288 * 64 * 2,
    }


def test_command_refuses(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = str(models / "small.gguf"), str(tmp_path / "out.gguf")
    for line, status, word in (
        ([source, output, "--type", "Q9"], 2, "type = 'Q9'"),
        ([source, output, "--type", "Q4_K", "--strict"], 2, "'token_embd.weight'"),
        ([source, source, "--type", "F16"], 2, "the output is the input"),
        ([source, output[:-4] + "onnx", "--type", "Q4_K"], 2, "ONNX"),
        ([str(tmp_path / "no.gguf"), output, "--type", "F16"], 1, "no such file"),
        ([source, output], 2, "--type"),
    ):
        assert run(["quantize", *line]) == status
        said = capsys.readouterr()
        assert word in said.err and said.out == ""
    assert names_in(tmp_path) == []


@posix
def test_command_on_a_terminal(tmp_path: Path) -> None:
    """A bar in bytes with the time that is left; once it has gone, the outcome."""
    import pty

    source, output = big_model(tmp_path / "big.gguf", 2**17), tmp_path / "out.gguf"
    line = [sys.executable, "-m", "edgellama", "quantize", str(source), str(output)]
    line += ["--type", "F32", "--certificate", "none"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(line, stderr=theirs, env={**os.environ, "COLUMNS": "120"}) as process:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # the other end has been closed
            while piece := os.read(ours, 4096):
                said += piece
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    assert re.search(r"quantizing .*% \d+\.\d/\d+\.\d MB \d\d:\d\d", text)
    assert re.search(r"out\.gguf: F32, .* bits per weight, in .* s; peak memory", text)


@posix
def test_command_that_is_interrupted(tmp_path: Path) -> None:
    source = big_model(tmp_path / "big.gguf", 2**19)
    line = [sys.executable, "-m", "edgellama", "quantize", str(source), str(tmp_path / "out.gguf")]
    line += ["--type", "F32", "--certificate", "none"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob(".out.gguf.*.tmp")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert names_in(tmp_path) == ["big.gguf"]
