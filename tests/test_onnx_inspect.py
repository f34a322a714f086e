"""Why an ONNX graph is refused: found in time and in words, whatever numbers it declares."""

import time
from pathlib import Path

import pytest

from edgellama.errors import EdgeLlamaError, ModelFormatError, UnsupportedModelError
from edgellama.runtimes.onnx_inspect import MOST_DIMS, explain
from edgellama.runtimes.onnx_wire import OnnxModel, OnnxNode, _integer, _message, _text, _varint

DATA = "model.onnx.data"


def explained(graph: bytes, *nodes: OnnxNode) -> EdgeLlamaError:
    expected = OnnxModel(DATA)
    expected.nodes.extend(nodes)
    started = time.perf_counter()
    error = explain(Path("model.onnx"), _message(7, graph), expected, 100)
    assert time.perf_counter() - started < 10  # it takes 0.5 s at most
    assert len(str(error)) < 500
    return error


def tensor(*dims: int, packed: bool = True, length: str = "4") -> bytes:
    entries = (("location", DATA), ("offset", "0"), ("length", length))
    external = b"".join(_message(13, _text(1, key) + _text(2, value)) for key, value in entries)
    one_each = b"".join(_integer(1, n) for n in dims)
    values = _message(1, b"".join(map(_varint, dims))) if packed else one_each
    return _message(5, values + _integer(2, 1) + _text(8, "w") + external)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("count", [MOST_DIMS + 1, 400, 80_000])
def test_too_many_dimensions(count: int, packed: bool) -> None:
    """Their product would have up to a million digits."""
    error = explained(tensor(*[2**63 - 1] * count, packed=packed))
    assert isinstance(error, ModelFormatError) and error.field == "dims"
    assert "tensor 'w': it has more than 8 dimensions" in str(error)


def test_large_dimensions() -> None:
    assert f"its shape takes {4 * (2**63 - 1) ** MOST_DIMS}" in str(
        explained(tensor(*[2**63 - 1] * MOST_DIMS))
    )
    assert "tensor 'w': a dimension is -1" in str(explained(tensor(2**64 - 1)))


def test_an_ordinary_shape() -> None:
    assert "another tensor's data" in str(explained(tensor(5, 5, length="100")))
    assert "its shape takes 96" in str(explained(tensor(4, 6, length="100")))


def test_many_nodes_of_a_large_graph() -> None:
    """Each is looked up, not compared with all that are expected."""
    known = [OnnxNode(f"Op{i}", (), ()) for i in range(3000)]
    nodes = _message(1, _text(4, "Op2999")) * 20_000
    error = explained(nodes + _message(1, _text(4, "Evil")), *known)
    assert isinstance(error, UnsupportedModelError) and "'Evil' is not allowed" in str(error)
