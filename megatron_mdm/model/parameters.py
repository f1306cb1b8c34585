"""The table of the model's parameters: one row for each, from which all else about it follows.

Shards (`sharding.py`), initial values (`initialization.py`), counts (`accounting.py`, `memory.py`),
pipeline stages, weight decay, places in checkpoints and names in foreign formats (`hf/formats`) are
read from it and stated nowhere else. Plain data: it needs no engine.

Sources: names of `hf` from transformers' modules of Llama and Qwen; of `smdm` from the published
checkpoints of *Scaling up Masked Diffusion Models on Text* (arXiv 2410.18514); of `llada` from the
published LLaDA-8B (arXiv 2502.09992).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from megatron_mdm.config import ModelConfig
from megatron_mdm.config.parameter_groups import ParameterRole

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
# What the names of a layer's parameters begin with, here and in the foreign formats.
_LAYER = "decoder.layers.{}."
_IN_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_FOREIGN_LAYERS = {
    "hf": "model.layers.{}.",
    "smdm": "transformer.h.{}.",
    "llada": "model.transformer.blocks.{}.",
}


class Run(NamedTuple):
    """Rows of one of the matrices that stand one after another in a parameter.

    Attributes:
        matrix: Which matrix.
        num_rows: Its next rows.
    """

    matrix: int
    num_rows: int


@dataclass(frozen=True)
class Parameter:
    """A row of the table: a parameter, or one of every layer.

    Attributes:
        name: Global name; in a layer what follows `decoder.layers.N.`.
        shape: Of the whole, padding rows of the vocabulary included.
        names: Its name in each foreign format; in a layer what follows the format's prefix.
            `{a|b}` gives two names, where the format keeps its matrices apart. A format without an
            entry cannot hold it.
        role: What it is in the network; some optimizers treat hidden matrices as such.
        stage: Which pipeline stage holds it: the first, the last, or the one that has the layer.
        initial: The constant that it begins as, or the standard deviation of its initial values.
        split_dim: Dimension that is divided over tensor-parallel ranks; None: every rank holds all
            of it.
        blocks: Independent blocks along that dimension, each divided: every rank holds a part of
            gate and of up projection.
        runs: How its matrices stand in its rows; None: it is one.
        matrices: What the matrices of `runs` are, by number.
        vocabulary: Its rows are the vocabulary's, with or without one for the mask token, and then
            padding; None: it has no padding.
        decays: Takes part in weight decay.
        exists: Does a model have it?
    """

    name: str
    shape: Callable[[ModelConfig], tuple[int, ...]]
    names: Mapping[str, str]
    role: ParameterRole = "hidden"
    stage: Literal["first", "layers", "last"] = "layers"
    initial: float | Callable[[ModelConfig], float] = lambda model: model.weight_std
    split_dim: int | None = None
    blocks: int = 1
    runs: Callable[[ModelConfig], list[Run]] | None = None
    matrices: tuple[str, ...] = ()
    vocabulary: Literal["tokens", "tokens and mask"] | None = None
    decays: bool = True
    exists: Callable[[ModelConfig], bool] = lambda model: True

    def format_full_name(self, layer: int | None) -> str:
        """Its global name in a layer, or outside of the layers."""
        return (_LAYER.format(layer) if self.stage == "layers" else "") + self.name

    def list_external_names(self, format_name: str, layer: int | None) -> list[str]:
        """Its names in a foreign format: one, or one for each matrix that it is made of."""
        prefix = _FOREIGN_LAYERS[format_name].format(layer) if self.stage == "layers" else ""
        before, opened, rest = self.names[format_name].partition("{")
        if not opened:
            return [prefix + before]
        choices, _, after = rest.partition("}")
        return [prefix + before + choice + after for choice in choices.split("|")]

    def size(self, model: ModelConfig) -> int:
        """Number of elements of the whole."""
        return math.prod(self.shape(model))

    def count_unpadded_rows(self, model: ModelConfig) -> int:
        """Counts its rows without padding."""
        if self.vocabulary is None:
            return self.shape(model)[0]
        rows = model.vocabulary_rows
        return max(rows, model.mask_id + 1) if self.vocabulary == "tokens and mask" else rows


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


def _has_head_norms(model: ModelConfig) -> bool:
    return model.qk_norm


_NORM: dict[str, Any] = {"role": "vector", "initial": 1.0, "decays": False}
_QKV: dict[str, Any] = {"runs": _list_qkv_runs, "matrices": ("query", "key", "value")}

# In the order of a forward pass.
PARAMETERS: tuple[Parameter, ...] = (
    Parameter(
        EMBEDDING,
        lambda model: (model.embedding_rows, model.hidden_size),
        {
            "hf": "model.embed_tokens.weight",
            "smdm": "transformer.wte.weight",
            "llada": "model.transformer.wte.weight",
        },
        role="embedding",
        stage="first",
        split_dim=0,
        vocabulary="tokens and mask",
    ),
    Parameter(
        "input_layernorm.weight",
        _find_hidden_shape,
        {"hf": "input_layernorm.weight", "smdm": "norm_1.weight", "llada": "attn_norm.weight"},
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
        },
        split_dim=0,
        **_QKV,
    ),
    Parameter(
        "self_attention.linear_qkv.bias",
        lambda model: (_count_qkv_rows(model),),
        {"hf": "self_attn.{q|k|v}_proj.bias", "llada": "{q|k|v}_proj.bias"},
        role="vector",
        initial=0.0,
        split_dim=0,
        decays=False,
        exists=lambda model: model.qkv_bias,
        **_QKV,
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
        "self_attention.linear_proj.weight",
        lambda model: (model.hidden_size, model.num_attention_heads * model.head_width),
        {"hf": "self_attn.o_proj.weight", "smdm": "attn.proj.weight", "llada": "attn_out.weight"},
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
        blocks=2,
        runs=_list_gate_and_up_runs,
        matrices=("gate", "up"),
    ),
    Parameter(
        "mlp.linear_fc2.weight",
        lambda model: (model.hidden_size, model.ffn_hidden_size),
        {"hf": "mlp.down_proj.weight", "smdm": "mlp.swiglu.w3.weight", "llada": "ff_out.weight"},
        initial=lambda model: model.output_weight_std,
        split_dim=1,
    ),
    Parameter(
        "decoder.final_layernorm.weight",
        _find_hidden_shape,
        {
            "hf": "model.norm.weight",
            "smdm": "transformer.ln_f.weight",
            "llada": "model.transformer.ln_f.weight",
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
