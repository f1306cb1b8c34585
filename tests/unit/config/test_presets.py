from __future__ import annotations

import math

import pytest

from megatron_mdm.config import ModelConfig, expand_preset, list_presets, parse_config
from megatron_mdm.core.errors import ConfigError

# Head widths of the data-constrained family where they are not 128: (largest model, width).
NARROW_HEADS = ((35, 32), (306, 64))


def tree_of(**model):
    return {
        "run": {"dir": "r"},
        "model": model,
        "data": {"train": [{"path": "a"}]},
        "batch": {"global_batch_size": 1},
        "schedule": {"steps": 1},
    }


def in_millions(name: str) -> int:
    return int(name.split("-")[1].removesuffix("M"))


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_builds(name):
    model = parse_config(tree_of(preset=name)).model
    width = model.head_width * model.num_attention_heads
    assert width == (224 if name == "dc-20M" else model.hidden_size)
    assert model.query_groups == model.num_attention_heads
    assert model.embedding_rows % 128 == model.head_rows % 128 == 0


def test_both_families_are_complete_and_in_order():
    for family, count in (("smdm", 30), ("dc", 54)):
        sizes = [in_millions(name) for name in list_presets() if name.startswith(f"{family}-")]
        assert len(sizes) == count
        assert sizes == sorted(set(sizes))


def test_a_given_field_wins_over_the_preset_and_null_does_not():
    model = ModelConfig(preset="smdm-170M", num_layers=3, vocab_size=None)
    assert (model.num_layers, model.hidden_size, model.vocab_size) == (3, 768, 32000)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("smdm-171M", "smdm-170M, smdm-180M, smdm-142M"),
        ("smdm170M", "smdm-170M, smdm-180M, smdm-142M"),
        ("dc-424M", "dc-425M, dc-489M, dc-509M"),
        ("dc-1.6B", "dc-1593M, dc-1609M, dc-1731M"),
        ("170M", "smdm-170M, dc-175M, dc-163M"),
    ],
)
def test_an_unknown_preset_names_the_nearest(name, near):
    with pytest.raises(ConfigError) as caught:
        parse_config(tree_of(preset=name))
    assert str(caught.value) == f"model.preset={name} does not exist: the nearest are {near}."


def test_a_preset_name_without_a_size_names_some_that_exist():
    with pytest.raises(ConfigError, match=r"the nearest are (smdm|dc)-\d+M, "):
        parse_config(tree_of(preset="smdm"))


def test_fields_of_an_unknown_preset_are_a_key_error():
    for name in ("dc-170M", "170M", "other-170M"):
        with pytest.raises(KeyError):
            expand_preset(name)


def test_the_smdm_family_follows_the_paper():
    model = ModelConfig(preset="smdm-1028M")
    assert (model.num_layers, model.num_attention_heads, model.hidden_size) == (20, 14, 1792)
    assert (model.ffn_hidden_size, model.vocab_size, model.tie_embeddings) == (7168, 32000, False)
    assert (model.hidden_dropout, model.attention_dropout) == (0.0, 0.0)
    assert model.weight_std == pytest.approx(0.0149403576, abs=1e-9)  # sqrt(2 / 8960)
    assert model.output_weight_std == pytest.approx(0.0011811391, abs=1e-9)  # 1 / (42.332 * 20)
    assert ModelConfig(preset="smdm-75M").ffn_hidden_size == 1600


def test_the_data_constrained_family_follows_the_paper():
    model = ModelConfig(preset="dc-425M")
    assert (model.num_layers, model.num_attention_heads, model.hidden_size) == (18, 10, 1280)
    assert (model.head_width, model.ffn_hidden_size) == (128, 3392)  # 53 blocks of 64
    assert (model.vocab_size, model.tie_embeddings) == (50257, True)
    assert (model.hidden_dropout, model.attention_dropout) == (0.1, 0.1)
    assert model.weight_std == 0.02
    assert model.output_weight_std == pytest.approx(0.02 / 6)
    for name in (name for name in list_presets() if name.startswith("dc-")):
        model = ModelConfig(preset=name)
        assert model.ffn_hidden_size == math.floor(8 * model.hidden_size / 3 / 64) * 64


def test_defaults_of_the_initial_weights_are_those_of_the_smdm_family():
    fields = expand_preset("smdm-170M")
    given = {key: value for key, value in fields.items() if not key.endswith("init_std")}
    model = ModelConfig(**given)
    assert model.weight_std == fields["init_std"]
    assert model.output_weight_std == fields["output_init_std"]


def test_data_constrained_names_count_the_models_of_chinchilla():
    # From 44M on the names are those of arXiv 2203.15556, table A9, whose models have a fifth
    # attention projection (relative positions), two matrices of width 4d, and 32,000 rows.
    for name in (name for name in list_presets() if name.startswith("dc-")):
        size, model = in_millions(name), ModelConfig(preset=name)
        if size < 44:
            continue
        width = next((head for limit, head in NARROW_HEADS if size <= limit), 128)
        attention = 5 * model.hidden_size * model.num_attention_heads * width
        layer = attention + 8 * model.hidden_size**2
        named = model.num_layers * layer + 32_000 * model.hidden_size
        assert named / 1e6 == pytest.approx(size, rel=0.02), name
