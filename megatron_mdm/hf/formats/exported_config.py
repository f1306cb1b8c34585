"""The config.json of our own exports: the one place where a model's sizes change their names.

`MdmConfig`, which travels with every export and knows nothing of this package, has transformers'
names for them.
"""

from __future__ import annotations

from typing import Any, get_args

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.config.objective import RunWay, RunWays
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.diffusion.interpolation import describe_noise, read_noise
from megatron_mdm.hf.formats.config_fields import (
    ConfigFields,
    Described,
    Source,
    build_model_config,
    list_vocabulary_fields,
)

MODEL_TYPE = "megatron_mdm"


def list_exported_sizes(saved: SavedModel) -> dict[str, Any]:
    """The fields of config.json that say what a model is.

    Args:
        saved: The model.

    Returns:
        Names and values, in the order of the file.
    """
    model = saved.model
    return {
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.vocabulary_rows,
        "mask_token_id": model.mask_id,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_width,
        "intermediate_size": model.ffn_hidden_size,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "max_position_embeddings": saved.seq_length,
        "tie_word_embeddings": model.tie_embeddings,
        "is_causal": saved.is_causal,
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "attention_soft_cap": model.attention_soft_cap,
        "attention_sink": model.attention_sink,
        "mlp": model.mlp,
        "mlp_bias": model.mlp_bias,
        "time_embedding": model.time_embedding,
        **({} if saved.noise is None else {"noise": describe_noise(saved.noise)}),
        **_describe_ways(saved.run_ways),
    }


def read_exported(fields: ConfigFields, vocab_padding_multiple: int = 128) -> SavedModel:
    """Reads those fields.

    Args:
        fields: Of the file.
        vocab_padding_multiple: Rows of the vocabulary are padded to a multiple of this.

    Returns:
        The model.

    Raises:
        ConversionError: A field is missing or not valid.
    """
    vocab_size = fields.read("vocab_size", int)
    model = build_model_config(
        fields.path,
        # Exports from before this field have no row that no token uses.
        **list_vocabulary_fields(vocab_size, fields.get("padded_vocab_size") or vocab_size),
        mask_token_id=fields.read("mask_token_id", int),
        hidden_size=fields.read("hidden_size", int),
        num_layers=fields.read("num_hidden_layers", int),
        num_attention_heads=fields.read("num_attention_heads", int),
        num_query_groups=fields.read("num_key_value_heads", int),
        head_dim=fields.read("head_dim", int),
        ffn_hidden_size=fields.read("intermediate_size", int),
        norm_epsilon=fields.read("rms_norm_eps", float),
        rotary_base=fields.read("rope_theta", float),
        tie_embeddings=fields.read("tie_word_embeddings", bool),
        # Exports from before these fields have none of them.
        qkv_bias=bool(fields.get("qkv_bias")),
        qk_norm=fields.get("qk_norm") or False,
        attention_soft_cap=fields.get("attention_soft_cap"),
        attention_sink=bool(fields.get("attention_sink")),
        mlp=fields.get("mlp") or "swiglu",
        mlp_bias=bool(fields.get("mlp_bias")),
        time_embedding=bool(fields.get("time_embedding")),
        vocab_padding_multiple=vocab_padding_multiple,
    )
    is_causal = fields.read("is_causal", bool)
    seq_length = fields.read("max_position_embeddings", int)
    described = fields.get("noise")
    try:
        noise = None if described is None else read_noise(described)
    except ValueError as error:
        raise ConversionError(f"{fields.path}: noise={error}") from None
    return SavedModel(
        model, "ar" if is_causal else "mdm", seq_length, noise, _read_ways(fields, is_causal)
    )


def _describe_ways(run_ways: RunWays | None) -> dict[str, Any]:
    if run_ways is None:
        return {}
    return {"run_ways": list(run_ways.ways), "is_shifted": run_ways.is_shifted}


def _read_ways(fields: ConfigFields, is_causal: bool) -> RunWays | None:
    ways = fields.get("run_ways")
    if ways is None:
        return None
    usual = "ar" if is_causal else "mdm"
    if not isinstance(ways, list) or usual not in ways or not set(ways) <= {*get_args(RunWay)}:
        raise ConversionError(
            f"{fields.path}: run_ways={ways} lists no ways to run a model that runs as {usual}: "
            "export the checkpoint again."
        )
    # The usual one first, whatever it was when the model was exported.
    ordered: list[RunWay] = sorted(ways, key=lambda way: way != usual)
    return RunWays((*ordered,), bool(fields.get("is_shifted")))


def describe_export(source: Source) -> Described:
    """Reads the config.json of an export.

    Args:
        source: Its files.

    Returns:
        The model.

    Raises:
        ConversionError: The file is missing or bad.
    """
    fields = ConfigFields(source.config_path)
    fields.expect({"model_type": MODEL_TYPE}, "choose the format that it names")
    # A vocabulary that transformers resized leaves ids out in its middle, which ours cannot.
    remedy = "read the export whose vocabulary was not resized"
    fields.expect({"unused_token_ids": None}, remedy)
    saved = read_exported(fields, source.vocab_padding_multiple)
    return Described(saved, fields.get("eos_token_id"))
