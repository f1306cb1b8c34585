from __future__ import annotations

import json
import shutil

import pytest
import torch
from foreign_folders import CLASSES, edit, save_autoregressive, save_llada
from safetensors.torch import load_file, save_file

from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.formats.foreign import open_foreign

V4 = {"rope_parameters": ..., "rope_theta": 5000.0}


@pytest.mark.parametrize(
    ("format_name", "changes", "message"),
    [
        ("llama", {"model_type": "mistral"}, "model_type='mistral'"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("llama", {"hidden_size": "wide"}, "hidden_size"),
        ("llama", {"num_key_value_heads": 3}, "num_query_groups=3 does not divide"),
        ("llama", {"vocab_size": 0}, "vocab_size"),
        ("llama", V4 | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ("llama", V4 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rope_type='yarn'",
        ),
        (
            "qwen2",
            {
                "layer_types": ...,
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            },
            "sliding_attention=True",
        ),
    ],
)
def test_what_our_model_cannot_express_is_refused_by_name(tmp_path, format_name, changes, message):
    save_autoregressive(tmp_path, format_name)
    edit(tmp_path, **changes)
    with pytest.raises(ConversionError, match=message):
        open_foreign(format_name, tmp_path)


@pytest.mark.parametrize("format_name", list(CLASSES))
def test_config_files_of_the_older_transformers_mean_the_same(tmp_path, format_name):
    save_autoregressive(tmp_path, format_name, tie_word_embeddings=True)
    now = open_foreign(format_name, tmp_path).saved.model
    # Version 4 wrote the base at the top, and a sliding window that nothing used.
    edit(tmp_path, **V4, rope_scaling=None, sliding_window=8, use_sliding_window=False)
    assert open_foreign(format_name, tmp_path).saved.model == now
    assert now.rotary_base == 5000.0
    edit(tmp_path, eos_token_id=[7, 8])
    assert open_foreign(format_name, tmp_path).eos_token_id == 7


@pytest.mark.parametrize(
    "changes",
    [
        {"block_type": "sequential"},
        {"activation_type": "swiglu"},
        {"layer_norm_type": "default"},
        {"rope": False},
        {"alibi": True},
        {"attention_layer_norm": True},
        {"bias_for_layer_norm": True},
        {"include_bias": True},
        {"input_emb_norm": True},
        {"scale_logits": True},
        {"model_type": "olmo"},
        {"mask_token_id": None},
        {"d_model": 24.0},
        {"n_layers": True},
    ],
    ids=str,
)
def test_a_llada_model_that_ours_cannot_be_is_refused_by_name(tmp_path, changes):
    save_llada(tmp_path)
    edit(tmp_path, **changes)
    ((field, value),) = changes.items()
    with pytest.raises(ConversionError, match=f"{field}={value!r}"):
        open_foreign("llada", tmp_path)


def test_missing_extra_and_wrong_tensors_are_named_in_one_sentence(tmp_path):
    save_autoregressive(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(6)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.ones(24, 41)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError) as error:
        open_foreign("llama", tmp_path)
    message = str(error.value)
    assert "lacks model.layers.1.mlp.up_proj.weight (2 such in all)" in message
    assert "has the extra model.layers.0.self_attn.q_norm.weight" in message
    assert "model.layers.0.mlp.down_proj.weight in the shape [24, 41]" in message
    assert "where [24, 40] is expected" in message
    assert "\n" not in message


def test_tensors_that_say_nothing_new_are_allowed(tmp_path):
    save_autoregressive(tmp_path, "llama", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert "output_layer.weight" not in open_foreign("llama", tmp_path).list_names()
    tensors["lm_head.weight"][20, 23] += 1e-6
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"holds lm_head.weight other than model.embed_tok"):
        open_foreign("llama", tmp_path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:5].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"holds lm_head.weight other than model.embed_tok"):
        open_foreign("llama", tmp_path)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"lacks model.embed_tokens.weight"):
        open_foreign("llama", tmp_path)


def test_bad_files_are_refused_with_a_remedy(tmp_path):
    save_autoregressive(tmp_path / "a", "llama", shard_size="8KB")
    index = tmp_path / "a" / "model.safetensors.index.json"
    shards = sorted((tmp_path / "a").glob("model-*.safetensors"))
    with pytest.raises(ConversionError, match="nowhere does not exist: download"):
        open_foreign("llama", tmp_path / "nowhere")
    with pytest.raises(ConversionError, match="lacks model"):
        open_foreign("llama", shards[0])
    shutil.copy(shards[0], tmp_path / "copy")
    tree = json.loads(index.read_text())
    name = next(iter(load_file(shards[0])))

    def with_map(**changes):
        index.write_text(json.dumps({"weight_map": tree["weight_map"] | changes}))
        return pytest.raises(ConversionError)

    with with_map(**{name: "../copy"}) as error:
        open_foreign("llama", tmp_path / "a")
    assert "names ../copy, which is not in the folder" in str(error.value)
    with with_map(**{name: "gone.safetensors"}) as error:
        open_foreign("llama", tmp_path / "a")
    assert "names gone.safetensors, which is not in the folder" in str(error.value)
    shutil.copy(shards[0], tmp_path / "a" / "twice.safetensors")
    with with_map(other="twice.safetensors") as error:
        open_foreign("llama", tmp_path / "a")
    assert "holds " in str(error.value)
    assert "and so does" in str(error.value)
    index.write_text(json.dumps(tree))
    shards[0].write_bytes(shards[0].read_bytes()[:-10])
    with pytest.raises(ConversionError, match=r"is damaged .*: fetch it again"):
        open_foreign("llama", tmp_path / "a")
    index.write_text("{")
    with pytest.raises(ConversionError, match=r"index.json is no JSON"):
        open_foreign("llama", tmp_path / "a")


def test_pickles_and_quantised_weights_are_refused(tmp_path):
    save_autoregressive(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"holds model.norm.weight as I8"):
        open_foreign("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(
            ConversionError, match=r"pytorch_model.bin is no .safetensors.*save the model as"
        ):
            open_foreign("llama", path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ConversionError, match=r"neither model.safetensors nor"):
        open_foreign("llama", tmp_path)


def test_options_belong_to_their_formats(tmp_path):
    for options, message in (
        ({"preset": "smdm-6M"}, "preset=smdm-6M"),
        ({"keep_causal": True}, "keep_causal=True belongs to the formats llama, qwen2, qwen3"),
    ):
        with pytest.raises(ConversionError, match=message):
            open_foreign("llada", tmp_path, **options)
    with pytest.raises(ConversionError, match="format 'pt' does not exist"):
        open_foreign("pt", tmp_path)


def test_an_export_whose_resized_vocabulary_leaves_ids_out_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = {"model_type": "megatron_mdm", "unused_token_ids": [19, 24]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"unused_token_ids=\[19, 24\] where None is needed"):
        open_foreign("hf", tmp_path)
