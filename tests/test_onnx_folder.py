"""ONNX folders from strangers: nothing reaches ONNX Runtime before it is known to be ours.

Ids are the rows of the catalogue of hostile inputs.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config, write_tiny

import edgellama
from edgellama.cli.main import run
from edgellama.quantize import quantize
from edgellama.quantize.verify import verify

onnx = pytest.importorskip("onnx", reason="onnx is not installed (it comes with the extra `dev`)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra `onnx`)")

DATA, MODEL, METADATA, MANIFEST = (
    "model.onnx.data",
    "model.onnx",
    "tokenizer.gguf",
    "edgellama.json",
)
UNSAFE, FORMAT = edgellama.UnsafeModelError, edgellama.ModelFormatError
UNSUPPORTED = edgellama.UnsupportedModelError
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    config = tiny_config(tied_output=True, n_layers=1, vocab_size=291)
    source = write_tiny(folder / "tiny.gguf", config, "Q8_0")
    quantize(source, folder / "tiny.onnx", "Q8_0")
    return folder / "tiny.onnx"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny.onnx"))


def resealed(folder: Path) -> None:
    """Make the manifest agree, as whoever changed the rest would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def edited(change: Callable[[Any], None]) -> Change:
    """A change to the parsed model."""

    def apply(folder: Path) -> None:
        model = onnx.load(folder / MODEL, load_external_data=False)
        change(model)
        (folder / MODEL).write_bytes(model.SerializeToString())
        resealed(folder)

    return apply


def entry(key: str, value: str) -> Change:
    """Set one entry of a tensor's external data."""

    def change(model: Any) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == key).value = value

    return edited(change)


def added(key: str, value: str) -> Change:
    def change(model: Any) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        new = tensor.external_data.add()
        new.key, new.value = key, value

    return edited(change)


def manifest(**values: Any) -> Change:
    def apply(folder: Path) -> None:
        found = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(found | values))

    return apply


def written(name: str, change: Callable[[bytes], bytes]) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return apply


def linked(name: str, hard: bool = False) -> Change:
    def apply(folder: Path) -> None:
        elsewhere = folder.parent / "elsewhere"
        shutil.copy(folder / name, elsewhere)
        (folder / name).unlink()
        (os.link if hard else os.symlink)(elsewhere, folder / name)

    return apply


def replaced_by_pipe(folder: Path) -> None:
    (folder / DATA).unlink()
    os.mkfifo(folder / DATA)


def overlapping(model: Any) -> None:
    tensors = [t for t in model.graph.initializer if t.external_data]
    for tensor in tensors[1:]:
        next(e for e in tensor.external_data if e.key == "offset").value = "0"


def foreign_node(model: Any) -> None:
    node = onnx.helper.make_node("Conjure", ["rows"], ["x"], domain="com.example")
    model.graph.node.append(node)


def huge_node(model: Any) -> None:
    model.graph.node.append(onnx.helper.make_node("ConstantOfShape", ["rows"], ["x"]))


def branch(model: Any) -> None:
    inner = onnx.helper.make_graph([], "inner", [], [])
    node = onnx.helper.make_node("If", ["rows"], ["x"], then_branch=inner, else_branch=inner)
    model.graph.node.append(node)


def renamed_input(model: Any) -> None:
    model.graph.input[0].name = "input_ids"


def other_dtype(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT32


def fixed_batch(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 7


def cycle(model: Any) -> None:
    model.graph.node[0].input[0] = "output"


def other_version(**fields: int) -> Change:
    def change(model: Any) -> None:
        for name, value in fields.items():
            if name == "opset":
                model.opset_import[0].version = value
            else:
                setattr(model, name, value)

    return edited(change)


def foreign_domain(model: Any) -> None:
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))


def note_in_model(model: Any) -> None:
    new = model.metadata_props.add()
    new.key, new.value = "tokenizer", "x" * 1000


LOCATIONS = {
    "parent": "../model.onnx.data",
    "around": "sub/../../model.onnx.data",
    "absolute": "/etc/passwd",
    "windows": "C:\\data",
    "share": "\\\\host\\share",
    "url": "file:///etc/passwd",
    "empty": "",
    "nul": "model.onnx.data\0",
    "dot": ".",
    "environ": "/proc/self/environ",
    "newline": "model.onnx.data\n",
}
ROWS: dict[str, tuple[Change, type[Exception], str]] = {
    f"O1-{name}": (entry("location", value), UNSAFE, "only model.onnx.data is allowed")
    for name, value in LOCATIONS.items()
}
ROWS |= {
    "O1-fifo": (replaced_by_pipe, UNSAFE, "no regular file"),
    "O2-link-to-data": (linked(DATA), UNSAFE, "is a link"),
    "O2-link-to-model": (linked(MODEL), UNSAFE, "is a link"),
    "O2-link-to-manifest": (linked(MANIFEST), UNSAFE, "is a link"),
    "O2-hard-link": (linked(DATA, hard=True), UNSAFE, "has 2 names"),
    "O3-negative": (entry("offset", "-4096"), FORMAT, "offset = '-4096'; expected a decimal"),
    "O3-exponent": (entry("length", "1e3"), FORMAT, "length = '1e3'"),
    "O3-huge": (entry("offset", str(2**62)), FORMAT, "is past the end of the data file"),
    "O3-length": (entry("length", "12"), FORMAT, "length = 12; its shape takes"),
    "O3-unaligned": (entry("offset", "1"), FORMAT, "offset"),
    "O4-overlapping": (edited(overlapping), FORMAT, "another tensor's data lies there"),
    "O5-memory": (entry("location", "*/_ORT_MEM_ADDR_/*"), UNSAFE, "_ORT_MEM_ADDR_"),
    "O6-class": (added("__class__", "x"), FORMAT, "the key '__class__'"),
    "O6-checksum": (added("checksum", "0"), FORMAT, "the key 'checksum'"),
    "O6-twice": (added("offset", "0"), FORMAT, "there twice"),
    "O7-missing": (lambda folder: (folder / DATA).unlink(), FORMAT, "the file is missing"),
    "O7-truncated": (written(DATA, lambda b: b[:-1]), FORMAT, "its tensors take"),
    "O7-longer": (written(DATA, lambda b: b + b"\0"), FORMAT, "its tensors take"),
    "O7-flipped": (written(DATA, lambda b: b[:99] + b"\7" + b[100:]), FORMAT, "SHA-256"),
    "O7-metadata": (written(METADATA, lambda b: b.replace(b"tiny", b"tinz")), FORMAT, "SHA-256"),
    "O8-truncated": (written(MODEL, lambda b: b[:-9]), FORMAT, "declares"),
    "O8-empty": (written(MODEL, lambda b: b""), FORMAT, "not the one"),
    "O8-huge": (written(MODEL, lambda b: bytes(1 << 23)), edgellama.EdgeLlamaError, "bytes"),
    "O8-noise": (written(MODEL, lambda b: b"\xff" * 999), FORMAT, "byte 0"),
    "O8-foreign-node": (edited(foreign_node), UNSUPPORTED, "'com.example.Conjure' is not allowed"),
    "O8-bomb": (edited(huge_node), UNSUPPORTED, "'ConstantOfShape' is not allowed"),
    "O8-subgraph": (edited(branch), UNSUPPORTED, "a graph of its own"),
    "O8-cycle": (edited(cycle), FORMAT, "not the one that the folder's tensors mean"),
    "O9-ir": (other_version(ir_version=99), UNSUPPORTED, "ir_version = 99; expected 10"),
    "O9-opset": (other_version(opset=8), UNSUPPORTED, "opset of '' = 8; expected 21"),
    "O9-domain": (edited(foreign_domain), UNSUPPORTED, "operators of 'com.example'"),
    "O9-manifest": (manifest(version=2), UNSUPPORTED, "version = 2; expected 1"),
    "O10-renamed": (edited(renamed_input), UNSUPPORTED, "'input_ids'; expected tokens"),
    "O10-dtype": (edited(other_dtype), FORMAT, "not the one"),
    "O10-fixed": (edited(fixed_batch), FORMAT, "not the one"),
    "O11-props": (edited(note_in_model), UNSUPPORTED, "metadata_props"),
    "O11-manifest": (written(MANIFEST, lambda b: b[:-3]), FORMAT, "line"),
    "O11-huge": (
        written(MANIFEST, lambda b: b[:-1] + b" " * (17 << 20) + b"}"),
        edgellama.EdgeLlamaError,
        "bytes",
    ),
    "O11-types": (manifest(tensors={}), edgellama.ModelConfigError, "is missing"),
    "O11-kinds": (manifest(tied_output=1), FORMAT, "tied_output = 1; expected bool"),
    "O11-containers": (manifest(containers="best"), FORMAT, "containers = 'best'"),
    "O11-untied": (manifest(tied_output=False), edgellama.ModelConfigError, "output.weight"),
}


@pytest.mark.parametrize("row", ROWS)
def test_refused(folder: Path, row: str) -> None:
    change, kind, message = ROWS[row]
    change(folder)
    with pytest.raises(kind, match=r".") as caught:
        edgellama.load(folder)
    assert message in str(caught.value), str(caught.value)
    assert isinstance(caught.value, edgellama.EdgeLlamaError)


def test_the_graph_as_the_onnx_package_reads_it(original: Path) -> None:
    """Every value is made once, before it is used; all data lie in the one file."""
    model = onnx.load(original / MODEL, load_external_data=False)
    known = {v.name for v in model.graph.input} | {t.name for t in model.graph.initializer}
    assert len(known) == len(model.graph.input) + len(model.graph.initializer)
    for node in model.graph.node:
        assert known.issuperset(filter(None, node.input)), node.name
        outputs = [name for name in node.output if name]
        assert known.isdisjoint(outputs)
        known.update(outputs)
    assert known.issuperset(v.name for v in model.graph.output)
    onnx.load(original / MODEL)  # reads the external data, and checks where they lie
    assert {"blk.0.attn", "blk.0.ffn_swiglu", "blk.0.attn_residual", "output"} <= known


def test_every_row_is_refused_of_a_folder_that_loads(folder: Path) -> None:
    with edgellama.load(folder) as model:
        assert model.device["runtime"] == "onnx"
        assert model.info.types == {"Q8_0": 8, "F32": 3}
        assert (
            model.info.file_bytes
            == sum(f.stat().st_size for f in folder.iterdir()) - (folder / MANIFEST).stat().st_size
        )
        assert np.isfinite(model.session().forward([1, 2, 3])).all()


def test_info_and_estimate(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(original), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["config"]["n_layers"] == 1 and told["config"]["tied_output"] is True
    assert run(["estimate", str(original), "--json"]) == 0
    assert run(["run", str(original), "the", "--raw", "-n", "3", "--json"]) == 0


def test_a_tied_head_is_stored_once(original: Path) -> None:
    rows = 291 * 64 * 34 // 32
    assert (original / DATA).stat().st_size < 2 * rows + 64 * 320 * 34 // 32 + 20 * 4096


# --- what is no folder of ours -------------------------------------------------------------------


def test_foreign_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / MODEL).write_bytes(b"\x08\x0a")
    for path in (tmp_path / "foreign", tmp_path / "foreign" / MODEL):
        with pytest.raises(UNSUPPORTED, match=r"edgellama quantize CHECKPOINT OUTPUT\.onnx"):
            edgellama.load(path)


def test_a_file_of_the_folder_is_not_the_folder(original: Path) -> None:
    with pytest.raises(UNSUPPORTED, match=r"Give the folder, tiny\.onnx"):
        edgellama.load(original / MODEL)


def test_other_runtimes_do_not_take_folders(original: Path) -> None:
    for runtime in ("cpu", "reference"):
        with pytest.raises(edgellama.ParameterError, match="onnx runtime"):
            edgellama.load(original, runtime)


def test_a_gguf_file_may_have_any_name(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.onnx")
    with edgellama.load(path, "reference") as model:
        assert model.config.name == "tiny"


def test_verify_replays_the_certificate(original: Path, folder: Path) -> None:
    verdict = verify(original)
    assert verdict.problems == () and verdict.runtime == "onnx" and verdict.deviation is not None
    assert verdict.deviation < 0.2 and verdict.prompts == 4
    written(METADATA, lambda b: b.replace(b"tiny", b"tinz"))(folder)
    resealed(folder)
    assert verify(folder).problems == ("key 'general.name' was changed",)
