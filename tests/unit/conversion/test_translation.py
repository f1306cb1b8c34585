from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.config import ModelConfig
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.formats.translation import (
    from_format,
    list_external_shapes,
    to_format,
)
from megatron_mdm.model.parameters import find_parameter_shape, list_parameter_names


@st.composite
def saved_models(draw) -> SavedModel:
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    vocab = draw(st.integers(2, 9))
    mask = draw(st.integers(0, vocab))
    model = ModelConfig(
        num_layers=draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 8)),
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        head_dim=2 * draw(st.integers(1, 3)),
        ffn_hidden_size=draw(st.integers(1, 9)),
        vocab_size=vocab,
        mask_token_id=mask,
        tie_embeddings=draw(st.booleans()),
        vocab_padding_multiple=draw(st.integers(1, 5)),
    )
    return SavedModel(model, draw(st.sampled_from(("mdm", "ar"))), 8)


def reader(tensors):
    """Reads rows of tensors by name."""
    return lambda name, start, stop: tensors[name][start:stop]


@settings(max_examples=40, deadline=None)
@given(saved_models())
def test_round_trip_restores_every_parameter_with_zero_padding(saved):
    generator = torch.Generator().manual_seed(0)
    for name in list_parameter_names(saved.model):
        tensor = torch.randn(find_parameter_shape(name, saved.model), generator=generator)
        if name.startswith("embedding."):
            tensor[max(saved.model.vocab_size, saved.model.mask_id + 1) :] = 0
        if name.startswith("output_layer."):
            tensor[saved.model.vocab_size :] = 0
        exported = dict(to_format("hf", name, tensor, saved))
        shapes = [(external, tuple(value.shape)) for external, value in exported.items()]
        assert shapes == list_external_shapes("hf", name, saved)
        assert torch.equal(from_format("hf", name, reader(exported), saved), tensor)


def test_names_are_those_of_the_model_and_unique(tiny):
    saved = tiny()
    rows = [list_external_shapes("hf", name, saved) for name in list_parameter_names(saved.model)]
    exported = [name for row in rows for name, _ in row]
    assert len(exported) == len(set(exported)) == 2 * 9 + 3
    assert exported[0] == "model.embed_tokens.weight"
    assert "model.layers.1.self_attn.k_proj.weight" in exported
    assert "model.layers.0.post_attention_layernorm.weight" in exported
    assert exported[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert "output_layer.weight" not in list_parameter_names(tiny(tie_embeddings=True).model)


def test_qkv_rows_are_grouped_per_query_group(tiny):
    saved = tiny(num_query_groups=2, head_dim=2)
    # Per group: two query heads, one key, one value, of two rows each.
    heads = ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    labels = [head for head in heads for _ in range(2)]
    codes = {label: float(i) for i, label in enumerate(sorted(set(labels)))}
    tensor = torch.tensor([codes[label] for label in labels])[:, None].expand(
        -1, saved.model.hidden_size
    )
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    query, key, value = (t[:, 0].tolist() for _, t in to_format("hf", name, tensor, saved))
    assert query == [codes[f"q{head}"] for head in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert key == [codes[f"k{group}"] for group in (0, 0, 1, 1)]
    assert value == [codes[f"v{group}"] for group in (0, 0, 1, 1)]


def test_fc1_is_gate_then_up(tiny):
    saved = tiny()
    tensor = torch.cat([torch.zeros(40, 24), torch.ones(40, 24)])
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    (gate_name, gate), (up_name, up) = to_format("hf", name, tensor, saved)
    assert (gate_name, up_name) == (
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    )
    assert not gate.any()
    assert up.all()


def test_mask_inside_the_vocabulary_adds_no_row(tiny):
    saved = tiny(mask_token_id=5)
    assert list_external_shapes("hf", "embedding.word_embeddings.weight", saved)[0][1] == (19, 24)
    assert list_external_shapes("hf", "embedding.word_embeddings.weight", tiny())[0][1] == (20, 24)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.2.input_layernorm.weight",
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "output_layer.weight",
    ],
)
def test_unknown_names_are_refused(tiny, name):
    with pytest.raises(ConversionError, match=f"{name} is not one of this model"):
        list_external_shapes("hf", name, tiny(tie_embeddings=True))


def test_a_wrong_shape_is_refused(tiny):
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    with pytest.raises(ConversionError, match=r"linear_fc2.weight has the shape \(3, 4\)"):
        to_format("hf", name, torch.zeros(3, 4), tiny())
