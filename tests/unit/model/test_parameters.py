from __future__ import annotations

import pytest

from megatron_mdm.config import ModelConfig
from megatron_mdm.model.parameters import (
    EMBEDDING,
    OUTPUT_LAYER,
    PARAMETERS,
    find_layer,
    find_parameter,
    find_parameter_shape,
    find_stage,
    list_parameter_names,
    list_parameters,
)

SIZES = {
    "num_layers": 4,
    "hidden_size": 12,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 6,
    "ffn_hidden_size": 20,
    "vocab_size": 9,
    "vocab_padding_multiple": 8,
}
PLAIN = ModelConfig(**SIZES)
FULL = ModelConfig(**SIZES, tie_embeddings=True, qkv_bias=True, qk_norm=True)
GIDD = ModelConfig(
    **SIZES | {"num_query_groups": 4, "head_dim": 6},
    qk_norm="width",
    attention_sink=True,
    mlp="relu2",
    mlp_bias=True,
    time_embedding=True,
)
GATED = ModelConfig(**SIZES, mlp_bias=True)


def test_a_model_has_each_parameter_once_in_the_order_of_a_forward_pass():
    names = list_parameter_names(PLAIN)
    assert len(set(names)) == len(names) == 3 + 4 * 6
    assert (names[0], *names[-2:]) == (EMBEDDING, "decoder.final_layernorm.weight", OUTPUT_LAYER)
    layers = [find_layer(name) for name in names[1:-2]]
    assert layers == sorted(layers)
    assert set(layers) == {0, 1, 2, 3}
    added = {name.split(".", 3)[-1] for name in set(list_parameter_names(FULL)) - set(names)}
    norms = {f"self_attention.{which}_layernorm.weight" for which in "qk"}
    assert added == norms | {"self_attention.linear_qkv.bias"}
    assert OUTPUT_LAYER not in list_parameter_names(FULL)


def test_shapes_follow_from_the_sizes():
    layer = "decoder.layers.3."
    assert (
        find_parameter_shape(EMBEDDING, PLAIN)
        == find_parameter_shape(OUTPUT_LAYER, PLAIN)
        == (16, 12)
    )
    # Four heads of queries, two of keys and two of values.
    assert find_parameter_shape(layer + "self_attention.linear_qkv.weight", PLAIN) == (8 * 6, 12)
    assert find_parameter_shape(layer + "self_attention.linear_qkv.bias", FULL) == (8 * 6,)
    assert find_parameter_shape(layer + "self_attention.linear_proj.weight", PLAIN) == (12, 4 * 6)
    assert find_parameter_shape(layer + "mlp.linear_fc1.weight", PLAIN) == (2 * 20, 12)
    assert find_parameter_shape(layer + "self_attention.q_layernorm.weight", FULL) == (6,)
    assert find_parameter_shape(layer + "self_attention.k_layernorm.width_weight", GIDD) == (24,)
    sink = find_parameter_shape(layer + "self_attention.core_attention.sink_key", GIDD)
    assert sink == (4, 6)
    assert find_parameter_shape(layer + "mlp.linear_up.weight", GIDD) == (20, 12)
    assert find_parameter_shape(layer + "mlp.linear_fc1.bias", GATED) == (40,)
    assert find_parameter_shape(layer + "mlp.output_bias", GATED) == (12,)
    assert find_parameter_shape("time_embedding.weight", GIDD) == (12, 64)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.4.mlp.linear_fc1.weight",
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "mlp.linear_fc1.weight",
        "decoder.layers.0.output_layer.weight",
    ],
)
def test_a_parameter_that_the_model_does_not_have_is_refused(name):
    with pytest.raises(KeyError):
        find_parameter_shape(name, PLAIN)


def test_every_stage_holds_its_layers_and_the_ends_what_belongs_there():
    stages = [find_stage(name, 4, 2) for name in list_parameter_names(PLAIN)]
    assert stages == sorted(stages)
    assert stages.count(0) == 1 + 2 * 6
    assert find_stage("decoder.final_layernorm.weight", 4, 2) == 1
    assert find_stage("time_embedding.weight", 4, 2) == 0


def test_weight_decay_is_for_matrices_and_norms_begin_at_one():
    for row in PARAMETERS:
        assert row.decays == (len(row.shape(FULL)) > 1 and "sink" not in row.name)
        assert ("norm" in row.name) == (row.initial == 1.0)
    assert find_parameter("decoder.layers.2.self_attention.linear_qkv.bias").initial == 0.0


@pytest.mark.parametrize(
    "model", [PLAIN, FULL, GIDD, GATED], ids=["plain", "full", "gidd", "gated"]
)
@pytest.mark.parametrize("format_name", ["hf", "smdm", "llada", "gidd"])
def test_no_two_parameters_of_a_model_share_a_name_in_a_format(format_name, model):
    rows = [row for row in list_parameters(model) if format_name in row.names]
    names = [name for row in rows for name in row.list_external_names(format_name, 1)]
    assert len(set(names)) == len(names)


def test_names_of_matrices_that_a_format_keeps_apart():
    row = find_parameter("decoder.layers.5.mlp.linear_fc1.weight")
    assert row.list_external_names("hf", 5) == [
        "model.layers.5.mlp.gate_proj.weight",
        "model.layers.5.mlp.up_proj.weight",
    ]
    assert len(row.runs(PLAIN)) == 2
