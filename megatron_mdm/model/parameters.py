"""The table of the model's parameters: one row for each, from which all else about it follows.

Shards (`sharding.py`), initial values (`initialization.py`), counts (`accounting.py`, `memory.py`),
pipeline stages, weight decay, places in checkpoints and names in foreign formats (`hf/formats`) are
read from it and stated nowhere else. Plain data: it needs no engine.

Sources: names of `hf` from transformers' modules of Llama and Qwen; of `smdm` from the published
checkpoints of *Scaling up Masked Diffusion Models on Text* (arXiv 2410.18514); of `llada` from the
published LLaDA-8B (arXiv 2502.09992); of `gidd` from the published models of *Scaling Behavior of
Discrete Diffusion Language Models* (arXiv 2512.10858).
"""

from __future__ import annotations

import re
from typing import Any

from megatron_mdm.config import ModelConfig
from megatron_mdm.diffusion.interpolation import NUM_TIME_FEATURES
from megatron_mdm.model.parameter import Parameter, Run

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
_IN_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def _list_qkv_runs(model: ModelConfig) -> list[Run]:
    # Megatron stores queries, key and value of each query group together.
    heads, width = model.num_attention_heads // model.query_groups, model.head_width
    return [Run(0, heads * width), Run(1, width), Run(2, width)] * model.query_groups


def _list_gate_and_up_runs(model: ModelConfig) -> list[Run]:
    return [Run(0, model.ffn_hidden_size), Run(1, model.ffn_hidden_size)]


def _count_qkv_rows(model: ModelConfig) -> int:
    return (model.num_attention_heads + 2 * model.query_groups) * model.head_width


def _find_hidden_shape(model: ModelConfig) -> tuple[int, ...]:
    return (model.hidden_size,)


def _find_head_shape(model: ModelConfig) -> tuple[int, ...]:
    return (model.head_width,)


def _find_sink_shape(model: ModelConfig) -> tuple[int, ...]:
    return (model.query_groups, model.head_width)


def _has_head_norms(model: ModelConfig) -> bool:
    return model.qk_norm is True


def _has_width_norms(model: ModelConfig) -> bool:
    return model.qk_norm == "width"


def _has_sink(model: ModelConfig) -> bool:
    return model.attention_sink


def _has_gate(model: ModelConfig) -> bool:
    return model.mlp == "swiglu"


_NORM: dict[str, Any] = {"role": "vector", "initial": 1.0, "decays": False}
_BIAS: dict[str, Any] = {"role": "vector", "initial": 0.0, "decays": False}
_QKV: dict[str, Any] = {"runs": _list_qkv_runs, "matrices": ("query", "key", "value")}
_GATED: dict[str, Any] = {
    "blocks": 2,
    "runs": _list_gate_and_up_runs,
    "matrices": ("gate", "up"),
}

# In the order of a forward pass.
PARAMETERS: tuple[Parameter, ...] = (
    Parameter(
        EMBEDDING,
        lambda model: (model.embedding_rows, model.hidden_size),
        {
            "hf": "model.embed_tokens.weight",
            "smdm": "transformer.wte.weight",
            "llada": "model.transformer.wte.weight",
            "gidd": "model.embed_tokens.weight",
        },
        role="embedding",
        stage="first",
        split_dim=0,
        vocabulary="tokens and mask",
    ),
    Parameter(
        "time_embedding.weight",
        lambda model: (model.hidden_size, NUM_TIME_FEATURES),
        {"hf": "model.time_embedding.weight"},
        role="embedding",
        stage="first",
        # The model begins as one without.
        initial=0.0,
        exists=lambda model: model.time_embedding,
    ),
    Parameter(
        "input_layernorm.weight",
        _find_hidden_shape,
        {
            "hf": "input_layernorm.weight",
            "smdm": "norm_1.weight",
            "llada": "attn_norm.weight",
            "gidd": "attn_layernorm.weight",
        },
        **_NORM,
    ),
    Parameter(
        "self_attention.linear_qkv.weight",
        lambda model: (_count_qkv_rows(model), model.hidden_size),
        {
            "hf": "self_attn.{q|k|v}_proj.weight",
            # In the order of training.
            "smdm": "attn.attn.weight",
            "llada": "{q|k|v}_proj.weight",
            "gidd": "self_attn.{q|k|v}_proj.weight",
        },
        split_dim=0,
        **_QKV,
    ),
    Parameter(
        "self_attention.linear_qkv.bias",
        lambda model: (_count_qkv_rows(model),),
        {"hf": "self_attn.{q|k|v}_proj.bias", "llada": "{q|k|v}_proj.bias"},
        split_dim=0,
        exists=lambda model: model.qkv_bias,
        **_QKV,
        **_BIAS,
    ),
    Parameter(
        "self_attention.q_layernorm.weight",
        _find_head_shape,
        {"hf": "self_attn.q_norm.weight"},
        exists=_has_head_norms,
        **_NORM,
    ),
    Parameter(
        "self_attention.k_layernorm.weight",
        _find_head_shape,
        {"hf": "self_attn.k_norm.weight"},
        exists=_has_head_norms,
        **_NORM,
    ),
    Parameter(
        "self_attention.q_layernorm.width_weight",
        lambda model: (model.num_attention_heads * model.head_width,),
        {"hf": "self_attn.q_norm.weight", "gidd": "self_attn.q_norm.weight"},
        split_dim=0,
        exists=_has_width_norms,
        **_NORM,
    ),
    Parameter(
        "self_attention.k_layernorm.width_weight",
        lambda model: (model.query_groups * model.head_width,),
        {"hf": "self_attn.k_norm.weight", "gidd": "self_attn.k_norm.weight"},
        split_dim=0,
        exists=_has_width_norms,
        **_NORM,
    ),
    Parameter(
        "self_attention.core_attention.sink_key",
        _find_sink_shape,
        {"hf": "self_attn.sink_key", "gidd": "self_attn.k_bias"},
        split_dim=0,
        exists=_has_sink,
        **_BIAS,
    ),
    Parameter(
        "self_attention.core_attention.sink_value",
        _find_sink_shape,
        {"hf": "self_attn.sink_value", "gidd": "self_attn.v_bias"},
        split_dim=0,
        exists=_has_sink,
        **_BIAS,
    ),
    Parameter(
        "self_attention.linear_proj.weight",
        lambda model: (model.hidden_size, model.num_attention_heads * model.head_width),
        {
            "hf": "self_attn.o_proj.weight",
            "smdm": "attn.proj.weight",
            "llada": "attn_out.weight",
            "gidd": "self_attn.o_proj.weight",
        },
        initial=lambda model: model.output_weight_std,
        split_dim=1,
    ),
    Parameter(
        "pre_mlp_layernorm.weight",
        _find_hidden_shape,
        {
            "hf": "post_attention_layernorm.weight",
            "smdm": "norm_2.weight",
            "llada": "ff_norm.weight",
            "gidd": "mlp_layernorm.weight",
        },
        **_NORM,
    ),
    Parameter(
        "mlp.linear_fc1.weight",
        lambda model: (2 * model.ffn_hidden_size, model.hidden_size),
        {
            "hf": "mlp.{gate|up}_proj.weight",
            "smdm": "mlp.swiglu.{w1|w2}.weight",
            # silu acts on ff_proj, and up_proj multiplies.
            "llada": "{ff|up}_proj.weight",
        },
        split_dim=0,
        exists=_has_gate,
        **_GATED,
    ),
    Parameter(
        "mlp.linear_fc1.bias",
        lambda model: (2 * model.ffn_hidden_size,),
        {"hf": "mlp.{gate|up}_proj.bias"},
        split_dim=0,
        exists=lambda model: model.mlp_bias and _has_gate(model),
        **_GATED,
        **_BIAS,
    ),
    Parameter(
        "mlp.linear_up.weight",
        lambda model: (model.ffn_hidden_size, model.hidden_size),
        {"hf": "mlp.up_proj.weight", "gidd": "mlp.up_proj.weight"},
        split_dim=0,
        exists=lambda model: not _has_gate(model),
    ),
    Parameter(
        "mlp.linear_up.bias",
        lambda model: (model.ffn_hidden_size,),
        {"hf": "mlp.up_proj.bias", "gidd": "mlp.up_proj.bias"},
        split_dim=0,
        exists=lambda model: model.mlp_bias and not _has_gate(model),
        **_BIAS,
    ),
    Parameter(
        "mlp.linear_fc2.weight",
        lambda model: (model.hidden_size, model.ffn_hidden_size),
        {
            "hf": "mlp.down_proj.weight",
            "smdm": "mlp.swiglu.w3.weight",
            "llada": "ff_out.weight",
            "gidd": "mlp.down_proj.weight",
        },
        initial=lambda model: model.output_weight_std,
        split_dim=1,
    ),
    Parameter(
        "mlp.output_bias",
        _find_hidden_shape,
        {"hf": "mlp.down_proj.bias", "gidd": "mlp.down_proj.bias"},
        exists=lambda model: model.mlp_bias,
        **_BIAS,
    ),
    Parameter(
        "decoder.final_layernorm.weight",
        _find_hidden_shape,
        {
            "hf": "model.norm.weight",
            "smdm": "transformer.ln_f.weight",
            "llada": "model.transformer.ln_f.weight",
            "gidd": "model.norm.weight",
        },
        stage="last",
        **_NORM,
    ),
    Parameter(
        OUTPUT_LAYER,
        lambda model: (model.head_rows, model.hidden_size),
        {
            "hf": "lm_head.weight",
            "smdm": "lm_head.weight",
            "llada": "model.transformer.ff_out.weight",
            "gidd": "lm_head.weight",
        },
        role="output",
        stage="last",
        split_dim=0,
        vocabulary="tokens",
        exists=lambda model: not model.tie_embeddings,
    ),
)

_ROWS = {(row.stage == "layers", row.name): row for row in PARAMETERS}


def find_parameter(name: str) -> Parameter:
    """The row of a parameter.

    Args:
        name: Global name.

    Returns:
        Its row, the same for every layer.

    Raises:
        KeyError: The table has no such parameter.
    """
    return _ROWS[find_layer(name) is not None, _IN_LAYER.sub("", name)]


def find_layer(name: str) -> int | None:
    """The layer of a parameter, counted over all stages; None outside of the layers.

    Args:
        name: Global name.
    """
    match = _IN_LAYER.match(name)
    return int(match[1]) if match else None


def find_stage(name: str, num_layers: int, num_stages: int) -> int:
    """The pipeline stage that holds a parameter; of tied weights the one of the embedding.

    Args:
        name: Global name.
        num_layers: Layers of the model.
        num_stages: Stages, without interleaving.
    """
    layer = find_layer(name)
    if layer is not None:
        return layer * num_stages // num_layers
    return 0 if find_parameter(name).stage == "first" else num_stages - 1


def list_parameters(model: ModelConfig) -> list[Parameter]:
    """Lists the rows that a model has, in the order of a forward pass."""
    return [row for row in PARAMETERS if row.exists(model)]


def list_parameter_names(model: ModelConfig) -> list[str]:
    """Lists the names of all parameters in the order of a forward pass.

    Args:
        model: Sizes; a tied model has no output layer.

    Returns:
        The names, each once.
    """
    rows = list_parameters(model)
    layers = [row for row in rows if row.stage == "layers"]
    return [
        *(row.name for row in rows if row.stage == "first"),
        *(row.format_full_name(layer) for layer in range(model.num_layers) for row in layers),
        *(row.name for row in rows if row.stage == "last"),
    ]


def find_parameter_shape(name: str, model: ModelConfig) -> tuple[int, ...]:
    """Shape of a whole parameter, padding rows of the vocabulary included.

    Args:
        name: Global name.
        model: Sizes.

    Returns:
        The shape.

    Raises:
        KeyError: The model has no such parameter.
    """
    row, layer = find_parameter(name), find_layer(name)
    if not row.exists(model) or (layer is not None and layer >= model.num_layers):
        raise KeyError(name)
    return row.shape(model)
