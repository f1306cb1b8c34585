"""Recognises published models by their config.json or by the shapes of their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.config import expand_preset, list_presets
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.corpus.tokenizer import read_end_and_size
from megatron_mdm.hf.formats.config_fields import (
    ConfigFields,
    Described,
    Source,
    build_model_config,
    list_vocabulary_fields,
)

Shapes = Mapping[str, tuple[int, ...]]

# Autoregressive models of transformers, which a masked-diffusion model can start from.
AUTOREGRESSIVE: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}

# The published SMDM models: no file of theirs says so.
_SMDM_SEQ_LENGTH = 2048


def describe_autoregressive(source: Source) -> Described:
    """Reads the config.json of a model of transformers, of version 4 or 5.

    Args:
        source: Its files, of the format `llama`, `qwen2` or `qwen3`.

    Returns:
        The model, with a mask token after the rows of its vocabulary.

    Raises:
        ConversionError: The file is missing or bad, or the model has what ours cannot express.
    """
    path, format_name = source.config_path, source.format_name
    fields = ConfigFields(path)
    fields.expect({"model_type": format_name}, "choose the format that it names")
    try:
        # The class knows the defaults, and fields as older versions wrote them.
        config = AUTOREGRESSIVE[format_name].from_pretrained(source.files.folder)
    except StrictDataclassError as error:
        cause = str(error).splitlines()[-1].strip()
        raise ConversionError(f"{path} is not valid ({cause}): correct it.") from None
    _refuse_inexpressible(fields, config)
    model = build_model_config(
        path,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        ffn_hidden_size=config.intermediate_size,
        **_read_vocabulary(source, config.vocab_size, config.vocab_size),
        tie_embeddings=config.tie_word_embeddings,
        rotary_base=config.rope_parameters["rope_theta"],
        norm_epsilon=config.rms_norm_eps,
        qkv_bias=format_name == "qwen2",
        qk_norm=format_name == "qwen3",
        vocab_padding_multiple=source.vocab_padding_multiple,
    )
    kind: Literal["mdm", "ar"] = "ar" if source.keep_causal else "mdm"
    ends = config.eos_token_id
    if isinstance(ends, list):
        # Chat models may end in several ways; the first is the document's end.
        ends = ends[0] if ends else None
    return Described(SavedModel(model, kind, config.max_position_embeddings), ends)


def describe_llada(source: Source) -> Described:
    """Reads the config.json of a LLaDA model.

    Args:
        source: Its files.

    Returns:
        The model. The mask token is one of the rows of its vocabulary.

    Raises:
        ConversionError: The file is missing or bad, or the model has what ours cannot express.
    """
    fields = ConfigFields(source.config_path)
    fields.expect({"model_type": "llada"}, "choose the format that it names")
    expected = {
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rope": True,
    }
    fields.expect(expected, "our model cannot express it, so choose another model")
    absent = ("alibi", "attention_layer_norm", "bias_for_layer_norm", "include_bias")
    for field in (*absent, "input_emb_norm", "scale_logits"):
        if fields.get(field):
            fields.expect({field: False}, "our model cannot express it")
    num_heads = fields.read("n_heads", int)
    width = fields.read("d_model", int)
    inner = fields.get("mlp_hidden_size") or fields.read("mlp_ratio", int) * width
    stated_size = fields.read("vocab_size", int)
    rows = max(stated_size, fields.get("embedding_size") or 0)
    model = build_model_config(
        fields.path,
        num_layers=fields.read("n_layers", int),
        hidden_size=width,
        num_attention_heads=num_heads,
        num_query_groups=fields.get("n_kv_heads")
        or (1 if fields.get("multi_query_attention") else num_heads),
        ffn_hidden_size=inner,
        **_read_vocabulary(source, rows, stated_size),
        mask_token_id=fields.read("mask_token_id", int),
        tie_embeddings=fields.read("weight_tying", bool),
        rotary_base=fields.read("rope_theta", float),
        norm_epsilon=fields.read("rms_norm_eps", float),
        qkv_bias=bool(fields.get("include_qkv_bias")),
        vocab_padding_multiple=source.vocab_padding_multiple,
    )
    seq_length = fields.read("max_sequence_length", int)
    return Described(SavedModel(model, "mdm", seq_length), fields.get("eos_token_id"))


def describe_smdm(source: Source) -> Described:
    """Recognises a published SMDM model, which comes without a config.json, by its shapes.

    Args:
        source: Its file. Without a preset its sizes are those of the one model of the family with
            so many layers of this width.

    Returns:
        The model.

    Raises:
        ConversionError: The tensors are not those of such a model, or no preset fits, or several.
    """
    path, shapes = source.path, source.files.list_shapes()
    embedding_rows, width = _find_matrix_shape(path, shapes, "transformer.wte.weight")
    vocab_size, _ = _find_matrix_shape(path, shapes, "lm_head.weight")
    ffn, _ = _find_matrix_shape(path, shapes, "transformer.h.0.mlp.swiglu.w1.weight")
    if embedding_rows not in (vocab_size, vocab_size + 1):
        raise ConversionError(
            f"{path} has {embedding_rows} rows in transformer.wte.weight and {vocab_size} in "
            "lm_head.weight, where an AR model has as many and a masked-diffusion model one more: "
            "give another file."
        )
    layers = {match[1] for name in shapes if (match := re.match(r"transformer\.h\.(\d+)\.", name))}
    fields = expand_preset(_find_smdm_preset(path, source.preset, len(layers), width))
    sizes = {"num_layers": len(layers), "hidden_size": width, "ffn_hidden_size": ffn}
    for field, found in sizes.items():
        if fields[field] != found:
            raise ConversionError(
                f"{path} has {field}={found} where the preset says {fields[field]}: give --preset "
                "the name of the sizes that it was trained with."
            )
    model = build_model_config(
        path,
        **sizes,
        num_attention_heads=fields["num_attention_heads"],
        head_dim=fields.get("head_dim"),
        vocab_size=vocab_size,
        vocab_padding_multiple=source.vocab_padding_multiple,
    )
    kind: Literal["mdm", "ar"] = "ar" if embedding_rows == vocab_size else "mdm"
    return Described(SavedModel(model, kind, _SMDM_SEQ_LENGTH), None)


def _find_smdm_preset(path: Path, preset: str | None, num_layers: int, width: int) -> str:
    if preset is not None:
        if preset not in list_presets():
            raise ConversionError(
                f"The preset {preset!r} does not exist: choose one like {list_presets()[0]}."
            )
        return preset
    family = [name for name in list_presets() if name.startswith("smdm-")]
    sizes = {name: expand_preset(name) for name in family}
    found = [
        name
        for name in family
        if (sizes[name]["num_layers"], sizes[name]["hidden_size"]) == (num_layers, width)
    ]
    if len(found) != 1:
        raise ConversionError(
            f"{path} has {num_layers} layers of width {width}, which {len(found)} models of the "
            "published family have: give --preset the name of the one whose number of heads it has."
        )
    return found[0]


def _read_vocabulary(source: Source, rows: int, stated_size: int) -> dict[str, int]:
    """Reads how many of a model's rows stand for tokens, as fields of its configuration.

    Args:
        source: Its files, of which tokenizer.json may be one, and the ids that the user asks for.
        rows: Rows of its vocabulary.
        stated_size: Ids that its config.json speaks of.
    """
    folder, asked = source.files.folder, source.vocab_size
    tokenizer = folder / "tokenizer.json"
    size = read_end_and_size(tokenizer)[1] if tokenizer.is_file() else None
    least = min(size or 1, rows)
    if asked is not None and not least <= asked <= rows:
        raise ConversionError(
            f"--vocab-size={asked} is not in [{least}, {rows}], from the tokens of {folder} to "
            "the rows of its vocabulary: give a number of these, or leave it out."
        )
    if asked is None and size is not None and size > rows:
        raise ConversionError(
            f"{tokenizer} has {size} tokens, more than the {rows} rows of the vocabulary: give the "
            f"model its own tokenizer, or --vocab-size={rows} to do without the others."
        )
    return list_vocabulary_fields(asked or size or stated_size, rows)


def _refuse_inexpressible(fields: ConfigFields, config: PretrainedConfig) -> None:
    rope = dict(config.rope_parameters)
    facts = {
        "rope_type": rope.get("rope_type"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "hidden_act": config.hidden_act,
        "sliding_attention": _slides(config),
        "quantization_config": fields.get("quantization_config"),
    }
    expected = {
        "rope_type": "default",
        "partial_rotary_factor": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "sliding_attention": False,
        "quantization_config": None,
    }
    remedy = "our model cannot express it, so choose another model"
    ConfigFields(fields.path, facts).expect(expected, remedy)


def _slides(config: PretrainedConfig) -> bool:
    layer_types = getattr(config, "layer_types", None) or []
    return any(layer_type != "full_attention" for layer_type in layer_types)


def _find_matrix_shape(path: Path, shapes: Shapes, name: str) -> tuple[int, int]:
    shape = shapes.get(name)
    if shape is None or len(shape) != 2:
        raise ConversionError(
            f"{path} has no matrix {name}, which every SMDM model has: choose another format."
        )
    return shape[0], shape[1]
