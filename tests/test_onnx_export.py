"""What an export to an ONNX folder meets, what it makes, and that its graphs are sound."""

from pathlib import Path

import numpy as np
import pytest
import zoo
from tiny import tiny_config, write_tiny

import edgellama
from edgellama.config import Rope
from edgellama.distance import nmse
from edgellama.graph import decoder
from edgellama.quantize import quantize
from edgellama.quantize.verify import verify
from edgellama.weights import expected_shapes

onnx = pytest.importorskip("onnx", reason="onnx is not installed (it comes with the extra `dev`)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra `onnx`)")

DATA, MODEL = "model.onnx.data", "model.onnx"
METADATA, MANIFEST = "tokenizer.gguf", "edgellama.json"


# --- O12: what an export meets -------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "source.gguf", tiny_config(n_layers=1), "Q8_0")


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_O12_foreign_outputs_are_left_alone(source: Path, tmp_path: Path, kind: str) -> None:
    output, elsewhere = tmp_path / "out.onnx", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / DATA).write_bytes(b"precious")
    if kind == "link":
        output.symlink_to(elsewhere)
    elif kind == "folder":
        elsewhere = elsewhere.rename(output)
    else:
        output.write_bytes(b"precious")
    with pytest.raises(edgellama.OutputError, match="left alone"):
        quantize(source, output, "Q8_0")
    kept = output if kind == "file" else elsewhere / DATA
    assert kept.read_bytes() == b"precious"
    assert not list(tmp_path.glob(".out*"))


def test_O12_an_older_folder_is_replaced_whole(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    quantize(source, output, "F32")
    before = (output / DATA).stat().st_size
    (output / "stale").write_bytes(b"x")
    quantize(source, output, "Q8_0")
    assert (output / DATA).stat().st_size < before / 2
    assert sorted(f.name for f in output.iterdir()) == sorted([DATA, MODEL, METADATA, MANIFEST])
    assert not list(tmp_path.glob(".out*"))


def test_O12_a_failed_export_changes_nothing(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    quantize(source, output, "Q8_0")
    before = {f.name: f.read_bytes() for f in output.iterdir()}
    token = edgellama.CancelToken()
    token.cancel()
    with pytest.raises(edgellama.Cancelled):
        quantize(source, output, "F32", cancel=token)
    assert {f.name: f.read_bytes() for f in output.iterdir()} == before
    assert not list(tmp_path.glob(".out*"))


def test_O12_what_killed_exports_left_is_swept(source: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.onnx.0123456789ab.tmp"
    left.mkdir()
    (left / DATA).write_bytes(b"half")
    (left / ".edgellama-unfinished").touch()
    quantize(source, tmp_path / "out.onnx", "Q8_0")
    assert not left.exists()


def test_O12_an_export_killed_between_two_renames_is_undone(source: Path, tmp_path: Path) -> None:
    """Its old folder is the only whole one: it comes back, and is there if the next one fails."""
    output = tmp_path / "out.onnx"
    quantize(source, output, "Q8_0")
    before = {f.name: f.read_bytes() for f in output.iterdir()}
    output.rename(tmp_path / ".out.onnx.0123456789ab.old")
    token = edgellama.CancelToken()
    token.cancel()
    with pytest.raises(edgellama.Cancelled):
        quantize(source, output, "F32", cancel=token)
    assert {f.name: f.read_bytes() for f in output.iterdir()} == before


def test_O12_a_living_export_is_left_alone(source: Path, tmp_path: Path) -> None:
    from edgellama.runtimes.onnx_atomic import atomic_folder

    output = tmp_path / "out.onnx"
    with atomic_folder(output) as mine:
        (mine / "edgellama.json").write_text("{}")
        quantize(source, output, "Q8_0")
        assert mine.exists()
    assert (output / "edgellama.json").read_text() == "{}"  # the last one to end


# --- what an export makes ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_export_computes_what_the_gguf_of_that_type_does(tmp_path: Path, kind: str) -> None:
    """A tensor that has its type already is copied to the bit; so is the whole of a file."""
    source = write_tiny(tmp_path / "source.gguf", tiny_config(), kind, seed=5)
    tokens = [int(i) for i in np.random.default_rng(1).integers(0, 288, 40)]
    with edgellama.load(source, "reference") as model:
        wanted = model.session().forward(tokens, all_logits=True)
    report = quantize(source, tmp_path / "out.onnx", kind)
    assert report.bytes == sum(f.stat().st_size for f in (tmp_path / "out.onnx").iterdir())
    with edgellama.load(tmp_path / "out.onnx", accuracy=0) as model:
        found = model.session().forward(tokens, all_logits=True)
    if kind != "Q4_0":
        assert nmse(wanted, found) < 1e-11
    else:
        assert report.types == {"Q4_0": 15, "F32": 5, "Q8_0": 1}  # a head in 4 bits is no use
        assert nmse(wanted, found) < 1e-4


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1", "IQ4_NL"])
def test_a_checkpoint_becomes_the_same_model_in_both_formats(tmp_path: Path, kind: str) -> None:
    """Rows in their order for rope, the tokenizer, the certificate: all as in the GGUF file."""
    folder = zoo.write_folder(tmp_path, next(iter(zoo.styles().values())))
    reports = [quantize(folder, tmp_path / f"out.{form}", kind) for form in ("gguf", "onnx")]
    assert all("_K" not in name for name in reports[1].types)
    tokens = [int(i) for i in np.random.default_rng(1).integers(3, 200, 30)]
    with edgellama.load(tmp_path / "out.gguf", "reference") as model:
        wanted, encoded = model.session().forward(tokens, all_logits=True), model.tokenizer
    with edgellama.load(tmp_path / "out.onnx", accuracy=0) as model:
        found = model.session().forward(tokens, all_logits=True)
        assert model.tokenizer.encode("the and a") == encoded.encode("the and a")
    assert nmse(wanted, found) < 1e-11
    told = [note for note in reports[1].notes if "of the largest weight" in note]
    assert [note[:12] for note in told] == (["Q4_1 is kept"] if kind == "Q4_1" else [])
    assert verify(tmp_path / "out.onnx").problems == ()


def test_a_head_of_8_bits_stays(tmp_path: Path) -> None:
    config = tiny_config(tied_output=True, vocab_size=291)
    types = {"token_embd": "Q8_0", "blk": "Q4_0"}
    source = write_tiny(tmp_path / "source.gguf", config, types, seed=5)
    quantize(source, tmp_path / "out.onnx", "Q4_0")
    with edgellama.load(source, "reference") as model:
        wanted = model.session().forward([1, 40, 80], all_logits=True)
    with edgellama.load(tmp_path / "out.onnx", accuracy=0) as model:
        assert model.info.types["Q8_0"] == 1
        assert nmse(wanted, model.session().forward([1, 40, 80], all_logits=True)) < 1e-11


def test_k_types_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(edgellama.ParameterError, match="K types cannot be written") as caught:
        quantize(source, tmp_path / "out.onnx", "Q4_K")
    assert "Q4_0" in str(caught.value.allowed)


def test_the_same_input_gives_the_same_folder(source: Path, tmp_path: Path) -> None:
    for name in ("one.onnx", "two.onnx"):
        quantize(source, tmp_path / name, "Q4_0")
    one, two = (
        {f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one.onnx", "two.onnx")
    )
    assert one == two


# --- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("head_dim", [16, 20])
def test_every_lowering_is_sound(dtype: str, fused: bool, head_dim: int) -> None:
    """Also those that no CPU runs: values are made once, before use; casts fit what is stored."""
    from edgellama.runtimes.onnx_containers import EIGHT_BIT
    from edgellama.runtimes.onnx_layout import Layout
    from edgellama.runtimes.onnx_lowering import Manner, lower

    config = tiny_config(head_dim=head_dim, rope=Rope(head_dim))
    graph = decoder(config)
    kinds = dict.fromkeys(graph.weights, "Q4_1") | {"output.weight": "BF16"}
    types = {n: "F32" if len(expected_shapes(config)[n]) == 1 else k for n, k in kinds.items()}
    types["blk.1.attn_v.weight"] = "F16"  # no longer rows of one product
    layout = Layout(graph, types, EIGHT_BIT)
    made = lower(graph, layout, Manner(dtype, 0, fused, candidates=4))
    model = onnx.load_from_string(made.to_bytes())
    typed = {t.name: t.data_type for t in model.graph.initializer}
    typed |= {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    half = onnx.TensorProto.DataType.Value({"float32": "FLOAT"}.get(dtype, dtype.upper()))
    for node in model.graph.node:
        known = [typed[name] for name in node.input if name]
        if node.op_type in ("MatMulNBits", "FusedMatMul", "GroupQueryAttention", "Add", "Mul"):
            numbers = {kind for kind in known if kind not in (2, 6, 7)}
            assert numbers <= {half}, (node.name, numbers)
        cast = next((a.i for a in node.attribute if a.name == "to"), None)
        kinds_out = {"Gather": known[0]}
        for i, name in enumerate(filter(None, node.output)):
            assert name not in typed
            out = cast or kinds_out.get(node.op_type, known[0] if known[0] != 2 else half)
            typed[name] = 7 if node.op_type == "TopK" and i == 1 else out
    assert typed["output"] == onnx.TensorProto.FLOAT
    assert typed["past.next"] == onnx.TensorProto.INT32
