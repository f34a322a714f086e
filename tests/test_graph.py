"""The decoder graph: what it computes, in which order, from which weights."""

from dataclasses import replace

from tiny import tiny_config

from edgellama.graph import Graph, Node, decoder
from edgellama.weights import expected_shapes

GIVEN = {"tokens", "positions", "rows"}


def graph(**overrides: object) -> Graph:
    return decoder(tiny_config(**overrides))


def test_two_layers_node_by_node() -> None:
    expected = ["embed token_embd"]
    for blk in ("blk.0", "blk.1"):
        expected += [
            f"norm {blk}.attn_norm",
            f"linear {blk}.attn_q",
            f"linear {blk}.attn_k",
            f"linear {blk}.attn_v",
            f"rope {blk}.attn_q.rope",
            f"rope {blk}.attn_k.rope",
            f"attention {blk}.attn",
            f"linear {blk}.attn_output",
            f"add {blk}.attn_residual",
            f"norm {blk}.ffn_norm",
            f"linear {blk}.ffn_gate",
            f"linear {blk}.ffn_up",
            f"swiglu {blk}.ffn_swiglu",
            f"linear {blk}.ffn_down",
            f"add {blk}.ffn_residual",
        ]
    expected += ["select selected", "norm output_norm", "linear output"]
    assert [f"{node.op} {node.output}" for node in graph().nodes] == expected


def test_residuals_and_attention_read_the_right_values() -> None:
    nodes = {node.output: node for node in graph().nodes}
    assert nodes["blk.0.attn_norm"].inputs == ("token_embd",)
    assert nodes["blk.0.attn_residual"].inputs == ("token_embd", "blk.0.attn_output")
    assert nodes["blk.0.ffn_residual"].inputs == ("blk.0.attn_residual", "blk.0.ffn_down")
    assert nodes["blk.1.attn_norm"].inputs == ("blk.0.ffn_residual",)
    rotated = ("blk.1.attn_q.rope", "blk.1.attn_k.rope", "blk.1.attn_v")
    assert nodes["blk.1.attn"] == Node("attention", "blk.1.attn", rotated, layer=1)
    assert nodes["blk.1.ffn_swiglu"].inputs == ("blk.1.ffn_gate", "blk.1.ffn_up")
    assert nodes["selected"].inputs == ("blk.1.ffn_residual", "rows")


def test_every_input_is_defined_before_its_use_and_every_value_used() -> None:
    for layers in (1, 2, 5):
        made, used = set(GIVEN), set()
        for node in graph(n_layers=layers).nodes:
            assert set(node.inputs) <= made, node
            assert node.output not in made, node
            used.update(node.inputs)
            made.add(node.output)
        assert made - used == {"output"}


def test_weights_are_those_the_config_implies() -> None:
    for tied in (False, True):
        config = replace(tiny_config(), tied_output=tied)
        weights = decoder(config).weights
        assert len(weights) == len(set(weights))
        assert set(weights) == set(expected_shapes(config))
        assert weights[0] == "token_embd.weight"


def test_a_tied_head_reads_the_embedding() -> None:
    assert graph().nodes[-1].weight == "output.weight"
    assert graph(tied_output=True).nodes[-1].weight == "token_embd.weight"


def test_only_operators_that_need_one_have_a_weight() -> None:
    for node in graph().nodes:
        assert (node.weight is not None) == (node.op in ("embed", "norm", "linear"))
        assert (node.layer is not None) == (node.op == "attention")
