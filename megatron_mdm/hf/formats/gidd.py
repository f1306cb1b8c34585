"""The published models of *Scaling Behavior of Discrete Diffusion Language Models*.

Their matrices are used times a constant, and their norms' weights are 1 and what is stored: here
both are made part of the weights, which computes the same.

Source: arXiv 2512.10858, and the code that was published with it.
"""

from __future__ import annotations

from typing import Any

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.config import ModelConfig
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.diffusion.interpolation import ShiftedNoise
from megatron_mdm.hf.formats.config_fields import (
    ConfigFields,
    Described,
    Fold,
    Source,
    build_model_config,
)
from megatron_mdm.model.parameters import OUTPUT_LAYER, list_parameters

# What a configuration means that leaves a field out.
_DEFAULTS: dict[str, Any] = {
    "attn_soft_cap": 30.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "resid_scale": 4.0,
    "weight_scaling": "fan_in",
    "head_scaling": 1.0,
    "use_qk_norm": True,
    "attention_bias": False,
    "mlp_bias": False,
    "noise_type": 0.0,
    # No file of theirs says so but the code.
    "mask_token_id": 3,
}
# Beyond it a sigmoid is 0 or 1.
_GREATEST_SHIFT = 1000.0
_LEAST_NOISE = 1e-4


def describe_gidd(source: Source) -> Described:
    """Reads the config.json of such a model.

    Args:
        source: Its files.

    Returns:
        The model. The mask token is one of the rows of its vocabulary.

    Raises:
        ConversionError: The file is missing or bad, or the model has what ours cannot express.
    """
    found = ConfigFields(source.config_path)
    found.expect({"model_type": "gidd"}, "choose the format that it names")
    fields = ConfigFields(source.config_path, {**_DEFAULTS, **found.tree})
    for name, value in {"is_causal": False, "tie_word_embeddings": False}.items():
        if fields.get(name):
            fields.expect({name: value}, "the published models have no such one, so choose another")
    absent = {"rope_scaling": None, "quantization_config": None}
    fields.expect(absent, "our model cannot express it, so choose another model")
    width, num_heads = fields.read("hidden_size", int), fields.read("num_attention_heads", int)
    if fields.get("head_dim"):
        fields.expect({"head_dim": width // num_heads}, "heads have to fill the width")
    vocab_size, mask_id = fields.read("vocab_size", int), fields.read("mask_token_id", int)
    if mask_id >= vocab_size:
        raise ConversionError(
            f"{fields.path} has mask_token_id={mask_id}, and vocab_size={vocab_size}: give the id "
            "of the mask token, which is one of its vocabulary."
        )
    model = build_model_config(
        fields.path,
        num_layers=fields.read("num_hidden_layers", int),
        hidden_size=width,
        num_attention_heads=num_heads,
        ffn_hidden_size=fields.read("intermediate_size", int),
        vocab_size=vocab_size,
        mask_token_id=mask_id,
        rotary_base=fields.read("rope_theta", float),
        norm_epsilon=fields.read("rms_norm_eps", float),
        qk_norm="width" if fields.read("use_qk_norm", bool) else False,
        attention_soft_cap=fields.read("attn_soft_cap", float),
        attention_sink=fields.read("attention_bias", bool),
        mlp="relu2",
        mlp_bias=fields.read("mlp_bias", bool),
        vocab_padding_multiple=source.vocab_padding_multiple,
    )
    seq_length = fields.read("max_position_embeddings", int)
    saved = SavedModel(model, "mdm", seq_length, _read_noise(fields, model))
    return Described(saved, fields.get("eos_token_id"), _list_folds(fields, saved))


def find_gidd_misfit(saved: SavedModel) -> str | None:
    """Why a model cannot have these names; None if it can."""
    model = saved.model
    facts = {
        "autoregressive attention": saved.is_causal,
        f"mlp={model.mlp}": model.mlp != "relu2",
        f"qk_norm={model.qk_norm}": model.qk_norm is True,
        f"qkv_bias={model.qkv_bias}": model.qkv_bias,
        f"time_embedding={model.time_embedding}": model.time_embedding,
        f"tie_embeddings={model.tie_embeddings}": model.tie_embeddings,
        "attention_soft_cap=None": model.attention_soft_cap is None,
        f"num_query_groups={model.query_groups}": model.query_groups != model.num_attention_heads,
        f"head_dim={model.head_dim}": model.head_width * model.num_attention_heads
        != model.hidden_size,
        f"mask_token_id={model.mask_id} outside the vocabulary": model.mask_id >= model.vocab_size,
        f"padded_vocab_size={model.padded_vocab_size}": model.vocabulary_rows != model.vocab_size,
    }
    return next((text for text, is_so in facts.items() if is_so), None)


def _read_noise(fields: ConfigFields, model: ModelConfig) -> ShiftedNoise | None:
    """The noise of its training; None where it is masks alone."""
    stated = fields.read("noise_type", float)
    shift = min(max(stated, -_GREATEST_SHIFT), _GREATEST_SHIFT)
    noise = ShiftedNoise(model.num_text_tokens, shift)
    # The share of uniform noise is greatest where there is little noise.
    return noise if noise.at(_LEAST_NOISE).uniform > 0 else None


def _list_folds(fields: ConfigFields, saved: SavedModel) -> dict[str, Fold]:
    """What becomes of the stored numbers, by the name of the parameter's row."""
    model = saved.model
    residual = fields.read("resid_scale", float) / model.num_layers
    folds = {}
    for row in list_parameters(model):
        if row.initial == 1.0:
            folds[row.name] = Fold(offset=1.0)
        elif row.role == "hidden":
            num_out, num_in = row.shape(model)
            # Queries, keys and values are three square matrices there.
            num_out = min(num_out, model.hidden_size) if "linear_qkv" in row.name else num_out
            folds[row.name] = Fold(_read_scale(fields, "weight_scaling", num_in, num_out))
    for name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
        folds[name] = Fold(folds[name].scale * residual)
    folds["mlp.output_bias"] = Fold(residual)
    scale = _read_scale(fields, "head_scaling", model.hidden_size, model.vocab_size)
    folds[OUTPUT_LAYER] = Fold(scale)
    return folds


def _read_scale(fields: ConfigFields, name: str, num_in: int, num_out: int) -> float:
    fans = {"fan_in": num_in, "fan_out": num_out}
    stated = fields.get(name)
    if stated in fans:
        return float(fans[stated] ** -0.5)
    return float(fields.read(name, float))
