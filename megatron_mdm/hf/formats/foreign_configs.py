"""What a model of another format is, from its config.json or from its tensors' shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from megatron_mdm.config import ModelConfig, preset_fields, preset_names
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.corpus.tokenizer import end_and_size
from megatron_mdm.hf.formats.tensor_files import read_json

Shapes = Mapping[str, tuple[int, ...]]

# Autoregressive models of transformers, which a masked-diffusion model can start from.
AUTOREGRESSIVE: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}

# The published SMDM models: no file of theirs says so.
_SMDM_SEQ_LENGTH = 2048


@dataclass(frozen=True)
class Description:
    """A model of another format, in our terms.

    Attributes:
        model: Sizes; the mask token has the row after the vocabulary's where the source has none.
        kind: What it is trained for.
        seq_length: Longest sequence, in tokens.
        eos_token_id: Id that ends a document, if the source says.
    """

    model: ModelConfig
    kind: Literal["mdm", "ar"]
    seq_length: int
    eos_token_id: int | None


def describe_autoregressive(
    format_name: str,
    folder: Path,
    *,
    keep_causal: bool,
    vocab_padding_multiple: int,
    vocab_size: int | None = None,
) -> Description:
    """Reads the config.json of a model of transformers.

    Args:
        format_name: `llama`, `qwen2` or `qwen3`.
        folder: Where its config.json is; of transformers 4 or 5.
        keep_causal: It stays autoregressive; else it is to become a masked-diffusion model.
        vocab_padding_multiple: Rows of the vocabulary are padded to a multiple of this.
        vocab_size: Ids that it may predict; None: those of the tokenizer beside the file, or one
            for every row where there is none.

    Returns:
        The model, with a mask token after the rows of its vocabulary.

    Raises:
        ConversionError: The file is missing or bad, or the model has what ours cannot express.
    """
    path = folder / "config.json"
    tree = read_json(path)
    _expect(path, tree, {"model_type": format_name}, "choose the format that it names")
    try:
        # The class knows the defaults, and fields as older versions wrote them.
        config = AUTOREGRESSIVE[format_name].from_pretrained(folder)
    except StrictDataclassError as error:
        cause = str(error).splitlines()[-1].strip()
        raise ConversionError(f"{path} is not valid ({cause}): correct it.") from None
    _refuse_inexpressible(path, config, tree)
    model = _model_config(
        path,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        ffn_hidden_size=config.intermediate_size,
        **_vocabulary(folder, config.vocab_size, config.vocab_size, vocab_size),
        tie_embeddings=config.tie_word_embeddings,
        rotary_base=config.rope_parameters["rope_theta"],
        norm_epsilon=config.rms_norm_eps,
        qkv_bias=format_name == "qwen2",
        qk_norm=format_name == "qwen3",
        vocab_padding_multiple=vocab_padding_multiple,
    )
    ends = config.eos_token_id
    return Description(
        model,
        "ar" if keep_causal else "mdm",
        config.max_position_embeddings,
        # Chat models may end in several ways; the first is the document's end.
        (ends[0] if ends else None) if isinstance(ends, list) else ends,
    )


def describe_llada(
    folder: Path, *, vocab_padding_multiple: int, vocab_size: int | None = None
) -> Description:
    """Reads the config.json of a LLaDA model.

    Args:
        folder: Where it is.
        vocab_padding_multiple: Rows of the vocabulary are padded to a multiple of this.
        vocab_size: Ids that it may predict; None: those of the tokenizer beside the file, or of
            the file's `vocab_size` where there is none.

    Returns:
        The model. The mask token is one of the rows of its vocabulary.

    Raises:
        ConversionError: The file is missing or bad, or the model has what ours cannot express.
    """
    path = folder / "config.json"
    tree = read_json(path)
    _expect(path, tree, {"model_type": "llada"}, "choose the format that it names")
    expected = {
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rope": True,
    }
    _expect(path, tree, expected, "our model cannot express it, so choose another model")
    absent = ("alibi", "attention_layer_norm", "bias_for_layer_norm", "include_bias")
    for field in (*absent, "input_emb_norm", "scale_logits"):
        if tree.get(field):
            _expect(path, tree, {field: False}, "our model cannot express it")
    num_heads = _field(path, tree, "n_heads", int)
    width = _field(path, tree, "d_model", int)
    num_groups = tree.get("n_kv_heads") or (1 if tree.get("multi_query_attention") else num_heads)
    stated_size = _field(path, tree, "vocab_size", int)
    rows = max(stated_size, tree.get("embedding_size") or 0)
    model = _model_config(
        path,
        num_layers=_field(path, tree, "n_layers", int),
        hidden_size=width,
        num_attention_heads=num_heads,
        num_query_groups=num_groups,
        ffn_hidden_size=tree.get("mlp_hidden_size") or _field(path, tree, "mlp_ratio", int) * width,
        **_vocabulary(folder, rows, stated_size, vocab_size),
        mask_token_id=_field(path, tree, "mask_token_id", int),
        tie_embeddings=_field(path, tree, "weight_tying", bool),
        rotary_base=_field(path, tree, "rope_theta", float),
        norm_epsilon=_field(path, tree, "rms_norm_eps", float),
        qkv_bias=bool(tree.get("include_qkv_bias")),
        vocab_padding_multiple=vocab_padding_multiple,
    )
    seq_length = _field(path, tree, "max_sequence_length", int)
    return Description(model, "mdm", seq_length, tree.get("eos_token_id"))


def describe_export(folder: Path, *, vocab_padding_multiple: int) -> Description:
    """Reads the config.json of our own export.

    Args:
        folder: Where it is.
        vocab_padding_multiple: Rows of the vocabulary are padded to a multiple of this.

    Returns:
        The model.

    Raises:
        ConversionError: The file is missing or bad.
    """
    path = folder / "config.json"
    tree = read_json(path)
    _expect(path, tree, {"model_type": "megatron_mdm"}, "choose the format that it names")
    # A vocabulary that transformers resized leaves ids out in its middle, which ours cannot.
    remedy = "read the export whose vocabulary was not resized"
    _expect(path, tree, {"unused_token_ids": None}, remedy)
    model = _model_config(
        path,
        num_layers=_field(path, tree, "num_hidden_layers", int),
        hidden_size=_field(path, tree, "hidden_size", int),
        num_attention_heads=_field(path, tree, "num_attention_heads", int),
        num_query_groups=_field(path, tree, "num_key_value_heads", int),
        head_dim=_field(path, tree, "head_dim", int),
        ffn_hidden_size=_field(path, tree, "intermediate_size", int),
        **_rows_of(
            _field(path, tree, "vocab_size", int),
            # Exports from before this field have no row that no token uses.
            tree.get("padded_vocab_size") or _field(path, tree, "vocab_size", int),
        ),
        mask_token_id=_field(path, tree, "mask_token_id", int),
        tie_embeddings=_field(path, tree, "tie_word_embeddings", bool),
        rotary_base=_field(path, tree, "rope_theta", float),
        norm_epsilon=_field(path, tree, "rms_norm_eps", float),
        # Exports from before these fields have neither.
        qkv_bias=bool(tree.get("qkv_bias")),
        qk_norm=bool(tree.get("qk_norm")),
        vocab_padding_multiple=vocab_padding_multiple,
    )
    kind: Literal["mdm", "ar"] = "ar" if _field(path, tree, "is_causal", bool) else "mdm"
    seq_length = _field(path, tree, "max_position_embeddings", int)
    return Description(model, kind, seq_length, tree.get("eos_token_id"))


def describe_smdm(
    path: Path, shapes: Shapes, *, preset: str | None, vocab_padding_multiple: int
) -> Description:
    """Recognises a published SMDM model, which comes without a config.json, by its shapes.

    Args:
        path: Its file, for messages.
        shapes: Shape of every tensor.
        preset: Name of the model's sizes; None: the one of the family with so many layers of
            this width.
        vocab_padding_multiple: Rows of the vocabulary are padded to a multiple of this.

    Returns:
        The model.

    Raises:
        ConversionError: The tensors are not those of such a model, or no preset fits, or several.
    """
    embedding_rows, width = _matrix(path, shapes, "transformer.wte.weight")
    vocab_size, _ = _matrix(path, shapes, "lm_head.weight")
    ffn, _ = _matrix(path, shapes, "transformer.h.0.mlp.swiglu.w1.weight")
    if embedding_rows not in (vocab_size, vocab_size + 1):
        raise ConversionError(
            f"{path} has {embedding_rows} rows in transformer.wte.weight and {vocab_size} in "
            "lm_head.weight, where an AR model has as many and a masked-diffusion model one more: "
            "give another file."
        )
    layers = {match[1] for name in shapes if (match := re.match(r"transformer\.h\.(\d+)\.", name))}
    fields = preset_fields(_smdm_preset(path, preset, len(layers), width))
    sizes = {"num_layers": len(layers), "hidden_size": width, "ffn_hidden_size": ffn}
    for field, found in sizes.items():
        if fields[field] != found:
            raise ConversionError(
                f"{path} has {field}={found} where the preset says {fields[field]}: give --preset "
                "the name of the sizes that it was trained with."
            )
    model = _model_config(
        path,
        **sizes,
        num_attention_heads=fields["num_attention_heads"],
        head_dim=fields.get("head_dim"),
        vocab_size=vocab_size,
        vocab_padding_multiple=vocab_padding_multiple,
    )
    kind: Literal["mdm", "ar"] = "ar" if embedding_rows == vocab_size else "mdm"
    return Description(model, kind, _SMDM_SEQ_LENGTH, None)


def _smdm_preset(path: Path, preset: str | None, num_layers: int, width: int) -> str:
    if preset is not None:
        if preset not in preset_names():
            raise ConversionError(
                f"The preset {preset!r} does not exist: choose one like {preset_names()[0]}."
            )
        return preset
    family = [name for name in preset_names() if name.startswith("smdm-")]
    sizes = {name: preset_fields(name) for name in family}
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


def _vocabulary(folder: Path, rows: int, stated_size: int, asked: int | None) -> dict[str, int]:
    """How many of a model's rows stand for tokens, as fields of its configuration.

    Args:
        folder: Where its tokenizer.json is, if there is one.
        rows: Rows of its vocabulary.
        stated_size: Ids that its config.json speaks of.
        asked: Ids that the user asks for; None: the tokenizer's.
    """
    tokenizer = folder / "tokenizer.json"
    size = end_and_size(tokenizer)[1] if tokenizer.is_file() else None
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
    return _rows_of(asked or size or stated_size, rows)


def _rows_of(vocab_size: int, rows: int) -> dict[str, int]:
    return {"vocab_size": vocab_size} | ({"padded_vocab_size": rows} if rows > vocab_size else {})


def _refuse_inexpressible(path: Path, config: PretrainedConfig, tree: Mapping[str, Any]) -> None:
    rope = dict(config.rope_parameters)
    facts = {
        "rope_type": rope.get("rope_type"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "hidden_act": config.hidden_act,
        "sliding_attention": _slides(config),
        "quantization_config": tree.get("quantization_config"),
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
    _expect(path, facts, expected, "our model cannot express it, so choose another model")


def _slides(config: PretrainedConfig) -> bool:
    layer_types = getattr(config, "layer_types", None) or []
    return any(layer_type != "full_attention" for layer_type in layer_types)


def _matrix(path: Path, shapes: Shapes, name: str) -> tuple[int, int]:
    shape = shapes.get(name)
    if shape is None or len(shape) != 2:
        raise ConversionError(
            f"{path} has no matrix {name}, which every SMDM model has: choose another format."
        )
    return shape[0], shape[1]


def _expect(path: Path, tree: Mapping[str, Any], expected: Mapping[str, Any], remedy: str) -> None:
    for field, value in expected.items():
        if tree.get(field) != value:
            raise ConversionError(
                f"{path} has {field}={tree.get(field)!r} where {value!r} is needed: {remedy}."
            )


def _field(path: Path, tree: Mapping[str, Any], name: str, kind: type) -> Any:
    value = tree.get(name)
    kinds = (int, float) if kind is float else (kind,)
    # A bool is an int to Python.
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise ConversionError(f"{path} has {name}={value!r}: give it a {kind.__name__}.")
    return value


def _model_config(path: Path, **fields: Any) -> ModelConfig:
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        message = f"{field}: {problem['msg']}" if field else problem["msg"]
        raise ConversionError(f"{path} is not valid ({message}): correct it.") from None
