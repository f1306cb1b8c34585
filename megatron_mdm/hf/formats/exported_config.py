"""The config.json of our own exports: the one place where a model's sizes change their names.

`MdmConfig`, which travels with every export and knows nothing of this package, has transformers'
names for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.hf.formats.config_fields import (
    Described,
    Source,
    build_model_config,
    expect,
    read_field,
    vocabulary_fields,
)
from megatron_mdm.hf.formats.tensor_files import read_json

MODEL_TYPE = "megatron_mdm"


def exported_sizes(saved: SavedModel) -> dict[str, Any]:
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
    }


def read_exported(
    path: Path, tree: Mapping[str, Any], vocab_padding_multiple: int = 128
) -> SavedModel:
    """Reads those fields.

    Args:
        path: The file, for messages.
        tree: Its fields.
        vocab_padding_multiple: Rows of the vocabulary are padded to a multiple of this.

    Returns:
        The model.

    Raises:
        ConversionError: A field is missing or not valid.
    """
    vocab_size = read_field(path, tree, "vocab_size", int)
    model = build_model_config(
        path,
        # Exports from before this field have no row that no token uses.
        **vocabulary_fields(vocab_size, tree.get("padded_vocab_size") or vocab_size),
        mask_token_id=read_field(path, tree, "mask_token_id", int),
        hidden_size=read_field(path, tree, "hidden_size", int),
        num_layers=read_field(path, tree, "num_hidden_layers", int),
        num_attention_heads=read_field(path, tree, "num_attention_heads", int),
        num_query_groups=read_field(path, tree, "num_key_value_heads", int),
        head_dim=read_field(path, tree, "head_dim", int),
        ffn_hidden_size=read_field(path, tree, "intermediate_size", int),
        norm_epsilon=read_field(path, tree, "rms_norm_eps", float),
        rotary_base=read_field(path, tree, "rope_theta", float),
        tie_embeddings=read_field(path, tree, "tie_word_embeddings", bool),
        # Exports from before these fields have neither.
        qkv_bias=bool(tree.get("qkv_bias")),
        qk_norm=bool(tree.get("qk_norm")),
        vocab_padding_multiple=vocab_padding_multiple,
    )
    is_causal = read_field(path, tree, "is_causal", bool)
    seq_length = read_field(path, tree, "max_position_embeddings", int)
    return SavedModel(model, "ar" if is_causal else "mdm", seq_length)


def describe_export(source: Source) -> Described:
    """Reads the config.json of an export.

    Args:
        source: Its files.

    Returns:
        The model.

    Raises:
        ConversionError: The file is missing or bad.
    """
    path = source.config_path
    tree = read_json(path)
    expect(path, tree, {"model_type": MODEL_TYPE}, "choose the format that it names")
    # A vocabulary that transformers resized leaves ids out in its middle, which ours cannot.
    remedy = "read the export whose vocabulary was not resized"
    expect(path, tree, {"unused_token_ids": None}, remedy)
    saved = read_exported(path, tree, source.vocab_padding_multiple)
    return Described(saved, tree.get("eos_token_id"))
