"""Every format's names and shapes as tables that both directions read.

A training parameter is cut along its first dimension into runs of rows, and a table says where each
run stands in which external tensor. Splitting reads the runs one way and joining the other, so the
two cannot disagree, and a part of a parameter needs only a part of the file.

Sources: names of `llama`, `qwen2` and `qwen3` from transformers' modules; of `smdm` from the
published checkpoints of *Scaling up Masked Diffusion Models on Text* (arXiv 2410.18514); of `llada`
from the published LLaDA-8B (arXiv 2502.09992).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megatron_mdm.hf.formats.architecture import Architecture

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"


class Run(NamedTuple):
    """Rows that stand together in both layouts.

    Attributes:
        tensor: Which of the external tensors.
        external: First row there.
        training: First row in the training parameter.
        num_rows: Number of rows.
    """

    tensor: int
    external: int
    training: int
    num_rows: int


Runs = Callable[[Architecture], list[Run]]


@dataclass(frozen=True)
class Parameter:
    """A training parameter.

    Attributes:
        name: Name in training checkpoints; `{i}` stands for the layer.
        shape: Its shape, padding rows of the vocabulary included.
        exists: Does an architecture have it?
    """

    name: str
    shape: Callable[[Architecture], tuple[int, ...]]
    exists: Callable[[Architecture], bool] = lambda arch: True


@dataclass(frozen=True)
class Row:
    """One row of a format's table.

    Attributes:
        training: Name in training checkpoints; `{i}` stands for the layer.
        external: Names in the format.
        runs: Where the rows stand; they cover the external tensors. Training rows that none of
            them covers are padding, or the row of a mask token that the format does not have.
    """

    training: str
    external: tuple[str, ...]
    runs: Runs


@dataclass(frozen=True)
class Format:
    """A table, and what it cannot hold.

    Attributes:
        rows: The table.
        misfit: Why an architecture cannot be written in the format; None if it can.
    """

    rows: tuple[Row, ...]
    misfit: Callable[[Architecture], str | None]


def _qkv_rows(arch: Architecture) -> int:
    return (arch.num_attention_heads + 2 * arch.num_query_groups) * arch.head_dim


def _layer(suffix: str) -> str:
    return f"decoder.layers.{{i}}.{suffix}"


# In the order of a forward pass.
PARAMETERS: tuple[Parameter, ...] = (
    Parameter(EMBEDDING, lambda a: (a.embedding_rows, a.hidden_size)),
    Parameter(_layer("input_layernorm.weight"), lambda a: (a.hidden_size,)),
    Parameter(_layer("self_attention.linear_qkv.weight"), lambda a: (_qkv_rows(a), a.hidden_size)),
    Parameter(
        _layer("self_attention.linear_qkv.bias"), lambda a: (_qkv_rows(a),), lambda a: a.qkv_bias
    ),
    Parameter(
        _layer("self_attention.q_layernorm.weight"), lambda a: (a.head_dim,), lambda a: a.qk_norm
    ),
    Parameter(
        _layer("self_attention.k_layernorm.weight"), lambda a: (a.head_dim,), lambda a: a.qk_norm
    ),
    Parameter(
        _layer("self_attention.linear_proj.weight"),
        lambda a: (a.hidden_size, a.num_attention_heads * a.head_dim),
    ),
    Parameter(_layer("pre_mlp_layernorm.weight"), lambda a: (a.hidden_size,)),
    Parameter(_layer("mlp.linear_fc1.weight"), lambda a: (2 * a.ffn_hidden_size, a.hidden_size)),
    Parameter(_layer("mlp.linear_fc2.weight"), lambda a: (a.hidden_size, a.ffn_hidden_size)),
    Parameter("decoder.final_layernorm.weight", lambda a: (a.hidden_size,)),
    Parameter(OUTPUT_LAYER, lambda a: (a.head_rows, a.hidden_size), lambda a: not a.tied),
)

_PARAMETERS = {parameter.name: parameter for parameter in PARAMETERS}


def _first_rows(count: Callable[[Architecture], int]) -> Runs:
    return lambda arch: [Run(0, 0, 0, count(arch))]


def _whole(training: str) -> Runs:
    return _first_rows(lambda arch: _PARAMETERS[training].shape(arch)[0])


def _by_group(arch: Architecture) -> list[Run]:
    """Megatron stores [queries, key, value] of each query group together."""
    per_group = arch.num_attention_heads // arch.num_query_groups
    runs, training = [], 0
    for group in range(arch.num_query_groups):
        for tensor, num_heads in enumerate((per_group, 1, 1)):
            num_rows = num_heads * arch.head_dim
            runs.append(Run(tensor, group * num_rows, training, num_rows))
            training += num_rows
    return runs


def _gate_then_up(arch: Architecture) -> list[Run]:
    return [
        Run(0, 0, 0, arch.ffn_hidden_size),
        Run(1, 0, arch.ffn_hidden_size, arch.ffn_hidden_size),
    ]


def _vocabulary(arch: Architecture) -> int:
    return arch.vocabulary_rows


def _vocabulary_and_mask(arch: Architecture) -> int:
    return arch.exported_embedding_rows


def _smdm_embedding(arch: Architecture) -> int:
    return arch.vocab_size if arch.is_causal else arch.vocab_size + 1


def _table(
    names: Mapping[str, tuple[str, ...]], embedding_rows: Callable[[Architecture], int]
) -> tuple[Row, ...]:
    """Adds to each name where its rows stand: two or three names mean that they are divided."""
    rows = []
    for training, external in names.items():
        runs = _whole(training)
        if training == EMBEDDING:
            runs = _first_rows(embedding_rows)
        elif training == OUTPUT_LAYER:
            runs = _first_rows(_vocabulary)
        elif len(external) > 1:
            runs = _by_group if "linear_qkv" in training else _gate_then_up
        rows.append(Row(training, external, runs))
    return tuple(rows)


def _transformers_names() -> dict[str, tuple[str, ...]]:
    names = {
        "input_layernorm.weight": ("input_layernorm.weight",),
        "self_attention.linear_qkv.weight": (
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.v_proj.weight",
        ),
        "self_attention.linear_qkv.bias": (
            "self_attn.q_proj.bias",
            "self_attn.k_proj.bias",
            "self_attn.v_proj.bias",
        ),
        "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
        "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
        "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
        "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
        "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
    }
    return {
        EMBEDDING: ("model.embed_tokens.weight",),
        **_in_layers(names, "model.layers.{i}."),
        "decoder.final_layernorm.weight": ("model.norm.weight",),
        OUTPUT_LAYER: ("lm_head.weight",),
    }


def _smdm_names() -> dict[str, tuple[str, ...]]:
    names = {
        "input_layernorm.weight": ("norm_1.weight",),
        # Already [queries, key, value] of each query group, as in training.
        "self_attention.linear_qkv.weight": ("attn.attn.weight",),
        "self_attention.linear_proj.weight": ("attn.proj.weight",),
        "pre_mlp_layernorm.weight": ("norm_2.weight",),
        "mlp.linear_fc1.weight": ("mlp.swiglu.w1.weight", "mlp.swiglu.w2.weight"),
        "mlp.linear_fc2.weight": ("mlp.swiglu.w3.weight",),
    }
    return {
        EMBEDDING: ("transformer.wte.weight",),
        **_in_layers(names, "transformer.h.{i}."),
        "decoder.final_layernorm.weight": ("transformer.ln_f.weight",),
        OUTPUT_LAYER: ("lm_head.weight",),
    }


def _llada_names() -> dict[str, tuple[str, ...]]:
    names = {
        "input_layernorm.weight": ("attn_norm.weight",),
        "self_attention.linear_qkv.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
        "self_attention.linear_qkv.bias": ("q_proj.bias", "k_proj.bias", "v_proj.bias"),
        "self_attention.linear_proj.weight": ("attn_out.weight",),
        "pre_mlp_layernorm.weight": ("ff_norm.weight",),
        # silu acts on ff_proj, and up_proj multiplies.
        "mlp.linear_fc1.weight": ("ff_proj.weight", "up_proj.weight"),
        "mlp.linear_fc2.weight": ("ff_out.weight",),
    }
    return {
        EMBEDDING: ("model.transformer.wte.weight",),
        **_in_layers(names, "model.transformer.blocks.{i}."),
        "decoder.final_layernorm.weight": ("model.transformer.ln_f.weight",),
        OUTPUT_LAYER: ("model.transformer.ff_out.weight",),
    }


def _in_layers(names: Mapping[str, tuple[str, ...]], prefix: str) -> dict[str, tuple[str, ...]]:
    return {
        _layer(training): tuple(prefix + name for name in external)
        for training, external in names.items()
    }


_NAMES = _transformers_names()


def _without(*parts: str) -> dict[str, tuple[str, ...]]:
    return {
        training: external
        for training, external in _NAMES.items()
        if not any(part in training for part in parts)
    }


_BIAS, _HEAD_NORMS = "linear_qkv.bias", ("q_layernorm", "k_layernorm")


def _anything(arch: Architecture) -> str | None:
    return None


def _exactly(*, qkv_bias: bool, qk_norm: bool) -> Callable[[Architecture], str | None]:
    def misfit(arch: Architecture) -> str | None:
        if arch.qkv_bias != qkv_bias:
            return f"qkv_bias={arch.qkv_bias}"
        return f"qk_norm={arch.qk_norm}" if arch.qk_norm != qk_norm else None

    return misfit


def _smdm_misfit(arch: Architecture) -> str | None:
    if arch.tied:
        return "tied=True"
    if arch.vocabulary_rows != arch.vocab_size:
        return f"padded_vocab_size={arch.padded_vocab_size}"
    if not arch.is_causal and arch.mask_token_id != arch.vocab_size:
        return f"mask_token_id={arch.mask_token_id} inside the vocabulary"
    return _head_dim_misfit(arch) or _exactly(qkv_bias=False, qk_norm=False)(arch)


def _llada_misfit(arch: Architecture) -> str | None:
    if arch.is_causal:
        return "is_causal=True"
    if arch.mask_token_id >= arch.vocabulary_rows:
        return f"mask_token_id={arch.mask_token_id} outside the vocabulary"
    return _head_dim_misfit(arch) or ("qk_norm=True" if arch.qk_norm else None)


def _head_dim_misfit(arch: Architecture) -> str | None:
    is_usual = arch.head_dim * arch.num_attention_heads == arch.hidden_size
    return None if is_usual else f"head_dim={arch.head_dim}"


FORMATS: dict[str, Format] = {
    "hf": Format(_table(_NAMES, _vocabulary_and_mask), _anything),
    "smdm": Format(_table(_smdm_names(), _smdm_embedding), _smdm_misfit),
    "llada": Format(_table(_llada_names(), _vocabulary), _llada_misfit),
    "llama": Format(
        _table(_without(_BIAS, *_HEAD_NORMS), _vocabulary),
        _exactly(qkv_bias=False, qk_norm=False),
    ),
    "qwen2": Format(
        _table(_without(*_HEAD_NORMS), _vocabulary), _exactly(qkv_bias=True, qk_norm=False)
    ),
    "qwen3": Format(_table(_without(_BIAS), _vocabulary), _exactly(qkv_bias=False, qk_norm=True)),
}
